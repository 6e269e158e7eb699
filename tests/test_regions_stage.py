"""The regions stage: a grid on a tiny corpus, by any number of processes and after a kill, and its errors."""

import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from data_tools.regions.store import RegionError, RegionStore, RowFiles
from data_tools.regions.writer import RegionWriter
from data_tools.shards import ShardIndex
from learning.encoders.region_grid import GridConfig, RegionGrid
from learning.evaluation.embed import checked_picture
from stages.base import Report, StageError, Stopped
from stages.regions import UNFINISHED, Config, run
from tests.distributed_harness import run_distributed
from tests.shard_case import files
from tests.training_case import make_job, write_corpus

GRID = {"from": "grid", "name": "resnet10t", "image_px": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("shard") / "out", {"train": 9, "test": 4})


def made(directory: Path, corpus: Path, stop_after: int | None = None, **changed: Any) -> Report:
    directory.mkdir(parents=True, exist_ok=True)
    return run(Config(**{"source": GRID} | changed), make_job(directory, corpus, stop_after))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("regions")
    made(directory, corpus)
    return directory


def test_the_store_has_what_the_grid_gives_of_each_picture(corpus: Path, whole: Path) -> None:
    store, index = RegionStore.open(whole / "out"), ShardIndex.open(corpus)
    rows = store.rows_of(index.keys, index.pictures)
    assert rows.tolist() == list(range(13)) and len(store) == 13 and store.class_count == 1000
    grid = RegionGrid(GridConfig(name="resnet10t", image_px=64), torch.device("cpu"), seed=5)
    for row in (0, 7, 12):
        wanted, found = grid.of(checked_picture(index, row, 10**6)), store.row(row)
        assert found.features.dtype == np.float16
        assert np.array_equal(found.features, wanted.features.astype(np.float16))
        assert np.array_equal(found.positions, wanted.positions)
        assert np.array_equal(found.classes, wanted.classes)
    mapped = np.load(whole / "out" / "features.npy", mmap_mode="r")  # by anyone's tool
    assert mapped.shape == (13, 4, 512) and np.array_equal(mapped[7], store.row(7).features)
    assert not (whole / UNFINISHED).exists()
    part = ShardIndex.open(corpus, "test")
    assert store.rows_of(part.keys, part.pictures).tolist() == [index.keys.index(key) for key in part.keys]
    assert store.rows_of(["nobody"], ["0"]).tolist() == [-1]


def _one_rank(rank: int, world_size: int, directory: str, corpus: str, log: str) -> dict[str, int]:
    _count_rows(Path(log) / str(rank))
    return made(Path(directory), Path(corpus)).counts


def _count_rows(log: Path, kill_at: int | None = None) -> None:
    """Note each row that is written; or die in the middle of one."""
    wrote = RowFiles.write

    def write(self: RowFiles, row: int, data: dict[str, bytes]) -> None:
        with log.open("a") as file:
            file.write(f"{row}\n")
        if row == kill_at:
            wrote(self, row, data | {"classes": data["classes"][:3]})
            os.kill(os.getpid(), signal.SIGKILL)
        wrote(self, row, data)

    RowFiles.write = write  # type: ignore[method-assign]


def _killed(directory: Path, corpus: Path, log: Path) -> None:
    _count_rows(log, kill_at=6)
    made(directory, corpus)


@pytest.mark.slow
def test_a_kill_and_another_number_of_processes_change_no_bit(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_killed, args=(tmp_path / "stage", corpus, tmp_path / "killed")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "stage" / "out" / "manifest.json").exists()
    found = run_distributed(_one_rank, 2, str(tmp_path / "stage"), str(corpus), str(tmp_path))
    assert found[0] == found[1] and found[0]["with_regions"] == 13
    assert files(tmp_path / "stage" / "out") == files(whole / "out")
    assert (tmp_path / "killed").read_text().split() == [str(row) for row in range(7)]
    # 6 was half written; what was whole before was not computed again
    again = [sorted(map(int, (tmp_path / str(rank)).read_text().split())) for rank in range(2)]
    assert again == [[6, 8, 10, 12], [7, 9, 11]]


def test_a_stop_keeps_what_is_done_and_a_kill_at_the_end_costs_nothing(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        made(tmp_path, corpus, stop_after=5)
    written: list[int] = []
    wrote = RowFiles.write
    monkeypatch.setattr(
        RowFiles, "write", lambda self, row, data: (written.append(row), wrote(self, row, data))
    )
    made(tmp_path, corpus)
    assert written == list(range(5, 13))
    made(tmp_path, corpus)  # as after a kill between the rename and DONE.json
    assert written == list(range(5, 13))
    assert files(tmp_path / "out") == files(whole / "out")


def test_pictures_that_cannot_be_read_are_told_and_too_many_stop_it(tmp_path: Path) -> None:
    bad = write_corpus(tmp_path / "shard" / "out", {"train": 8}, {2: b"no picture", 5: b""})
    with pytest.raises(
        StageError, match=r"2 of 8 samples have no regions, max_missing_share allows 0: train0002"
    ):
        made(tmp_path / "a", bad)
    report = made(tmp_path / "b", bad, max_missing_share=0.25, dtype="float32")
    assert report.counts["missing_unreadable"] == 2 and report.counts["with_regions"] == 6
    told = pq.read_table(tmp_path / "b" / "out" / "missing.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in told] == [
        ("train0002", "unreadable"),
        ("train0005", "unreadable"),
    ]
    store, index = RegionStore.open(tmp_path / "b" / "out"), ShardIndex.open(bad)
    assert store.rows_of(index.keys, index.pictures).tolist() == [0, 1, -1, 3, 4, -1, 6, 7]
    assert store.row(0).features.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("features.npy", lambda data: data[:-1], r"features\.npy: has \d+ bytes, not"),
        ("sums.npy", lambda data: data[:-1] + b"\0", r"sums\.npy: damaged: its sha256"),
        ("keys.parquet", None, r"keys\.parquet: is missing"),
        ("manifest.json", lambda data: data[:40], r"manifest\.json: cannot be read"),
        ("manifest.json", None, "not the out/ of a finished regions stage"),
        (
            "manifest.json",
            lambda data: data.replace(b'"format": 1', b'"format": 9'),
            "format: 9; this version",
        ),
    ],
)
def test_a_store_that_is_not_whole_is_named(
    whole: Path, tmp_path: Path, name: str, change: Any, says: str
) -> None:
    for path in (whole / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(RegionError, match=says):
        RegionStore.open(tmp_path)


def test_numbers_that_cannot_be_kept_are_refused(corpus: Path, whole: Path, tmp_path: Path) -> None:
    for path in (whole / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store = RegionStore.open(tmp_path)
    good = store.row(0)

    def changed(name: str, place: Any, value: float) -> Any:
        array = getattr(good, name).astype(np.float64)
        array[place] = value
        return replace(good, **{name: array})

    with RegionWriter(tmp_path, store.layout) as writer:
        for wrong, says in (
            (changed("features", (1, 2), np.nan), "features: not all of them are finite"),
            (changed("features", (1, 2), 1e6), r"features: 1e\+06 is too large for float16; set dtype"),
            (changed("positions", (0, 2), 1.2), "outside the picture"),
            (changed("positions", (0, 2), -0.1), "outside the picture|wrong way round"),
            (changed("positions", (0, 4), 0.5), "share of the picture"),
            (replace(good, features=good.features[:3]), r"features of the shape \(3, 512\), not \(4, 512\)"),
        ):
            with pytest.raises(RegionError, match=says):
                writer.write(0, wrong)
        assert writer.is_whole(0)  # nothing was written


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"from": "detectron"}, "'grid'"),
        ({"from": "grid"}, "name"),
        ({"from": "files", "layout": "npy", "parts": [{"features": "a.npy"}]}, r"parts\.0\.ids: missing"),
        (
            {"from": "files", "layout": "npy", "parts": [{"features": "a.npy", "ids": "a.txt"}]},
            r"parts\.0\.boxes: missing; .* positions: none",
        ),
        (
            {"from": "files", "layout": "tsv", "parts": [{"features": "a.tsv", "boxes": "b.npy"}]},
            r"parts\.0\.boxes: says nothing in layout tsv",
        ),
        (
            {"from": "files", "layout": "tsv", "parts": [{"features": "a"}], "columns": ["image_id"]},
            "columns: 'image_w' must stand there once",
        ),
        (
            {"from": "files", "layout": "tsv", "parts": [{"features": "a"}], "id": "(x"},
            "no regular expression",
        ),
        ({"from": "files", "layout": "tsv", "parts": [{"features": "a"}], "id": "x"}, r"no group \(\?P<id>"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(source: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Config.model_validate({"source": source, "inputs": {"corpus": "shard"}})


def test_the_files_of_a_source_count_and_the_manifest_says_how_it_was_made(whole: Path) -> None:
    config = Config.model_validate({"source": GRID | {"weights": "w.pth"}, "inputs": {"corpus": "shard"}})
    assert config.files() == {"source.weights": Path("w.pth")}
    parts = [
        {"features": "a.npy", "ids": "a.txt", "boxes": "b.npy"},
        {"features": "c.npy", "ids": "c.txt", "boxes": "d"},
    ]
    source = {"from": "files", "layout": "npy", "parts": parts, "class_names": "n.txt"}
    config = Config.model_validate({"source": source, "inputs": {"corpus": "shard"}})
    assert set(config.files()) == {
        *(f"source.parts.{part}.{name}" for part in (0, 1) for name in ("features", "ids", "boxes")),
        "source.class_names",
    }
    assert json.loads((whole / "out" / "manifest.json").read_text())["source"]["from"] == "grid"
