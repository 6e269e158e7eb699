"""The ingest stage: several sources make one table; what does not fit is told; files are fingerprinted."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.corpora import tables
from data_tools.corpora.tables import PAIRS
from data_tools.shards import ShardIndex
from learning.evaluation.gallery import gallery_of
from pipeline.fingerprint import absent_message, identities
from pipeline.recipe import load
from stages.base import StageError, Stopped
from stages.crawl import LocalSiteConfig
from stages.ingest import Config, SourceConfig, run
from tests.corpora_case import write
from tests.data_helpers import make_job

COCO = "http://pictures.example/coco/"
CC3M: dict[str, Any] = {"format": "cc3m", "files": {"pairs": "train.tsv"}}
KARPATHY: dict[str, Any] = {"format": "karpathy", "files": {"annotations": "coco.json"}, "images": COCO}
IMAGE = {
    "filepath": "train2014",
    "filename": "COCO_train2014_000000000009.jpg",
    "cocoid": 9,
    "split": "train",
    "sentences": [{"raw": "a meal"}, {"raw": "饭"}, {"raw": ""}],
}


def test_several_sources_make_one_table_in_their_order(tmp_path: Path) -> None:
    write(tmp_path, {"coco.json": {"images": [IMAGE]}, "train.tsv": "a cat\thttp://site.example/1.jpg\n\t\n"})
    job = make_job(tmp_path / "ingest")
    own = {"name": "cc", "lang": "fr", "licence": "ours", "split": "web"}
    report = run(Config(sources=[KARPATHY, CC3M | own]), job)  # type: ignore[arg-type]
    table = pq.read_table(job.out / "pairs.parquet")
    assert table.schema == PAIRS
    coco = {
        "url": f"{COCO}train2014/COCO_train2014_000000000009.jpg",
        "captions": [{"text": "a meal", "lang": "en"}, {"text": "饭", "lang": "en"}],
        "split": "train",
        "licence": "CC-BY-4.0 (COCO's annotations); pictures: their owners' terms at Flickr",
        "source": "karpathy",
    }
    cat = {
        "url": "http://site.example/1.jpg",
        "captions": [{"text": "a cat", "lang": "fr"}],
        "split": "web",
        "licence": "ours",
        "source": "cc",
    }
    rest = {"query": "", "title": "", "content": "", "show": 0, "click": 0, "ctr": None, "classes": []}
    assert table.to_pylist() == [rest | coco, rest | cat]
    assert pq.read_table(job.out / "dropped.parquet").to_pylist() == [
        {
            "source": "karpathy",
            "where": "coco.json: images[0]: caption 2",
            "url": coco["url"],
            "text": "",
            "reason": "no_text",
        },
        {"source": "cc", "where": "train.tsv: line 2", "url": "", "text": "", "reason": "no_picture"},
    ]
    assert {name: n for name, n in report.counts.items() if n} == {
        "rows": 4,
        "kept": 2,
        "captions": 3,
        "pictures": 2,
        "dropped_no_text": 1,
        "dropped_no_picture": 1,
    }
    assert report.metrics["ingest/dropped_no_text"] == 1.0
    assert not (job.directory / "out.unfinished").exists()


def test_the_recipe_s_licence_stands_above_that_of_a_row(tmp_path: Path) -> None:
    write(tmp_path, {"coco.json": {"images": [IMAGE]}})
    job = make_job(tmp_path / "ingest")
    run(Config(sources=[KARPATHY | {"licence": "ours"}]), job)  # type: ignore[arg-type]
    assert pq.read_table(job.out / "pairs.parquet")["licence"].to_pylist() == ["ours"]


def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path, {"train.tsv": "".join(f"text {n}\thttp://site.example/{n % 70}\n\t\n" for n in range(100))}
    )
    config = Config(sources=[CC3M])  # type: ignore[arg-type]
    report = run(config, whole := make_job(tmp_path / "whole"))
    monkeypatch.setattr(tables, "BATCH", 7)
    job = make_job(tmp_path / "parts")
    assert run(config, job) == report
    assert report.counts["pictures"] == 70
    for name in ("pairs.parquet", "dropped.parquet"):
        assert pq.read_table(job.out / name).equals(pq.read_table(whole.out / name))
    assert job.progress.bars["ingest"][0].done == 200  # type: ignore[attr-defined]
    stopping = make_job(tmp_path / "stopping", should_stop=lambda: True)
    with pytest.raises(Stopped):
        run(config, stopping)
    assert not stopping.out.exists()


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"train.tsv": "a cat\thttp://site.example/1.jpg\n", "empty.tsv": "\thttp://site.example/1\n"},
    )
    job = make_job(tmp_path / "ingest")
    empty = CC3M | {"files": {"pairs": "empty.tsv"}, "name": "other"}
    with pytest.raises(StageError, match=r"sources: other: no row is left \(dropped_no_text 1\)"):
        run(Config(sources=[CC3M, empty]), job)  # type: ignore[arg-type]
    assert not job.out.exists()
    with pytest.raises(StageError, match=r"none\.tsv: cannot be opened"):
        run(Config(sources=[CC3M | {"files": {"pairs": "none.tsv"}}]), job)  # type: ignore[arg-type]


def test_pairs_of_sentences_make_a_table_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, {"dev.csv": "一个人,两个人,4.75\n", "OnWN.tsv": "5.0\tone\tother\n1.0\t\tx\n"})
    zh = {"format": "sts_csv", "files": {"dev": "dev.csv"}, "lang": "zh", "name": "stsb-zh"}
    twelve = {"format": "sts_tsv", "files": {"test": ["OnWN.tsv"]}, "licence": "ours"}
    job = make_job(tmp_path / "ingest")
    report = run(Config(sources=[zh, twelve]), job)  # type: ignore[arg-type]
    rows = pq.read_table(job.out / "text_pairs.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("一个人", "两个人", 4.75, "dev", "zh", rows[0]["licence"], "stsb-zh"),
        ("one", "other", 5.0, "test", "en", "ours", "sts_tsv"),
    ]
    assert rows[0]["licence"].startswith("CC-BY-SA-4.0 mostly")
    assert (report.counts["rows"], report.counts["kept"], report.counts["dropped_no_text"]) == (3, 2, 1)
    assert not (job.out / "pairs.parquet").exists()


def video(number: int, split: str, sentences: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    name = f"video{number}"
    return (
        {"category": 9, "url": "https://v.example", "video_id": name, "split": split, "id": number},
        [{"caption": text, "video_id": name, "sen_id": n} for n, text in enumerate(sentences)],
    )


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_msr_vtt_makes_a_corpus_of_features(tmp_path: Path) -> None:
    parts = [
        video(2, "train", ["a man sings", "a man sings", ""]),
        video(0, "validate", ["a dog"]),
        video(1, "train", ["no features"]),
        video(3, "train", []),
    ]
    annotations = {
        "info": {"contributor": "…"},
        "videos": [one for one, _ in parts],
        "sentences": [sentence for _, sentences in parts for sentence in sentences],
    }
    frames = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(
        tmp_path,
        {"info.json": annotations} | {f"resnet152/video{n}.npy": npy(frames + n) for n in (0, 2, 3)},
    )
    source = {"format": "msr_vtt", "files": {"annotations": "info.json", "features": "resnet152"}}
    job = make_job(tmp_path / "ingest")
    report = run(Config(sources=[source]), job)  # type: ignore[arg-type]
    assert {name: n for name, n in report.counts.items() if n} == {
        "rows": 5,
        "kept": 2,
        "captions": 3,
        "shards": 2,
        "dropped_no_text": 2,
        "dropped_no_features": 1,
    }
    index = ShardIndex.open(job.out)
    index.verify()
    assert index.keys == ["video2", "video0"]  # train before validate
    assert np.array_equal(np.load(io.BytesIO(index.image_bytes(0))), frames + 2)
    record = index.record(0)
    assert record["captions"] == [{"text": "a man sings", "lang": "en"}] * 2
    assert record["features"] == {"frames": 3, "width": 4, "dtype": "float32"}
    assert ShardIndex.splits(job.out) == {"train": 1, "validate": 1}
    assert gallery_of(ShardIndex.open(job.out, "validate"), ["captions"]).texts == ["a dog"]
    reasons = pq.read_table(job.out / "dropped.parquet")["reason"].to_pylist()
    assert sorted(reasons) == ["no_features", "no_text", "no_text"]
    again = make_job(tmp_path / "again")
    run(Config(sources=[source]), again)  # type: ignore[arg-type]
    assert (again.out / "manifest.json").read_bytes() == (job.out / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"no array", r"video0\.npy: cannot be read as \.npy"),
        (npy(np.zeros(3, np.float32)), r"video0\.npy: an array of float32 of shape \(3,\)"),
        (npy(np.array([["x"]], object)), r"video0\.npy: cannot be read as \.npy .*allow_pickle"),
    ],
)
def test_features_that_are_no_table_of_numbers_are_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    one, sentences = video(0, "train", ["a dog"])
    write(tmp_path, {"info.json": {"videos": [one], "sentences": sentences}, "f/video0.npy": data})
    source = {"format": "msr_vtt", "files": {"annotations": "info.json", "features": "f"}}
    with pytest.raises(StageError, match=problem):
        run(Config(sources=[source]), make_job(tmp_path / "ingest"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"format": "coco", "files": {}}, "'coco' is no format; there are: cc3m, cc12m"),
        (
            {"format": "karpathy", "files": {"annotation": "x"}, "images": COCO},
            r"'annotation' is no file of the format karpathy; it takes: annotations \(dataset_coco",
        ),
        (CC3M | {"files": {}}, r"files: pairs is missing; cc3m takes: pairs \(Train_GCC-training\.tsv\)"),
        (
            KARPATHY | {"files": {"annotations": ["a", "b"]}},
            "files.annotations: .* takes one file, not a list",
        ),
        (CC3M | {"files": {"pairs": ["x", 3]}}, r"pairs: \['x', 3\] is neither a file nor a list of files"),
        (CC3M | {"files": {"pairs": []}}, "files.pairs: the list is empty"),
        ({"format": "sts_csv", "files": {}}, "files: one is missing; sts_csv takes: train"),
        (KARPATHY | {"images": None}, "images: the format karpathy names pictures by path"),
        (CC3M | {"images": COCO}, "images: the format cc3m does not name pictures by path"),
        (KARPATHY | {"images": "http://coco.example"}, "must start with http:// or https:// and end with /"),
        (KARPATHY | {"first": 3}, "first: no option of the format karpathy"),
        (CC3M | {"file": "x"}, "file"),
    ],
)
def test_a_source_that_does_not_fit_its_format_is_told(source: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SourceConfig(**source)


def test_folders_of_a_local_site_have_names_that_a_url_can_hold() -> None:
    one = LocalSiteConfig(url_prefix="http://a.example/", folder=Path("x"))
    assert one.folders(Path("/r")) == {"": Path("/r/x")}
    for wrong in ({"a/b": "x"}, {"": "x"}, {"a": 3}, 3):
        with pytest.raises(ValueError, match="a name without / and a folder are wanted"):
            LocalSiteConfig(url_prefix="http://a.example/", folder=wrong)  # type: ignore[arg-type]


def test_what_is_given_must_be_one_thing() -> None:
    with pytest.raises(ValueError, match="sources: the list is empty"):
        Config(sources=[])  # type: ignore[arg-type]
    sts = {"format": "sts_tsv", "files": {"test": "x"}}
    with pytest.raises(ValueError, match="cc3m gives pictures, sts_tsv gives text pairs: give each a stage"):
        Config(sources=[CC3M, sts])  # type: ignore[arg-type]


RECIPE = """
name: two
stages:
  coco:
    kind: ingest
    sources:
      - {format: cc12m, files: {pairs: [a.tsv, b.tsv]}}
      - format: karpathy
        files: {annotations: coco.json}
        images: http://coco.example/
"""


def test_every_file_enters_the_fingerprint_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(RECIPE)
    write(tmp_path, {"a.tsv": "x", "b.tsv": "y"})

    def identity() -> Any:
        return identities(load(path), tmp_path)["coco"]

    first = identity()
    names = ["sources.0.files.pairs.0", "sources.0.files.pairs.1", "sources.1.files.annotations"]
    assert list(first.files) == names
    said = absent_message(load(path), first)
    assert "two.yaml:9" in said
    assert "stages.coco.sources.1.files.annotations" in said
    write(tmp_path, {"coco.json": "{}"})
    whole = identity().fingerprint
    assert whole != first.fingerprint
    write(tmp_path, {"b.tsv": "z"})
    assert identity().fingerprint != whole
    write(tmp_path, {"b.tsv": "y", "moved/a.tsv": "x"})
    path.write_text(RECIPE.replace("[a.tsv", "[moved/a.tsv"))
    assert identity().fingerprint == whole
    assert json.loads(json.dumps(first.config))["sources"][0]["files"]["pairs"] == [
        f"<file {name}>" for name in names[:2]
    ]
