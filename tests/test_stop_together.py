"""A signal to one rank, or the clock: all ranks save and stop at the same step, in time."""

import json
import signal
import time
from pathlib import Path

import pytest

from learning.training.deadline import LEAVE_S, MARGIN, WRITE_BYTES_PER_S, Deadline
from pipeline import stop_time
from pipeline.worker import StopFlag
from stages.base import StageError
from tests.pipeline_harness import TINY, tandem, tandem_json, write_recipe
from tests.survival_case import clip_values, end, start, wait_for_step
from tests.training_case import logs, write_corpus


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13_800), ("90m", 5_400), ("1d2h", 93_600), ("45s", 45), ("1h0m1s", 3_601)]
)
def test_durations(text: str, seconds: float) -> None:
    assert stop_time.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "3h 50m", "50m3h", "-5m", "1.5h", "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(StageError, match=r"--stop-after: '.*' is no duration; write 3h50m, 90m, 1d2h or 45s"):
        stop_time.seconds_of(text)


def test_the_earlier_of_option_and_environment_counts() -> None:
    now = time.time()
    assert stop_time.stop_at(None, {}) is None
    assert stop_time.stop_at(None, {stop_time.VARIABLE: "12.5"}) == 12.5
    assert stop_time.stop_at("1h", {stop_time.VARIABLE: str(now + 60)}) == pytest.approx(now + 60)
    assert stop_time.stop_at("1m", {stop_time.VARIABLE: str(now + 3600)}) == pytest.approx(now + 60, abs=5)
    with pytest.raises(StageError, match="TANDEM_STOP_AT: 'soon' is no time; give unix seconds"):
        stop_time.stop_at(None, {stop_time.VARIABLE: "soon"})


def test_the_flag_is_set_by_the_clock() -> None:
    flag = StopFlag()
    assert not flag()
    flag.stop_at = time.time() + 3600
    assert not flag()
    flag.stop_at = time.time() - 1
    assert flag()


def test_a_step_a_validation_and_a_save_must_fit() -> None:
    now = [1000.0]
    deadline = Deadline(1000.0 + 100.0, checkpoint_bytes=10 * WRITE_BYTES_PER_S, clock=lambda: now[0])
    assert not deadline.due(validates=False)
    now[0] = 1100.0 - LEAVE_S - MARGIN * 10.0  # a first save: what its bytes are expected to take
    assert deadline.due(validates=False)
    deadline.took("save", 3.0)
    deadline.took("step", 1.0)
    assert not deadline.due(validates=False)
    deadline.took("validate", 20.0)
    assert deadline.due(validates=True)
    assert not deadline.due(validates=False)
    now[0] = 1100.0 - LEAVE_S - MARGIN * 4.0
    assert deadline.due(validates=False)
    assert not Deadline(None, 10**15).due(validates=True)


# -------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ranks_stop_at_one_step_by_the_clock_and_by_a_signal_to_one(tmp_path: Path) -> None:
    """Rank 1 alone knows the clock; then rank 1 alone gets USR2. The same directory goes on each time."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    directory = tmp_path / "a"
    values = clip_values(epochs=1000, checkpoint={"every_steps": 1000})
    processes = start(directory, corpus, values, step_s=0.2, stop_in=LEAVE_S + 10.0)
    assert end(processes) == [75, 75], logs(directory)
    steps = _stopped_steps(directory)
    assert steps[0] == steps[1] >= 1
    assert [p.name for p in (directory / "checkpoints").glob("step_*")] == [f"step_{steps[0]:08d}"]

    processes = start(directory, corpus, values, step_s=0.2)
    wait_for_step(directory, rank=1, step=steps[0] + 3)
    processes[1].send_signal(signal.SIGUSR2)
    assert end(processes) == [75, 75], logs(directory)
    again = _stopped_steps(directory)
    assert again[0] == again[1] >= steps[0] + 2
    assert f"going on at step {steps[0]} " in logs(directory)
    newest = max((directory / "checkpoints").glob("step_*"))
    assert json.loads((newest / "position.json").read_text())["step"] == again[0]


def _stopped_steps(directory: Path) -> list[int]:
    """The step that each rank says it stopped after, the last time."""
    last = []
    for rank in range(2):
        text = (directory / f"test_rank{rank}.log").read_text()
        last.append(int(text.rpartition("stopped after step ")[2].split(";")[0]))
    return last


@pytest.mark.slow
def test_a_run_stops_after_its_time_and_goes_on(tmp_path: Path) -> None:
    write_recipe(tmp_path, TINY.replace("epochs: 2}", "epochs: 100, step_s: 0.1}"))
    stopped = tandem("run", "tiny.yaml", "--stop-after", "12s", cwd=tmp_path, code=75)
    assert "run the same command to go on" in stopped.stdout
    states = [row["state"] for row in tandem_json("status", "tiny.yaml", cwd=tmp_path)["stages"]]
    assert states[2] == "waiting"
    assert states[1] in ("stopped", "waiting")
    refused = tandem("stage", "tiny.yaml", "numbers", "--stop-after", "soon", cwd=tmp_path, code=2)
    assert "is no duration" in refused.stderr
