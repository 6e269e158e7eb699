"""Runs of tiny stages in real processes: order, reuse, failures, signals and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs
from pipeline.events import Channel, Inbox
from pipeline.launch import environment
from pipeline.worker import disk_full_message
from tests import pipeline_harness
from tests.pipeline_harness import TINY, alive, start, tandem, tandem_json, wait_for, write_recipe


def directories(cwd: Path, *arguments: str) -> dict[str, Path]:
    plan = tandem_json("plan", "tiny.yaml", *arguments, cwd=cwd)
    return {stage["stage"]: Path(stage["directory"]) for stage in plan["stages"]}


def totals(cwd: Path) -> dict[str, Any]:
    stages: dict[str, Any] = tandem_json("results", "tiny.yaml", cwd=cwd)["stages"]
    return stages


def test_run_reuse_and_rerun_of_what_changed(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = tandem_json("run", "tiny.yaml", cwd=tmp_path)
    assert (first["ran"], first["reused"]) == (["numbers", "train", "tune"], [])
    began = time.monotonic()
    second = tandem_json("run", "tiny.yaml", cwd=tmp_path)
    assert (second["ran"], second["reused"]) == ([], ["numbers", "train", "tune"])
    assert time.monotonic() - began < 10
    third = tandem_json("run", "tiny.yaml", "--set", "stages.tune.epochs=3", cwd=tmp_path)
    assert (third["ran"], third["reused"]) == (["tune"], ["numbers", "train"])
    compared = tandem_json("compare", "tiny.yaml", "--runs", cwd=tmp_path)
    assert compared["settings"] == {"tune.epochs": [1, 3]}
    assert compared["metrics"]["eval/tiny/i2t_r@1"] == [10.0, 30.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "parts"),
    [
        (
            "crash",
            1,
            ["stage tune failed: rank 1, exit code 1: RuntimeError: the loss is not finite", "Traceback"],
        ),
        ("value", 1, ["rank 1, exit code 1: ValueError: queue: 7 is not a multiple of 4"]),
        ("kill", 1, ["rank 1, exit code -9: killed by SIGKILL (out of memory?)"]),
        ("exit", 1, ["rank 1, exit code 9: ended with exit code 9"]),
        ("user", 2, ["tune: stages.train.data: shard.tar is damaged; make it again"]),
        ("disk", 2, ["tune: no disk space left", "MiB free", "make room and run again"]),
    ],
)
def test_a_failure_names_rank_and_reason_and_the_same_command_goes_on(
    tmp_path: Path, how: str, code: int, parts: list[str]
) -> None:
    text = TINY.replace(
        "weights: train}, epochs: 1", f"weights: train}}, epochs: 1, fail: {how}, fail_rank: 1, fail_step: 3"
    )
    write_recipe(tmp_path, text)
    failed = tandem("run", "tiny.yaml", cwd=tmp_path, code=code)
    for part in parts:
        assert part in failed.stdout, failed.stdout
    tune = directories(tmp_path)["tune"]
    assert not (tune / "DONE.json").exists()
    if how in ("crash", "value"):
        assert "Traceback" in (tune / "log" / "rank1.log").read_text()
    if how == "crash":  # what the failed rank had started is gone too
        assert not alive(int((tune / "checkpoints" / "child.pid").read_text()))
    states = {row["stage"]: row for row in tandem_json("status", "tiny.yaml", cwd=tmp_path)["stages"]}
    assert [states[name]["state"] for name in ("numbers", "train", "tune")] == ["done", "done", "failed"]
    assert states["tune"]["error_rank"] == 1
    assert parts[0].split(": ", 2)[-1].split(" (")[0] in states["tune"]["error"]
    shown = tandem("status", "tiny.yaml", cwd=tmp_path).stdout
    assert shown.startswith("tune failed: rank 1: ")
    again = tandem_json("run", "tiny.yaml", cwd=tmp_path)  # it fails once only
    assert (again["ran"], again["reused"]) == (["tune"], ["numbers", "train"])
    assert "rank 1 starts at step 2" in (tune / "log" / "rank1.log").read_text()
    assert totals(tmp_path)["tune"]["eval/tiny/i2t_r@1"] == 10.0
    assert not logs.read_errors(tune)


SLOW = TINY.replace("epochs: 2}", "epochs: 10, step_s: 0.1}")


def _started(tmp_path: Path) -> "tuple[subprocess.Popen[str], Path]":
    """A run that is in the middle of `train`, and that stage's directory."""
    write_recipe(tmp_path, SLOW)
    train = directories(tmp_path)["train"]
    process = start("run", "tiny.yaml", cwd=tmp_path)
    saved = [train / "checkpoints" / f"rank{rank}.txt" for rank in range(2)]
    wait_for(lambda: all(path.exists() for path in saved))
    return process, train


def _pids(directory: Path) -> list[int]:
    """The processes that work under the root that the directory is in."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if "pipeline.worker" in command and str(directory.parents[2]) in command:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_killed_runner_leaves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    process, train = _started(tmp_path)
    workers = _pids(train)
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers), timeout_s=5)
    assert not (train / "DONE.json").exists()
    again = tandem_json("run", "tiny.yaml", cwd=tmp_path)
    assert again["reused"] == ["numbers"]
    assert (train / "log" / "rank0.log").read_text().count("rank 0 starts at step") == 2
    assert totals(tmp_path)["train"]["eval/tiny/i2t_r@1"] == 100.0
    rows = [json.loads(line)["step"] for line in (train / "log" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 41))  # no step twice, none lost
    assert len((train / "log" / "starts.log").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_killed_worker_takes_its_children_along(tmp_path: Path) -> None:
    process, train = _started(tmp_path)
    os.kill(_pids(train)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed by SIGKILL" in output
    assert not _pids(train)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    process, _ = _started(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped in train; run the same command to go on" in output
    states = {
        row["stage"]: row["state"] for row in tandem_json("status", "tiny.yaml", cwd=tmp_path)["stages"]
    }
    assert states == {"numbers": "done", "train": "stopped", "tune": "waiting"}
    plan = {s["stage"]: s for s in tandem_json("plan", "tiny.yaml", cwd=tmp_path)["stages"]}
    assert (plan["train"]["action"], plan["train"]["why"]) == ("resume", "an earlier run did not finish it")
    assert tandem_json("run", "tiny.yaml", cwd=tmp_path)["ran"] == ["train", "tune"]


@pytest.mark.slow
def test_a_second_runner_is_refused(tmp_path: Path) -> None:
    process, train = _started(tmp_path)
    try:
        refused = tandem("run", "tiny.yaml", cwd=tmp_path, code=2)
        holder = json.loads((train / "lock").read_text())
        assert f"process {holder['pid']} on host {holder['host']} works on this stage" in refused.stderr
        assert holder["pid"] in _pids(train)
        wait_for(lambda: json.loads((train / "log" / "progress.json").read_text())["completed"] > 0)
        row = tandem_json("status", "tiny.yaml", cwd=tmp_path)["stages"][1]
        assert row["state"] == "running"
        assert row["step"] > 0
        assert row["seconds_left"] > 0
        other = tandem_json("run", "tiny.yaml", "--set", "stages.train.epochs=1", cwd=tmp_path)
        assert other["ran"] == ["train", "tune"]  # another fingerprint is another directory
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_a_recipe_that_changed_under_way_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline.worker",
            "tiny.yaml",
            "--stage",
            "numbers",
            "--fingerprint",
            "0" * 64,
        ],
        cwd=tmp_path,
        env=pipeline_harness.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "changed since the run began" in done.stdout


def test_the_killed_rank_is_the_cause_and_then_the_earliest(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for record in (
        logs.ErrorRecord(0, 1, "connection closed by peer", 10.0),
        logs.ErrorRecord(1, 1, "the loss is not finite", 9.0),
        logs.ErrorRecord(2, -9, "killed", 11.0, 9),
    ):
        logs.write_error(tmp_path, record)
    assert [record.rank for record in logs.read_errors(tmp_path)] == [2, 1, 0]


def test_events_are_dropped_not_waited_for_when_nobody_reads() -> None:
    inbox = Inbox()
    channel = Channel(os.dup(inbox.write_end))
    began = time.monotonic()
    sent = [channel.send("progress", message="x" * 1000) for _ in range(200)]
    assert time.monotonic() - began < 1
    assert sent[0]
    assert not sent[-1]
    assert len(list(inbox.messages(0.1))) == sum(sent)
    assert channel.send("error", message="y" * 100_000)  # cut to what fits
    assert len(next(inbox.messages(0.1))["message"]) < 600
    inbox.close()


def test_disk_full_is_found_behind_other_errors(tmp_path: Path) -> None:
    try:
        try:
            with Path("/dev/full").open("w") as stream:
                stream.write("x")
        except OSError as cause:
            raise RuntimeError("the writer failed") from cause
    except RuntimeError as error:
        message = disk_full_message(error, tmp_path)
    assert message is not None
    assert "MiB free" in message
    assert disk_full_message(ValueError("x"), tmp_path) is None


def test_children_find_a_quiet_offline_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = environment(threads=3, distributed=True)
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["DS_ACCELERATOR"] == "cpu"
    assert found["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # what the user has set stays
    assert "HF_HUB_OFFLINE" not in environment(threads=1, distributed=False)
