"""Benchmarks made from a log: exact splits and labels, no text or picture twice, no true negative."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.benchmark import pairs as benchmark_pairs
from data_tools.benchmark.pairs import deal_texts, related, split_sizes
from data_tools.benchmark.texts import (
    SETS,
    TextRules,
    choose_text,
    near,
    own_texts,
    set_of,
)
from data_tools.corpus_source import CorpusSource
from data_tools.errors import DataError
from data_tools.shards import ShardIndex, ShardWriter
from data_tools.text_forms import same_form
from learning.evaluation.gallery import gallery_of, texts_of
from stages import evaluate
from stages.base import StageError, Stopped
from stages.benchmark import Config, run
from tests import tiny_model
from tests.benchmark_case import log_rows, make, pairs_of, words, write_shards, write_source
from tests.data_helpers import make_job, picture
from tests.test_shards import contents, pair

PICTURES = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), PICTURES)


@pytest.fixture(scope="module")
def records(source: Path) -> dict[str, dict[str, Any]]:
    index = ShardIndex.open(source / "out", "benchmark")
    return {key: index.record(place) for place, key in enumerate(index.keys)}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each set, of the whole split: 200 pairs."""
    root = tmp_path_factory.mktemp("sets")
    for name in SETS:
        make(root / name, source, set=name)
    return {name: root / name for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_splits_labels_and_texts_are_exact(made: dict[str, Path], name: str) -> None:
    rows = pairs_of(made[name])
    counts = Counter((row["split"], row["label"]) for row in rows)
    if SETS[name].matching:
        assert counts == {
            (split, label): n for split, n in (("train", 80), ("val", 10), ("test", 10)) for label in (0, 1)
        }
    else:
        assert counts == {("train", 1): 160, ("val", 1): 20, ("test", 1): 20}
    for column in ("id", "key", "text", "text_key"):
        assert len({row[column] for row in rows}) == len(rows) == 200
    split_of = {row["key"]: row["split"] for row in rows}
    for row in rows:
        assert (row["key"] == row["text_key"]) == (row["label"] == 1)
        assert split_of[row["text_key"]] == row["split"]


@pytest.mark.parametrize("name", SETS)
def test_a_text_is_its_owners_and_no_negative_is_true(
    made: dict[str, Path], records: dict[str, dict[str, Any]], name: str
) -> None:
    for row in pairs_of(made[name]):
        owner = records[row["text_key"]]
        queries = [query["text"] for query in owner["queries"]]
        if SETS[name].queries:
            assert row["text"] in queries
        else:
            assert row["text"] == (owner["content"] or owner["title"])
        said = own_texts(records[row["key"]])
        assert any(near(same_form(row["text"]), text) for text in said) == (row["label"] == 1)


def test_queries_are_drawn_among_all_of_a_picture(
    made: dict[str, Path], records: dict[str, dict[str, Any]]
) -> None:
    places = Counter(
        [query["text"] for query in records[row["text_key"]]["queries"]].index(row["text"])
        for row in pairs_of(made["iqr"])
    )
    assert set(places) == {0, 1, 2}
    assert min(places.values()) > 40


@pytest.mark.parametrize("name", SETS)
def test_the_corpus_is_what_pairs_say(
    made: dict[str, Path], source: Path, records: dict[str, dict[str, Any]], name: str
) -> None:
    before = ShardIndex.open(source / "out")
    place_of = {key: place for place, key in enumerate(before.keys)}
    by_key = {row["key"]: row for row in pairs_of(made[name])}
    assert ShardIndex.splits(made[name] / "out") == {"train": 160, "val": 20, "test": 20}
    index = ShardIndex.open(made[name] / "out")
    index.verify()
    for place, key in enumerate(index.keys):
        row, record = by_key.pop(key), index.record(place)
        assert record["captions"] == [{"text": row["text"], "lang": "zh"}]
        assert (record["title"], record["content"], record["queries"]) == ("", "", [])
        assert record["split"] == row["split"]
        assert {name: record[name] for name in ("url", "sha256", "licence", "click")} == {
            name: records[key][name] for name in ("url", "sha256", "licence", "click")
        }
        assert index.image_bytes(place) == before.image_bytes(place_of[key])
        if SETS[name].matching:
            assert record["labels"]["match"] == index.labels("match")[place] == str(row["label"])
    assert not by_key


def test_a_gallery_opens_a_retrieval_set(made: dict[str, Path]) -> None:
    gallery = gallery_of(ShardIndex.open(made["iqr"] / "out", "test"), ["captions"])
    assert (len(gallery.images), len(gallery.texts)) == (20, 20)
    assert all(len(owners) == 1 for owners in gallery.owners)


def test_the_evaluate_stage_and_the_loader_read_the_sets(made: dict[str, Path], tmp_path: Path) -> None:
    weights = tiny_model.write_stage(tmp_path / "finetune")
    galleries = [{"name": "icr", "split": "test", "texts": ["captions"]}]
    config = evaluate.Config.model_validate({"galleries": galleries, "batch": 10, "examples": 2})
    job = make_job(tmp_path / "evaluate", corpus=made["icr"], weights=weights)
    report = evaluate.run(config, job)
    assert report.counts == {"icr_images": 20, "icr_texts": 20}
    data = CorpusSource(corpus=str(made["icm"] / "out"))
    index = data.open(data.place(None, Path()), "train", Path())
    labels = index.labels("match")
    assert Counter(labels) == {"1": 80, "0": 80}
    of_pair = {row["key"]: row for row in pairs_of(made["icm"])}
    for place, key in enumerate(index.keys):
        assert texts_of(index.record(place), "captions") == [of_pair[key]["text"]]


def test_the_four_sets_share_no_picture(source: Path, tmp_path: Path) -> None:
    keys = []
    for seed, name in enumerate(SETS):  # of other seeds too
        values = {"pairs": 40, "sets": list(SETS), "seed": seed}
        report = make(tmp_path / name, source, set=name, **values)
        assert report.counts["of_other_sets"] > 0
        keys += [row["key"] for row in pairs_of(tmp_path / name)]
    assert len(set(keys)) == len(keys) == 160


def test_parts_are_as_the_papers_sizes() -> None:
    counts = Counter(set_of(str(number), tuple(SETS)) for number in range(6000))
    assert {name: round(count / 1000) for name, count in counts.items()} == {
        "icm": 2,
        "iqm": 2,
        "icr": 1,
        "iqr": 1,
    }
    assert {set_of(str(number), ["iqr"]) for number in range(50)} == {"iqr"}


def test_the_same_bytes_from_other_shards_and_another_seed_draws_others(
    made: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    before = ShardIndex.open(source / "out")
    order = random.Random(3).sample(range(len(before)), len(before))
    writer = ShardWriter(tmp_path / "other" / "out", 20_000, ["benchmark"], [])
    for place in order:
        writer.write(before.image_bytes(place), "png", before.record(place))
    assert len(writer.close()["shards"]) > 5
    annotate = {"pairs_per_page": 30}
    for place, corpus in (("a", source), ("b", tmp_path / "other")):
        make(tmp_path / place, corpus, set="icm", annotate=annotate)
    first = contents(tmp_path / "a" / "out")
    assert first == contents(tmp_path / "b" / "out")
    assert first["pairs.parquet"] == contents(made["icm"] / "out")["pairs.parquet"]
    make(tmp_path / "c", source, set="icm", seed=1)
    assert {row["id"] for row in pairs_of(tmp_path / "c")} != {row["id"] for row in pairs_of(tmp_path / "a")}


def test_every_picture_left_out_has_one_reason(tmp_path: Path) -> None:
    rows, pictures = [], {}
    for number in range(60):
        url = f"http://site.example/a/{number:02d}"
        changes: dict[str, Any] = {"title": words(number), "content": words(f"c{number}")}
        if number in (0, 1):
            changes = {"title": "", "content": ""}
        elif number == 2:
            changes["click"] = 0
        elif number == 3:
            changes |= {"title": "猫", "content": "狗"}
        elif number in (4, 5):
            changes["content"] = "the very same, Text" if number == 4 else "The very same text!"
            changes["click"] = 30 if number == 5 else 20
        rows.append(pair(url, words(f"q{number}"), **changes))
        pictures[url] = picture(24, 20, color=(number, 9, 9), format="PNG")
    source = write_shards(tmp_path / "source", pictures, rows)
    report = make(tmp_path / "icr", source, set="icr", pairs=50)
    dropped = pq.read_table(tmp_path / "icr" / "out" / "dropped.parquet").to_pylist()
    assert Counter(row["reason"] for row in dropped) == {
        "no_text": 2,
        "few_clicks": 1,
        "bad_length": 1,
        "repeated_text": 1,
        "not_drawn": 5,
    }
    assert [row["text"] for row in dropped if row["reason"] == "repeated_text"] == ["the very same, Text"]
    assert report.counts["pictures"] == 60 == len(dropped) + report.counts["pairs"]
    assert report.counts["dropped_few_clicks"] == 1
    keys = {row["key"] for row in dropped} | {row["key"] for row in pairs_of(tmp_path / "icr")}
    assert len(keys) == 60


def test_of_equal_pictures_under_two_keys_one_is_taken(source: Path, tmp_path: Path) -> None:
    before = ShardIndex.open(source / "out")
    writer = ShardWriter(tmp_path / "twice" / "out", 10**8, ["benchmark"], [])
    for place in range(60):
        image, record = before.image_bytes(place), before.record(place)
        writer.write(image, "png", record)
        if place < 20:
            writer.write(image, "png", record | {"key": f"copy{place}", "content": words(f"copy {place}")})
    writer.close()
    report = make(tmp_path / "icr", tmp_path / "twice", set="icr")
    assert report.counts["dropped_repeated_picture"] == 20
    assert report.counts["pairs"] == 60
    pictures = ShardIndex.open(tmp_path / "icr" / "out")
    assert len({pictures.record(place)["sha256"] for place in range(60)}) == 60


@pytest.mark.parametrize("block", [2, 7, 39])
def test_negatives_of_many_blocks(
    source: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_pairs, "BLOCK", block)
    make(tmp_path / "icm", source, set="icm", shares=[1, 1, 1])
    rows = pairs_of(tmp_path / "icm")
    split_of = {row["key"]: (row["split"], row["label"]) for row in rows}
    assert len({row["text_key"] for row in rows}) == len(rows) == 200
    for row in rows:
        assert split_of[row["text_key"]] == (row["split"], row["label"])
        assert (row["text_key"] == row["key"]) == (row["label"] == 1)
    counts = Counter(split_of.values())
    assert [counts[split, 0] for split in ("train", "val", "test")] == [34, 33, 33]
    assert [counts[split, 1] for split in ("train", "val", "test")] == [34, 33, 33]


def test_fewer_than_wanted_are_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = make(tmp_path / "icm", source, set="icm", pairs=None)
    assert report.counts["wanted"] == 400_000
    assert report.counts["pairs"] == 300 == report.metrics["benchmark/pairs"]
    assert (report.counts["val_positive"], report.counts["test_negative"]) == (15, 15)
    assert "300 pairs of 400000" in caplog.text


def test_too_few_pictures_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    source = write_source(tmp_path, 12)
    with pytest.raises(StageError, match=r"6 pictures .* too few to divide .*min_click"):
        make(tmp_path / "icm", source, set="icm")
    assert not (tmp_path / "icm" / "out.unfinished").exists()
    assert not (tmp_path / "icm" / "scratch").exists()


def test_pictures_that_all_share_a_text_have_no_negative(tmp_path: Path) -> None:
    rows = [row | {"title": "同一个标题"} for row in log_rows(40)]
    pictures = {row["url"]: picture(24, 20, color=(n // 3, 1, 1), format="PNG") for n, row in enumerate(rows)}
    source = write_shards(tmp_path, pictures, rows)
    with pytest.raises(StageError, match=r"no text among 14 can be its negative"):
        make(tmp_path / "icm", source, set="icm")


def test_a_label_of_that_name_and_a_stop(tmp_path: Path, source: Path) -> None:
    named = write_source(tmp_path / "named", 40, labels=r"site\.example/(?P<match>.)/")
    with pytest.raises(StageError, match="label 'match'"):
        make(tmp_path / "icm", named, set="icm")
    config = Config(set="icr", split="benchmark", sets=("icr",))
    with pytest.raises(Stopped):
        run(config, make_job(tmp_path / "stopped", should_stop=lambda: True, corpus=source))
    assert not (tmp_path / "stopped" / "out").exists()
    with pytest.raises(StageError, match="no split 'nowhere'; there are: benchmark"):
        make(tmp_path / "nowhere", source, set="icr", split="nowhere")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"set": "icq"}, "icm"),
        ({"sets": ["icr"]}, "sets: icm is not among them"),
        ({"shares": [8, 1, 0]}, "shares: each is 1 or more; got 8:1:0"),
        ({"min_words": 9, "max_words": 3}, "min_words: 9 is more than max_words: 3"),
        ({"pairs": 3}, "pairs"),
        ({"annotate": {"share": 0}}, "annotate.share"),
    ],
)
def test_a_wrong_config_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Config.model_validate({"set": "icm", "split": "benchmark"} | changed)


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_made_before(source: Path, made: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made["icr"], tmp_path / "icr"))
    before = contents(copy)
    config = {"split": "benchmark", "sets": ["icr"], "set": "icr", "pairs": 200, "seed": 4}
    command = [sys.executable, "-m", "tests.stage_process", "benchmark", json.dumps(config), str(copy)]
    done = subprocess.run(
        [*command, f"corpus={source}"],
        env={**os.environ, "FILE_LIMIT": "50000"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert contents(copy) == before


def test_corrections_enter_the_fingerprint() -> None:
    one = Config.model_validate({"set": "icm", "split": "b", "corrections": "sheet.csv"})
    two = Config.model_validate({"set": "icm", "split": "b", "corrections": ["a.csv", "b.csv"]})
    assert one.files() == {"corrections.0": Path("sheet.csv")}
    assert two.files() == {"corrections.0": Path("a.csv"), "corrections.1": Path("b.csv")}
    assert Config.model_validate({"set": "icm", "split": "b", "corrections": None}).files() == {}


# -------------------------------------------------------------------------------------------------- its parts


@given(st.integers(20, 500_000), st.tuples(*[st.integers(1, 9)] * 3))
def test_sizes_are_exact_to_rounding(count: int, shares: tuple[int, int, int]) -> None:
    try:
        sizes = split_sizes(count, shares)
    except DataError:
        assert count * min(shares) < 2 * sum(shares) * 1.5
        return
    assert sum(sizes.values()) == count
    for split, share in zip(sizes, shares, strict=True):
        assert abs(sizes[split] - count * share / sum(shares)) <= 1


def test_the_papers_sizes() -> None:
    assert split_sizes(200_000, (8, 1, 1)) == {"train": 160_000, "val": 20_000, "test": 20_000}


def _row(number: int, texts: list[int]) -> dict[str, Any]:
    own = sorted(words(text) for text in {*texts, 1000 + number})
    return {"key": str(number), "sha256": str(number), "own": own, "same": words(1000 + number)}


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=2, max_size=25))
def test_dealt_texts_are_a_permutation_without_a_true_pair(texts: list[list[int]]) -> None:
    block = [_row(number, own) for number, own in enumerate(texts)]
    try:
        givers = deal_texts(block)
    except DataError:
        # only where some picture is related to half of the others or more an exchange may fail
        most = max(sum(related(row, other) for other in block) for row in block)
        assert most > len(block) / 3
        return
    assert sorted(givers) == list(range(len(block)))
    for row, giver in zip(block, givers, strict=True):
        assert not set(row["own"]) & set(block[giver]["own"])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, World!", "hello world", True),
        ("红色熊猫", "红色熊猫高清图片大全", True),
        ("熊猫", "红色的大熊猫", True),
        ("a cat on a mat", "a cat on the mat", True),
        ("in", "an indian elephant", False),
        ("猫", "熊猫", False),
        ("彩铅百合", "彩铅百合绘画大全", True),
        ("red panda", "blue whale", False),
        ("ＡＢＣ　１２３", "abc123", True),
        ("🐈🐈", "🐈 🐈", True),
    ],
)
def test_near_texts(one: str, other: str, same: bool) -> None:
    assert near(same_form(one), same_form(other)) == near(same_form(other), same_form(one)) == same


@given(st.text(), st.text())
def test_near_is_symmetric_and_every_text_is_near_to_itself(one: str, other: str) -> None:
    a, b = same_form(one), same_form(other)
    assert near(a, b) == near(b, a)
    assert near(a, a)


def test_a_query_is_drawn_by_the_key_alone() -> None:
    queries = [{"text": words(n), "click": n, "lang": "zh"} for n in range(6)]
    record = {"key": "k", "queries": queries}
    rules = TextRules(queries=True, min_click=2)
    chosen = choose_text(record, rules)
    for seed in range(5):
        random.Random(seed).shuffle(queries)
        assert choose_text(record, rules) == chosen
    drawn = {choose_text(record | {"key": str(n)}, rules).click for n in range(100)}
    assert drawn == {2, 3, 4, 5}


def test_agreement_is_not_written_without_corrections(made: dict[str, Path]) -> None:
    names = {path.name for path in (made["icr"] / "out").iterdir()}
    assert names == {
        *("train", "val", "test", "index.parquet", "manifest.json", "pairs.parquet", "dropped.parquet")
    }
    manifest = json.loads((made["icm"] / "out" / "manifest.json").read_text())
    assert manifest["labels"] == ["match"]
