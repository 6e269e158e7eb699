"""Commit, damage, retention and a full disk, in one process; tests/test_training.py has the kills."""

import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from learning.training.checkpoint import MANIFEST, Checkpoints, Writer

STATE = {"weights": torch.arange(5000.0)}


def put(directory: Path, writer: Writer) -> None:
    writer.save(STATE, directory / "engine/state.pt")
    writer.text("one", directory / "rank_0.txt")


def save(checkpoints: Checkpoints, step: int) -> str | None:
    return checkpoints.save(step, {"epoch": step // 10}, put, 1000)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.newest() is None
    assert save(checkpoints, 20) is None
    assert save(checkpoints, 100) is None
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.position) == (100, {"epoch": 10, "step": 100})
    state = torch.load(found.directory / "engine/state.pt", weights_only=True)
    assert torch.equal(state["weights"], STATE["weights"])
    files = json.loads((found.directory / MANIFEST).read_text())["files"]
    assert set(files) == {"engine/state.pt", "rank_0.txt", "position.json"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "no_manifest"])
def test_a_damaged_one_is_skipped_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 10)
    save(checkpoints, 20)
    state = tmp_path / "step_00000020/engine/state.pt"
    if damage == "flip":  # the size stays: the hash alone can tell
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "missing":
        state.unlink()
    elif damage == "manifest":
        (tmp_path / "step_00000020" / MANIFEST).write_text("{")
    else:
        (tmp_path / "step_00000020" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert "step_00000020 is damaged and skipped" in caplog.text
    assert ("state.pt" if damage in ("flip", "cut", "missing") else MANIFEST) in caplog.text
    assert save(checkpoints, 20) is None  # the same step again takes the damaged one's place
    again = checkpoints.newest()
    assert again is not None
    assert again.step == 20


def test_leftovers_of_a_kill_are_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 10)
    shutil.copytree(
        tmp_path / "step_00000010", tmp_path / "step_00000030.tmp"
    )  # complete, but never committed
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert names(tmp_path) == ["step_00000010"]


def test_a_failed_write_leaves_the_earlier_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)

    def fail(directory: Path, writer: Writer) -> None:
        writer.save(STATE, directory / "engine/state.pt")
        (directory / "blocked").write_text("a file, not a directory")
        writer.save(STATE, directory / "blocked/state.pt")
        writer.text("never written", directory / "after.txt")
        assert not (directory / "after.txt").exists()

    problem = checkpoints.save(20, {}, fail, 1000)
    assert problem is not None
    assert problem.startswith("rank 0:")
    assert names(tmp_path) == ["step_00000010"]


def test_space_is_looked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 2**20))
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.save(1, {}, put, 2**20) is None
    problem = checkpoints.save(2, {}, put, 100 * 2**20)
    assert problem == "5 MiB are free, about 105 MiB are needed"
    assert names(tmp_path) == ["step_00000001"]
