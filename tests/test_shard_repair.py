"""Repairing shards: every sound sample byte for byte, in a whole corpus; the damaged one untouched."""

import hashlib
import io
import json
import resource
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.errors import DiskFullError
from data_tools.shards import ShardIndex, ShardWriter
from data_tools.shards.check import check, find_shards
from data_tools.shards.files import CorpusError
from data_tools.shards.info import describe
from data_tools.shards.repair import RepairReport, repair
from tests.data_helpers import picture
from tests.shard_case import Content, change, contents, files, image, pair, record, rows, tar_of, write_corpus


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "out")


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def rescue(out: Path, *places: Path, **options: Any) -> tuple[RepairReport, Content]:
    before = {place: files(place) if place.is_dir() else place.read_bytes() for place in places}
    report = repair(find_shards(list(places)), out, 1, **options)
    assert before == {place: files(place) if place.is_dir() else place.read_bytes() for place in places}
    assert check(find_shards([out], True), 1).findings == []
    assert not out.with_name(f"{out.name}.unfinished").exists()
    found = contents(out)
    assert report.rescued == len(found)
    return report, found


def lost(out: Path) -> dict[str, str]:
    return {
        row["key"]: row["reason"].partition(":")[0] for row in pq.read_table(out / "lost.parquet").to_pylist()
    }


def without(content: Content, *keys: str) -> Content:
    return {key: parts for key, parts in content.items() if key not in keys}


def test_a_sound_corpus_comes_out_as_it_was(corpus: Path, tmp_path: Path) -> None:
    report, found = rescue(tmp_path / "new", corpus)
    assert found == contents(corpus)
    assert (report.lost, report.differing, dict(report.reasons)) == (0, 0, {})
    old, new = (json.loads((place / "manifest.json").read_text()) for place in (corpus, tmp_path / "new"))
    for name in ("samples", "splits", "labels", "licences"):
        assert new[name] == old[name]
    assert ShardIndex.open(tmp_path / "new").sha256 == ShardIndex.open(corpus).sha256


def test_damaged_samples_are_left_out_and_listed(corpus: Path, tmp_path: Path) -> None:
    truth, row = contents(corpus), rows(corpus)
    change(corpus / row["0001"]["shard"], row["0001"]["image_offset"] + 60, b"!?")
    change(corpus / row["0006"]["shard"], row["0006"]["json_offset"] + 20, b"!?")
    change(corpus / row["0008"]["shard"], row["0008"]["image_offset"] - 512, bytes(512))  # a header
    report, found = rescue(tmp_path / "new", corpus)
    assert found == without(truth, "0001", "0006")
    assert lost(tmp_path / "new") == {"0001": "data", "0006": "data"}
    assert report.reasons == {"data": 2}


def test_without_an_index_a_broken_header_costs_its_sample_alone(corpus: Path, tmp_path: Path) -> None:
    truth, row = contents(corpus), rows(corpus)
    change(corpus / row["0008"]["shard"], row["0008"]["image_offset"] - 512, b"\xff")
    for name in ("manifest.json", "index.parquet"):
        (corpus / name).unlink()
    report, found = rescue(tmp_path / "new", corpus)
    assert found == without(truth, "0008")
    assert lost(tmp_path / "new") == {"0008": "partner"}
    assert report.lost == 1


def test_a_missing_shard_is_rescued_from_the_one_that_its_members_are_mixed_into(
    corpus: Path, tmp_path: Path
) -> None:
    truth = contents(corpus)
    first, second = sorted(corpus.rglob("*.tar"))[:2]
    members = []
    for path in (first, second):
        with tarfile.open(path) as tar:
            members += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    tar_of(first, sorted(members, key=lambda member: member[0][::-1]))  # all records first, all pictures last
    second.unlink()
    report, found = rescue(tmp_path / "new", corpus)
    assert found == truth
    assert report.lost == 0


def test_a_stray_with_other_bytes_than_the_index_tells_is_no_rescue(corpus: Path, tmp_path: Path) -> None:
    truth = contents(corpus)
    first, second = sorted(corpus.rglob("*.tar"))[:2]
    gone = [key for key, row in rows(corpus).items() if corpus / row["shard"] == second]
    with tarfile.open(first, "a") as tar:
        data = json.dumps(record(int(gone[0]), title="forged")).encode()
        for name, part in ((f"{gone[0]}.png", image(int(gone[0]))), (f"{gone[0]}.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
    second.unlink()
    _, found = rescue(tmp_path / "new", corpus)
    assert found == without(truth, *gone)
    assert set(lost(tmp_path / "new")) == set(gone)


def test_of_samples_with_one_key_the_first_sound_one_is_kept(tmp_path: Path) -> None:
    other = pair(1, title="another")
    tar_of(tmp_path / "tars" / "a.tar", [*pair(0), *pair(1)])
    tar_of(tmp_path / "tars" / "b.tar", [*pair(0), *other, *pair(2)])
    report, found = rescue(tmp_path / "new", tmp_path / "tars")
    assert found == {f"{n:04d}": (pair(n)[0][1], pair(n)[1][1]) for n in range(3)}
    assert report.differing == 1
    table = pq.read_table(tmp_path / "new" / "lost.parquet").to_pylist()
    assert [(row["key"], row["reason"].partition(":")[0]) for row in table] == [("0001", "duplicate_differs")]
    assert "b.tar" in table[0]["shard"]
    assert "a.tar" in table[0]["reason"]


def test_within_a_tar_the_first_that_can_be_read_is_kept(tmp_path: Path) -> None:
    broken = ("0001.png", image(1)[:-150])
    record_ = pair(1, sha256=None)[1]
    tar_of(tmp_path / "a.tar", [broken, record_, *pair(0), ("0001.png", image(1))])
    report, found = rescue(tmp_path / "new", tmp_path / "a.tar")
    assert found["0001"] == (image(1), record_[1])
    assert report.differing == 1


def test_within_a_tar_the_picture_of_the_records_checksum_is_kept(tmp_path: Path) -> None:
    changed = ("0001.png", image(2))  # it can be read as well
    tar_of(tmp_path / "a.tar", [changed, ("0001.json", b"{"), *pair(0), *pair(1)])
    report, found = rescue(tmp_path / "new", tmp_path / "a.tar")
    assert found["0001"] == (image(1), pair(1)[1][1])
    assert report.differing == 2


def test_tars_of_img2dataset_become_a_corpus(tmp_path: Path) -> None:
    import webdataset

    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "00000.tar")) as writer:
        for n in range(4):
            told = {"key": f"{n:09d}", "caption": f"a caption {n}", "sha256": "0" * 64}
            jpeg = picture(120 + n, 90, format="JPEG")
            writer.write({"__key__": told["key"], "jpg": jpeg, "json": told, "txt": told["caption"]})
    report, found = rescue(tmp_path / "new", tmp_path / "tars", split="web")
    assert (report.rescued, report.lost) == (4, 0)
    assert found["000000002"][0] == picture(122, 90, format="JPEG")
    index = ShardIndex.open(tmp_path / "new", "web")
    assert index.record(2)["caption"] == "a caption 2"
    assert [(row["width"], row["height"]) for row in rows(tmp_path / "new").values()] == [
        (120 + n, 90) for n in range(4)
    ]
    samples = list(webdataset.WebDataset(str(tmp_path / "new" / "web" / "web-00000.tar"), shardshuffle=False))
    assert [sample["txt"] for sample in samples] == [f"a caption {n}".encode() for n in range(4)]


def test_what_a_corpus_cannot_hold_is_lost_with_its_reason(tmp_path: Path) -> None:
    members = [
        *pair(0),
        *pair(1, key="0001", split="../../outside"),
        ("0002.gif", picture(format="GIF")),
        ("0002.json", json.dumps(record(2, sha256=None)).encode()),
        pair(3)[0],
        ("0003.json", b'{"caption": "without a key"}'),
        (f"{'k' * 120}.png", image(4)),
        (f"{'k' * 120}.json", json.dumps(record(4, key="k" * 120)).encode()),
        ("../0005.png", image(5)),
        ("../0005.json", json.dumps(record(5, key="../0005")).encode()),
    ]
    _, found = rescue(tmp_path / "new", tar_of(tmp_path / "a.tar", members))
    assert set(found) == {"0000"}
    assert lost(tmp_path / "new") == {
        "0001": "name",
        "0002": "undecodable",
        "0003": "record",
        "k" * 120: "name",
        "../0005": "name",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "new"]


def test_new_must_be_new_and_something_must_be_sound(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(CorpusError, match="new: exists already"):
        repair(find_shards([corpus]), tmp_path / "new", 1)
    (tmp_path / "a.tar").write_bytes(b"x" * 5000)
    with pytest.raises(CorpusError, match="nothing to rescue"):
        repair(find_shards([tmp_path / "a.tar"]), tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "other.unfinished").exists()


def test_records_that_all_name_other_splits_open_no_file_each(tmp_path: Path) -> None:
    members = [member for n in range(70) for member in pair(n, split=f"split_{n}")]
    with pytest.raises(CorpusError, match="more than 64 splits"):
        repair(find_shards([tar_of(tmp_path / "a.tar", members)]), tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_name_is_a_pattern(sound: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(sound, tmp_path / "it's [one] * of?" / "corpus"))
    _, found = rescue(corpus.parent / "new", corpus)
    assert found == contents(corpus)


def test_new_shards_are_as_large_as_the_old_or_as_asked(corpus: Path, tmp_path: Path) -> None:
    rescue(tmp_path / "as_before", corpus)
    assert len(list((tmp_path / "as_before").rglob("*.tar"))) <= len(list(corpus.rglob("*.tar")))
    rescue(tmp_path / "one", corpus, shard_bytes=1_000_000)
    assert len(list((tmp_path / "one").rglob("*.tar"))) == 1


@pytest.mark.slow
def test_processes_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    row = rows(corpus)["0004"]
    change(corpus / row["shard"], row["image_offset"] + 3, b"??")
    rescue(tmp_path / "one", corpus)
    repair(find_shards([corpus]), tmp_path / "three", 3)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_a_full_disk_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="no space left"):
            repair(find_shards([corpus]), tmp_path / "new", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.unfinished").exists()


def test_texts_that_no_table_can_hold_stay_in_their_records(tmp_path: Path) -> None:
    half = json.dumps(record(0, licence="\ud83d", labels={"\ud83d": "\ud83d"}, title="\ud83d")).encode()
    path = tar_of(tmp_path / "a.tar", [pair(0)[0], ("0000.json", half), *pair(1)])
    _, found = rescue(tmp_path / "new", path)
    assert found["0000"][1] == half
    assert ShardIndex.open(tmp_path / "new").record(0)["title"] == "\ud83d"
    assert ShardIndex.open(tmp_path / "new").labels("\\ud83d") == ["\\ud83d", ""]


def features(out: Path) -> Path:
    """A corpus of features, as of videos."""
    out.mkdir()
    writer = ShardWriter(out, 8000, ["train"], [])
    for number in range(6):
        data = io.BytesIO()
        np.save(data, np.full((3, 40 + number), number, dtype=np.float32))
        told = record(number, sha256=hashlib.sha256(data.getvalue()).hexdigest(), width=None, height=None)
        writer.write(data.getvalue(), "npy", told)
    writer.close()
    return out


@pytest.mark.parametrize("bare", [False, True])
def test_features_are_samples_too(tmp_path: Path, bare: bool) -> None:
    corpus = features(tmp_path / "corpus")
    truth, row = contents(corpus), rows(corpus)
    if bare:
        for name in ("manifest.json", "index.parquet"):
            (corpus / name).unlink()
    assert check(find_shards([corpus], decode=True), 1).findings == []
    place = row["0002"]
    change(corpus / place["shard"], place["image_offset"] + 200, b"??")
    change(corpus / row["0004"]["shard"], row["0004"]["image_offset"] - 512, bytes(100))
    assert {f.key for f in check(find_shards([corpus]), 1).findings} >= {"0002", "0004"}
    _, found = rescue(tmp_path / "new", corpus)
    assert found == (without(truth, "0002", "0004") if bare else without(truth, "0002"))
    assert describe(tmp_path / "new", 10, 0)["pictures"]["width"] == {}


def test_what_the_manifest_notes_is_kept_and_no_sample_comes_in(corpus: Path, tmp_path: Path) -> None:
    truth = contents(corpus)
    manifest = json.loads((corpus / "manifest.json").read_text()) | {"checked": {"sets": ["coco"]}}
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    shard = sorted(corpus.rglob("*.tar"))[0]
    with tarfile.open(shard, "a") as tar:
        for name, part in pair(99):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
    _, found = rescue(tmp_path / "new", corpus)
    assert found == truth
    assert lost(tmp_path / "new") == {"0099": "unindexed"}
    made = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert made["checked"] == {"sets": ["coco"]}
    assert made["samples"] == 12
