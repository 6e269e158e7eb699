"""The watchdog: who is named when nobody gets on, and no alarm while somebody does."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from learning.training import watchdog
from learning.training.watchdog import FIRST_STEP_FACTOR, Heartbeat, Place, Watchdog, read_heartbeat
from stages import training_run
from stages.pretrain import Config, run
from tests.pipeline_harness import TINY, tandem, tandem_json, write_recipe
from tests.survival_case import clip_values, end, slow_down, start, wait_for_step
from tests.training_case import logs, make_job, write_corpus

LIMIT_S = 40.0


def beat_of(rank: int, beat: int = 1, phase: str = "agree", entered: int = 21, **more: object) -> Heartbeat:
    place = Place(phase, 8, ("a", "b"), entered, first_step=1)
    return replace(Heartbeat(rank, f"host{rank}", beat, place, 0, "loop.py:9 f", False), **more)  # type: ignore[arg-type]


class Cluster:
    """Heartbeats of several ranks, and the watchdog of rank 0, looked at as time goes by."""

    def __init__(self, directory: Path, ranks: int = 3):
        self.dog = Watchdog(directory, LIMIT_S, pytest.fail, rank=0, world_size=ranks)
        self.beats = [beat_of(rank) for rank in range(ranks)]
        self.now = self.dog._last_tick = 1000.0

    def change(self, rank: int, **changed: object) -> None:
        self.beats[rank] = replace(self.beats[rank], **changed)  # type: ignore[arg-type]

    def wait(self, seconds: float, frozen: tuple[int, ...] = ()) -> tuple[int, str] | None:
        """Every beat of these seconds; the frozen ranks write none."""
        until = self.now + seconds
        while self.now < until:
            self.now += self.dog.beat_s
            for rank, beat in enumerate(self.beats):
                if rank not in frozen:
                    self.beats[rank] = replace(beat, beat=beat.beat + 1)
                path = watchdog.heartbeat_path(self.dog.directory, rank)
                told = {**vars(self.beats[rank]), "place": vars(self.beats[rank].place), "unix_s": 0.0}
                path.write_text(json.dumps(told))
            named = self.dog.tick(self.beats[0], self.now)
            if named is not None:
                return named
        return None


def test_a_frozen_rank_is_named_by_its_silence(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    ahead = replace(cluster.beats[2].place, entered=23)
    cluster.change(2, place=ahead)  # a rank that froze may have been ahead of the others
    assert cluster.wait(LIMIT_S - 6, frozen=(2,)) is None
    named = cluster.wait(12, frozen=(2,))
    assert named is not None
    rank, message = named
    assert rank == 2
    assert message == (
        "on host host2 gives no sign of life: it is frozen or dead; last seen in phase 'agree' of step 8 "
        "(at loop.py:9 f, samples a … b); no rank has got on for 40 s; "
        "rank 0 waits in phase 'agree' of step 8, with 1 more"
    )


def test_the_rank_that_entered_fewest_phases_is_named(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.change(1, place=replace(cluster.beats[1].place, phase="load", entered=20))
    named = cluster.wait(LIMIT_S + 6)
    assert named is not None
    assert named[0] == 1
    assert named[1].startswith("on host host1 stands still in phase 'load' of step 8 (at loop.py:9 f")


def test_of_ranks_in_one_phase_the_one_that_waits_for_nobody_is_named(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for rank in (0, 2):
        cluster.change(rank, in_collective=True)
    named = cluster.wait(LIMIT_S + 6)
    assert named is not None
    assert named[0] == 1
    cluster.change(1, in_collective=True)
    cluster.dog._seen = None
    named = cluster.wait(LIMIT_S + 12)
    assert named is not None
    assert "none is behind, so look at the network" in named[1]


def test_a_missing_heartbeat_is_named(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.dog.world_size = 4
    named = cluster.wait(LIMIT_S + 6)
    assert named is not None
    assert named == (3, f"no rank has got on for 40 s; rank 3 left no heartbeat in {tmp_path}")


def test_no_alarm_while_any_rank_gets_on(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for _ in range(8):  # rank 1 writes a long checkpoint, the others wait for it
        assert cluster.wait(LIMIT_S / 3) is None
        cluster.change(1, signs=cluster.beats[1].signs + 1)
    assert cluster.wait(LIMIT_S * 1.6) is not None


def test_the_first_step_may_take_longer_and_a_suspended_job_is_no_stall(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for rank in range(3):
        cluster.change(rank, place=replace(cluster.beats[rank].place, first_step=8))
    assert cluster.wait(LIMIT_S * (FIRST_STEP_FACTOR - 0.3)) is None
    assert cluster.wait(LIMIT_S) is not None
    cluster = Cluster(tmp_path)
    assert cluster.wait(LIMIT_S * 0.4) is None
    cluster.now += 100 * LIMIT_S  # nobody ran meanwhile
    assert cluster.wait(LIMIT_S * 0.25) is None


def test_a_heartbeat_says_where_the_main_thread_is(tmp_path: Path) -> None:
    with Watchdog(tmp_path, None, pytest.fail, rank=1, world_size=2) as dog:
        watchdog.enter("load", 4, ["k1", "k2", "k3"])
        watchdog.enter("agree")
        watchdog.alive()
        signs = dog.beat().signs
        beat = read_heartbeat(tmp_path, 1)
        assert beat is not None
        assert beat.place == Place("agree", 4, ("k1", "k3"), entered=2, first_step=4)
        assert (beat.rank, beat.signs, beat.host) == (1, signs, os.uname().nodename)
        assert "test_watchdog.py" in beat.frame or "watchdog.py" in beat.frame
        assert not beat.in_collective
    assert not list(tmp_path.iterdir())  # what ended well leaves nothing
    (tmp_path / "heartbeat_rank0.json").write_text('{"rank": 0')
    assert read_heartbeat(tmp_path, 0) is None


# -------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_frozen_process_is_named_within_the_limit(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    values = clip_values(epochs=1000, stall_limit_s=4.0, checkpoint={"every_steps": 1000})
    processes = start(tmp_path / "a", corpus, values, step_s=0.3)
    try:
        wait_for_step(tmp_path / "a", rank=1, step=3)
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert processes[0].wait(60) == 76, logs(tmp_path / "a")
        took = time.monotonic() - began
    finally:
        end(processes, timeout_s=0)
    text = (tmp_path / "a/test_rank0.log").read_text()
    assert "error: rank 1: on host " in text
    assert "gives no sign of life: it is frozen or dead; last seen in phase '" in text
    assert "samples train0" in text
    assert "no rank has got on for 4 s; rank 0 waits in phase '" in text
    assert "Thread 0x" in text and "loop.py" in text  # the stacks of this rank's threads
    assert took < 30, took  # 4 s, and what a busy machine adds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_loader_that_hangs_is_named_with_its_samples(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    values = clip_values(epochs=1000, stall_limit_s=4.0, checkpoint={"every_steps": 1000})
    processes = start(tmp_path / "a", corpus, values, step_s=0.0, hang_step=5)
    codes = end(processes)
    text = logs(tmp_path / "a")
    assert 76 in codes, text
    assert "error: rank 1: on host " in text
    assert "stands still in phase 'load' of step 5 (at prefetch.py:" in text
    assert "samples train0" in text
    assert "error: rank 0:" not in text


@pytest.mark.slow
def test_a_validation_and_a_save_longer_than_the_limit_raise_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of a validation and each part of a file is a sign of life."""
    from learning.evaluation import embed
    from learning.training import checkpoint_files

    corpus = write_corpus(tmp_path / "shard/out", {"train": 19, "val": 6})
    spread, write = embed.spread, checkpoint_files._Hashing.write
    written: list[float] = []

    def slow_spread(count: int, block: int, compute, advance=None):  # type: ignore[no-untyped-def]
        def slow(first: int, last: int):  # type: ignore[no-untyped-def]
            time.sleep(0.5)
            return compute(first, last)

        return spread(count, block, slow, advance)

    def slow_write(self: checkpoint_files._Hashing, data: object) -> int:
        if len(written) < 6:
            written.append(time.monotonic())
            time.sleep(0.5)
        return write(self, data)

    monkeypatch.setattr(embed, "spread", slow_spread)
    monkeypatch.setattr(checkpoint_files._Hashing, "write", slow_write)
    slow_down(0.0)
    values = clip_values(epochs=1, stall_limit_s=2.0, validate={"split": "val", "batch": 1})
    job = make_job(tmp_path / "a", corpus)
    named: list[tuple[int, str]] = []
    job.stalled = lambda rank, message: named.append((rank, message))
    began = time.monotonic()
    run(Config(**values), job)
    assert named == []
    assert time.monotonic() - began > 6
    assert len(written) == 6


@pytest.mark.slow
def test_the_runner_tells_who_stood_still(tmp_path: Path) -> None:
    text = TINY.replace("weights: train}, epochs: 1", "weights: train}, epochs: 1, fail: stall, fail_rank: 1")
    write_recipe(tmp_path, text)
    failed = tandem("run", "tiny.yaml", cwd=tmp_path, code=76)
    told = "on host here stands still in phase 'load' of step 1"
    assert f"stage tune stalled: rank 0, exit code 76: {told}" in failed.stdout
    states = {row["stage"]: row for row in tandem_json("status", "tiny.yaml", cwd=tmp_path)["stages"]}
    assert (states["tune"]["state"], states["tune"]["error_rank"]) == ("failed", 0)
    assert states["tune"]["error"] == told
    assert tandem_json("run", "tiny.yaml", cwd=tmp_path)["ran"] == ["tune"]  # the same command goes on


def test_torchs_own_limit_comes_after_the_watchdogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def init(timeout_s: float) -> None:
        asked.append(timeout_s)
        raise ValueError("far enough")

    monkeypatch.setattr(training_run.distributed, "init", init)
    for limit_s in (600.0, 3600.0, None):
        with pytest.raises(ValueError, match="far enough"):
            run(Config(**clip_values(stall_limit_s=limit_s)), make_job(tmp_path, tmp_path))
    assert asked[0] > FIRST_STEP_FACTOR * 600
    assert asked[1] > FIRST_STEP_FACTOR * 3600
    assert asked[2] == 1800.0
