"""What is evaluated on is not trained on: pictures, texts, their forms; the manifest, and what goes wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from data_tools.shards import ShardIndex
from data_tools.text_forms import same_form, text_key
from stages import clean, shard
from stages.base import StageError, Stopped
from tests.crawl_case import cropped, drawing, jpeg, pair, write_crawl
from tests.data_helpers import make_job

HELD, OTHER = "http://site.example/test/a", "http://site.example/train/"
SPLITS = [{"name": "test", "by": "part", "values": ["test"]}, {"name": "train"}]
LABELS = "site.example/(?P<part>test|train)/"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("A dog runs!", "a  dog, RUNS"),
        ("ＦＵＬＬ width１", "full width1"),
        ("一只，狗 在跑。", "一只狗在跑"),
        ("（红）熊猫", "红熊猫"),
        ("Straße", "STRASSE"),
        ("\ufb01sh", "fish"),  # a ligature
        ("e\u0301cole", "\u00e9cole"),
        ("I \u2764\ufe0f it", "I \u2764 it"),  # with and without the variation selector
        ("a\u200bb\u00adc", "abc"),  # zero width space, soft hyphen
        ("don't — stop", "dont stop"),
    ],
)
def test_texts_that_differ_in_writing_alone_are_one(one: str, two: str) -> None:
    assert same_form(one) == same_form(two) != ""
    assert text_key(one) == text_key(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [("a dog runs", "a dog ran"), ("红熊猫", "红熊貓"), ("😀", "😁"), ("x2", "x²3"), ("👍", "👍🏽")],
)
def test_texts_of_other_letters_or_symbols_are_two(one: str, two: str) -> None:
    assert text_key(one) != text_key(two)


def test_a_text_without_any_letter_is_compared_with_nothing() -> None:
    assert [text_key(text) for text in ("", " \t", "…!?", "\u200d")] == [None] * 4


def pictures() -> dict[str, bytes]:
    """One held out, its copies in training, and pictures of their own."""
    held = drawing("noto/1f600.webp")
    return {
        HELD: jpeg(held),
        f"{OTHER}bytes/z": jpeg(drawing("noto/1f4a1.webp")),
        f"{OTHER}resaved": jpeg(held, 40),
        f"{OTHER}small": jpeg(held.resize((64, 64))),
        f"{OTHER}crop": jpeg(cropped(held), 70),
        f"{OTHER}flip": jpeg(ImageOps.mirror(cropped(held)), 70),
        f"{OTHER}own": jpeg(drawing("noto/1f697.webp")),
    }


def job(directory: Path, **inputs: Path) -> Any:
    return make_job(directory, **inputs)


def config(against: list[dict[str, Any]] | None = None, **values: Any) -> shard.Config:
    decontaminate = {"against": against or [{"split": "test"}], **values.pop("decontaminate", {})}
    return shard.Config.model_validate(
        {"labels": LABELS, "splits": SPLITS, "decontaminate": decontaminate, **values}
    )


def crawl(tmp_path: Path, asked: list[dict[str, Any]] | None = None) -> Path:
    write_crawl(tmp_path / "crawl" / "out", pictures(), asked or ())
    return tmp_path / "crawl"


def records(directory: Path, split: str | None = None) -> dict[str, dict[str, Any]]:
    index = ShardIndex.open(directory / "out", split)
    return {record["url"]: record for record in (index.record(i) for i in range(len(index)))}


def dropped(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["url"]: row for row in pq.read_table(directory / "out" / "dropped.parquet").to_pylist()}


def test_no_copy_of_a_held_out_picture_stays_in_training(tmp_path: Path) -> None:
    report = shard.run(config(), job(tmp_path / "shard", pictures=crawl(tmp_path)))
    assert set(records(tmp_path / "shard")) == {HELD, f"{OTHER}bytes/z", f"{OTHER}own"}
    gone = dropped(tmp_path / "shard")
    assert set(gone) == {f"{OTHER}{name}" for name in ("resaved", "small", "crop", "flip")}
    key = records(tmp_path / "shard")[HELD]["key"]
    for row in gone.values():
        assert (row["reason"], row["detail"].split(" (")[0]) == ("leaked_picture", f"test: {key}")
    assert "mirror" in gone[f"{OTHER}flip"]["detail"]
    assert report.counts["dropped_leaked_picture"] == 4
    assert report.counts["pictures"] == 7
    [said] = json.loads((tmp_path / "shard" / "out" / "manifest.json").read_text())["checked"]
    assert said == {
        "name": "test",
        "corpus": "itself",
        "split": "test",
        "in_splits": ["train"],
        "pictures": 1,
        "texts": 2,
        "leaked_pictures": 4,
        "leaked_texts": 0,
    }


def test_the_clean_stages_fingerprints_are_used(tmp_path: Path) -> None:
    source = crawl(tmp_path)
    clean.run(clean.Config(near_duplicates=None), job(tmp_path / "clean", pictures=source))
    one = shard.run(config(), job(tmp_path / "with", pictures=tmp_path / "clean"))
    two = shard.run(config(), job(tmp_path / "without", pictures=source))
    assert one.counts == two.counts
    assert not (tmp_path / "with" / "fingerprints.parquet").exists()
    assert (tmp_path / "without" / "fingerprints.parquet").is_file()
    for name in ("manifest.json", "index.parquet", "dropped.parquet"):
        assert (tmp_path / "with/out" / name).read_bytes() == (tmp_path / "without/out" / name).read_bytes()


def test_texts_are_taken_out_and_a_record_without_any_goes(tmp_path: Path) -> None:
    own, bare = f"{OTHER}own", f"{OTHER}bytes/z"
    asked = [
        pair(HELD, "A smiling face", title="grinning", content="a face that grins"),
        pair(own, "a smiling face!", title="GRINNING", content="a car"),
        pair(own, "red car", title="GRINNING", content="a car"),
        pair(bare, "Ａ smiling　face", title="", content=""),
    ]
    source = crawl(tmp_path, asked)
    report = shard.run(config(), job(tmp_path / "shard", pictures=source))
    found = records(tmp_path / "shard")
    assert (found[own]["title"], found[own]["content"]) == ("", "a car")
    assert [query["text"] for query in found[own]["queries"]] == ["red car"]
    assert [query["text"] for query in found[HELD]["queries"]] == ["A smiling face"]  # its own stay
    gone = dropped(tmp_path / "shard")[bare]
    assert (gone["reason"], gone["detail"]) == ("leaked_text", f"test: {found[HELD]['key']}")
    assert (report.counts["dropped_leaked_text"], report.counts["leaked_texts_taken_out"]) == (1, 2)

    shard.run(config([{"split": "test", "texts": False}]), job(tmp_path / "shared", pictures=source))
    kept = records(tmp_path / "shared")
    assert kept[own]["title"] == "GRINNING"
    assert bare in kept
    [said] = json.loads((tmp_path / "shared" / "out" / "manifest.json").read_text())["checked"]
    assert (said["texts"], said["leaked_texts"]) == (None, 0)


def test_another_corpus_by_its_manifest_and_by_an_input(tmp_path: Path) -> None:
    write_crawl(tmp_path / "theirs" / "out", {"http://t.example/x": pictures()[f"{OTHER}crop"]})
    shard.run(shard.Config(), job(tmp_path / "held", pictures=tmp_path / "theirs"))
    source = crawl(tmp_path)
    by_path = config([{"corpus": "held/out", "name": "theirs"}], splits=[{"name": "train"}], labels=None)
    shard.run(by_path, job(tmp_path / "one", pictures=source))
    gone = dropped(tmp_path / "one")
    assert set(gone) == {HELD, *(f"{OTHER}{name}" for name in ("resaved", "small", "crop", "flip"))}
    assert "the same bytes" in gone[f"{OTHER}crop"]["detail"]
    [said] = json.loads((tmp_path / "one" / "out" / "manifest.json").read_text())["checked"]
    assert (said["name"], said["corpus"]) == ("theirs", ShardIndex.open(tmp_path / "held" / "out").sha256)
    assert by_path.files() == {"decontaminate.against.0.corpus": Path("held/out/manifest.json")}

    role = {
        "inputs": {"pictures": "crawl", "held_out": "held"},
        "splits": [{"name": "train"}],
        "labels": None,
    }
    by_input = config([{"role": "held_out"}], **role)
    shard.run(by_input, job(tmp_path / "two", pictures=source, held_out=tmp_path / "held"))
    assert set(dropped(tmp_path / "two")) == set(gone)
    kept = next((tmp_path / "two" / "held_out").glob("*.parquet"))
    stamp = kept.stat().st_mtime_ns
    shard.run(by_input, job(tmp_path / "two", pictures=source, held_out=tmp_path / "held"))
    assert kept.stat().st_mtime_ns == stamp  # its fingerprints are made once


def test_several_held_out_corpora_are_all_compared(tmp_path: Path) -> None:
    tones = ("grey", "white", "black")
    pictures = {tone: jpeg(Image.new("RGB", (120, 120), tone)) for tone in tones}
    for tone in ("grey", "white"):
        write_crawl(tmp_path / f"crawl_{tone}" / "out", {f"http://t.example/{tone}": pictures[tone]})
        shard.run(shard.Config(), job(tmp_path / tone, pictures=tmp_path / f"crawl_{tone}"))
    write_crawl(tmp_path / "crawl" / "out", {f"http://s.example/{t}": pictures[t] for t in tones})
    stage = config(
        [{"role": "held_out_grey", "name": "one"}, {"role": "held_out_white"}],
        inputs={"pictures": "crawl", "held_out_grey": "grey", "held_out_white": "white"},
        splits=[{"name": "train"}],
        labels=None,
    )
    assert stage.roles_named() == {"held_out_grey", "held_out_white"}
    held = {f"held_out_{tone}": tmp_path / tone for tone in ("grey", "white")}
    shard.run(stage, job(tmp_path / "shard", pictures=tmp_path / "crawl", **held))
    assert set(records(tmp_path / "shard")) == {"http://s.example/black"}
    manifest = json.loads((tmp_path / "shard" / "out" / "manifest.json").read_text())
    assert [one["name"] for one in manifest["checked"]] == ["one", "held_out_white"]


def test_plain_pictures_leak_by_their_bytes_alone(tmp_path: Path) -> None:
    grey, other = (jpeg(Image.new("RGB", (120, 120), tone)) for tone in ("grey", "white"))
    write_crawl(tmp_path / "theirs" / "out", {"http://t.example/x": grey})
    shard.run(shard.Config(), job(tmp_path / "held", pictures=tmp_path / "theirs"))
    write_crawl(tmp_path / "crawl" / "out", {"http://s.example/1": grey, "http://s.example/2": other})
    against = config([{"corpus": "held/out"}], splits=[{"name": "train"}], labels=None)
    shard.run(against, job(tmp_path / "shard", pictures=tmp_path / "crawl"))
    assert set(records(tmp_path / "shard")) == {"http://s.example/2"}


def test_only_the_splits_named_in_from_lose_anything(tmp_path: Path) -> None:
    splits = [SPLITS[0], {"name": "val", "share": 0.999999}, {"name": "train"}]
    shard.run(
        config(splits=splits, decontaminate={"from": ["train"]}),
        job(tmp_path / "shard", pictures=crawl(tmp_path)),
    )
    assert len(records(tmp_path / "shard")) == 7


def test_a_stop_leaves_the_crawl_as_it_was(tmp_path: Path) -> None:
    source = crawl(tmp_path)
    stopping = make_job(tmp_path / "shard", pictures=source, should_stop=lambda: True)
    with pytest.raises(Stopped):
        shard.run(config(), stopping)
    assert not (tmp_path / "shard" / "out").exists()
    assert shard.run(config(), job(tmp_path / "shard", pictures=source)).counts["kept"] == 3


@pytest.mark.parametrize(
    ("against", "more", "said"),
    [
        ([{"split": "tset"}], {}, "decontaminate.against: no split 'tset' here; allowed: test, train"),
        ([{"texts": False}], {}, "split: missing"),
        ([{"split": "test"}], {"decontaminate": {"from": ["test"]}}, "decontaminate.from: 'test' stands in"),
        ([{"role": "held_out"}], {}, "inputs.held_out: it and `role: held_out`"),
        ([{"role": "held_out", "corpus": "x"}], {}, "leave one of them out"),
        (
            [{"role": "held_out_b"}],
            {"inputs": {"held_out_a": "x"}},
            "inputs.held_out_a: it and `role: held_out_a`",
        ),
        ([{"role": "test"}], {}, "role"),
    ],
)
def test_what_cannot_be_meant_is_refused(against: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("(", r"\(")):
        config(against, **more)


def test_pictures_without_a_fingerprint_are_an_error_and_no_pass(tmp_path: Path) -> None:
    clean.run(clean.Config(near_duplicates=None), job(tmp_path / "clean", pictures=crawl(tmp_path)))
    path = tmp_path / "clean" / "out" / "fingerprints.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(StageError, match=r"1 pictures have no fingerprint .* Run the clean stage again"):
        shard.run(config(), job(tmp_path / "shard", pictures=tmp_path / "clean"))


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"nowhere/manifest\.json: no manifest"):
        shard.run(config([{"corpus": "nowhere"}]), job(tmp_path / "shard", pictures=crawl(tmp_path)))


def test_captions_and_other_titles_leak_too(tmp_path: Path) -> None:
    """What importers gave, and the texts of a picture's other rows, are looked at on both sides."""
    own = f"{OTHER}own"
    asked = [
        pair(HELD, "held", title="two dogs") | {"show": 90},
        pair(HELD, "held too", title="dogs on a beach") | {"show": 20},
        pair(own, "mine", title="a caption of the test") | {"show": 90},
        pair(own, "mine too", title="My own title") | {"show": 20},
        pair(own, "mine three", title="Dogs on a beach!") | {"show": 10},
    ]
    given: list[dict[str, Any]] = [dict.fromkeys(("captions", "split", "classes", "licence", "source"))] * 5
    said = {HELD: ["a caption of the test"], own: ["A caption of the test.", "a caption of its own"]}
    for place in (0, 2):
        captions = [{"text": text, "lang": "en"} for text in said[asked[place]["url"]]]
        given[place] = given[place] | {"captions": captions, "source": "made"}
    source = crawl(tmp_path, [row | more for row, more in zip(asked, given, strict=True)])
    shard.run(config(), job(tmp_path / "shard", pictures=source))
    record = records(tmp_path / "shard")[own]
    assert (record["title"], record["other_titles"]) == ("My own title", [])
    assert [caption["text"] for caption in record["captions"]] == ["a caption of its own"]
    assert records(tmp_path / "shard")[HELD]["other_titles"] == ["dogs on a beach"]
