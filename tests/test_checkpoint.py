"""Commit, damage, retention, a full disk, the background, in one process; kills: tests/test_training.py."""

import json
import logging
import shutil
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learning.training.background import LaterWriter, Staging, snapshot
from learning.training.checkpoint import Checkpoints
from learning.training.checkpoint_files import MANIFEST, Writer

STATE = {"weights": torch.arange(5000.0)}


def put(directory: Path, writer: Writer) -> None:
    writer.save(STATE, directory / "engine/state.pt")
    writer.text("one", directory / "rank_0.txt")


def save(
    checkpoints: Checkpoints,
    step: int,
    write: Callable[[Path, Writer], None] = put,
    expected_bytes: int = 1000,
) -> str | None:
    checkpoints.begin(step, {"epoch": step // 10}, write, expected_bytes)
    settled = checkpoints.settle(wait=True)
    assert settled is not None
    assert settled.step == step
    return settled.problem


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


def test_milestones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, milestone_every_steps=10)
    for step in (4, 8, 12, 16, 20, 24, 33, 36):  # 30 itself is none: the first one after it is spared
        save(checkpoints, step)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (12, 20, 33, 36)]


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


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_write_leaves_the_earlier_one(tmp_path: Path, background: bool) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=background)
    save(checkpoints, 10)

    def fail(directory: Path, writer: Writer) -> None:
        writer.save(STATE, directory / "engine/state.pt")
        (directory / "blocked").write_text("a file, not a directory")
        writer.save(STATE, directory / "blocked/state.pt")
        writer.text("never written", directory / "after.txt")
        assert not (directory / "after.txt").exists()

    problem = save(checkpoints, 20, fail)
    assert problem is not None
    assert problem.startswith("rank 0:")
    assert names(tmp_path) == ["step_00000010"]


def test_space_is_looked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 2**20))
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert save(checkpoints, 1, expected_bytes=2**20) is None
    problem = save(checkpoints, 2, expected_bytes=100 * 2**20)
    assert problem == "5 MiB are free, about 105 MiB are needed"
    assert names(tmp_path) == ["step_00000001"]


class Gate:
    """Holds every file back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, wrote = threading.Event(), Writer._write

        def wait(writer: Writer, path: Path, content: Callable[[object], object]) -> None:
            assert self.opened.wait(30)
            wrote(writer, path, content)

        monkeypatch.setattr(Writer, "_write", wait)


def test_in_the_background_the_state_is_that_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=True)
    save(checkpoints, 10)
    gate = Gate(monkeypatch)
    state = {"weights": torch.arange(10.0), "scale": [1]}
    checkpoints.begin(20, {}, lambda directory, writer: writer.save(state, directory / "state.pt"), 1000)
    assert checkpoints.settle(wait=False) is None  # and training goes on
    state["weights"] += 1
    state["scale"][0] = 7
    assert names(tmp_path) == ["step_00000010", "step_00000020.tmp"]
    gate.opened.set()
    settled = checkpoints.settle(wait=True)
    assert settled is not None
    assert settled.problem is None
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 20
    held = torch.load(found.directory / "state.pt", weights_only=True)
    assert torch.equal(held["weights"], torch.arange(10.0))
    assert held["scale"] == [1]
    assert names(tmp_path) == ["step_00000020"]
    assert checkpoints.settle(wait=True) is None


def test_what_was_begun_and_let_go_is_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=True)
    save(checkpoints, 10)
    gate = Gate(monkeypatch)
    checkpoints.begin(20, {}, put, 1000)
    threading.Timer(0.1, gate.opened.set).start()
    checkpoints.close()
    assert not (tmp_path / "step_00000020.tmp/rank_0.txt").exists()  # all after the first were given up
    found = Checkpoints(tmp_path, keep=1).newest()
    assert found is not None
    assert found.step == 10
    assert names(tmp_path) == ["step_00000010"]


def test_a_snapshot_is_a_copy_with_the_same_ties() -> None:
    flat = torch.arange(6.0)
    state: OrderedDict[str, object] = OrderedDict(
        a=flat[:4].view(2, 2), b=flat[2:], shape=torch.Size([2, 2]), nested=[(flat, {"n": [1]})], none=None
    )
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    taken = snapshot(state, Staging().copy)
    assert taken._metadata == {"": {"version": 2}}
    assert taken["shape"] == torch.Size([2, 2])
    assert isinstance(taken["shape"], torch.Size)
    flat.zero_()
    state["nested"][0][1]["n"].append(2)  # type: ignore[index]
    assert torch.equal(taken["a"], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert taken["nested"][0][1] == {"n": [1]}
    taken["b"][0] = 9
    assert float(taken["a"][1, 0]) == 9  # as in the state, where both are views of one storage
    assert float(taken["nested"][0][0][2]) == 9


def test_the_next_checkpoint_is_copied_into_the_memory_of_the_last(tmp_path: Path) -> None:
    staging, state = Staging(), {"a": torch.arange(5.0), "b": torch.arange(5.0) + 5, "c": torch.ones(3)}
    places = []
    for number in range(3):
        state["a"].fill_(number)
        if number == 2:
            del state["c"]
        writer = LaterWriter(tmp_path, staging)
        writer.save(state, tmp_path / f"{number}.pt")
        state["a"].fill_(-1)  # training goes on before anything is written
        writer.run()
        assert writer.error is None
        written = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert written["a"].tolist() == [number] * 5
        assert written["b"].tolist() == [5, 6, 7, 8, 9]
        places.append({memory.data_ptr() for kept in staging._free.values() for memory in kept})
    assert places[0] == places[1]
    assert places[2] < places[1], "what was not needed any more is let go"
