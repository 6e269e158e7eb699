"""How a start of a job is judged, from files alone: what is tried again, what is given up, and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs, worker
from pipeline.results import RunView
from pipeline.slurm import attempt
from pipeline.slurm.attempt import Ledger, Limits, Start, Verdict
from pipeline.slurm.rank import ranks
from pipeline.slurm.submit import place, sent_jobs
from stages.base import STALLED, StageError

KILLED = """\
srun: error: node2: task 1: Killed
srun: Terminating StepId=7.0
slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-21T10:00:00 ***
srun: error: node1: task 0: Terminated
"""
EXITED = """\
srun: error: node2: task 1: Exited with exit code 1
srun: Terminating StepId=7.0
srun: error: node1: task 0: Killed
"""
MEMORY = "srun: error: node3: tasks 5-7: Out Of Memory\n"


def start(directory: Path, restart: int = 0) -> Start:
    """Begin one, with the files that a stage has."""
    (directory / "log").mkdir(parents=True, exist_ok=True)
    made = Start("7", restart)
    attempt.begin(directory, None, made, Limits())
    return made


def failing(directory: Path, restart: int, message: str, step: int, code: int = 1, **limits: int) -> Verdict:
    """A start that ends with an error of rank 1 after `step`."""
    made = start(directory, restart)
    (directory / "log/metrics.jsonl").write_text(json.dumps({"step": step, "loss/total": 1.0}) + "\n")
    logs.write_error(directory, logs.ErrorRecord(1, code, message, time=1.0))
    return attempt.end(directory, None, made, Limits(**limits), srun_code=1)


def test_a_crash_is_tried_again_the_same_one_at_the_same_step_is_not(tmp_path: Path) -> None:
    first = failing(tmp_path, 0, "ConnectionError: peer [10.0.0.1]:4711 closed", 12)
    assert (first.code, first.how, first.rank, first.step) == (worker.STOPPED, "failed", 1, 12)
    elsewhere = failing(tmp_path, 1, "ConnectionError: peer [10.0.0.9]:5199 closed", 20)
    assert elsewhere.code == worker.STOPPED, "it got on"
    other = failing(tmp_path, 2, "ValueError: another one", 20)
    assert other.code == worker.STOPPED, "another failure"
    again = failing(tmp_path, 3, "ValueError: another one", 20)
    assert again.code == worker.CRASHED
    assert again.message == "the same as at the start before, at step 20: ValueError: another one"


def test_numbers_in_the_words_do_not_make_it_another_failure(tmp_path: Path) -> None:
    failing(tmp_path, 0, "ConnectionError: peer [10.0.0.1]:4711 closed", 12)
    assert failing(tmp_path, 1, "ConnectionError: peer [10.0.0.9]:5199 closed", 12).code == worker.CRASHED


def test_failures_have_a_limit_and_stalls_keep_their_code(tmp_path: Path) -> None:
    for number in range(2):
        assert failing(tmp_path, number, "stands still", number, STALLED, failures=2).code == worker.STOPPED
    last = failing(tmp_path, 2, "stands still", 2, STALLED, failures=2)
    assert last.code == STALLED
    assert last.message == "failure 3, restarts.failures is 2: stands still"


def test_another_job_starts_afresh(tmp_path: Path) -> None:
    for number in range(2):
        failing(tmp_path, number, "ValueError: queue", 20)
    made = Start("8", 0)
    attempt.begin(tmp_path, None, made, Limits())
    logs.write_error(tmp_path, logs.ErrorRecord(1, 1, "ValueError: queue", time=1.0))
    assert attempt.end(tmp_path, None, made, Limits(failures=1), srun_code=1).code == worker.STOPPED


def test_a_mistake_of_the_user_ends_it_at_once(tmp_path: Path) -> None:
    assert failing(tmp_path, 0, "shard.tar is damaged", 3, worker.USER_ERROR).code == worker.USER_ERROR


def test_a_stop_goes_on_as_often_as_it_gets_on(tmp_path: Path) -> None:
    def stopped(restart: int, step: int) -> Verdict:
        made = start(tmp_path, restart)
        (tmp_path / "log/metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        attempt.note_stopped(tmp_path, made, "stopped as it was asked to, and saved")
        return attempt.end(tmp_path, None, made, Limits(failures=1), srun_code=0)

    assert [stopped(number, 10 * number).how for number in range(30)] == ["stopped"] * 30
    idle = stopped(30, 290)
    assert (idle.code, idle.how, idle.message) == (worker.STOPPED, "failed", "stopped twice at the same step")
    assert stopped(31, 290).how == "stopped", "an idle stop counts as one failure, not more"
    assert stopped(32, 290).code == worker.CRASHED


def test_a_rank_that_stopped_because_another_died_is_no_stop(tmp_path: Path) -> None:
    made = start(tmp_path)
    attempt.srun_log(tmp_path, made).write_text(KILLED)
    attempt.note_stopped(tmp_path, made, "stopped as it was asked to, and saved")
    verdict = attempt.end(tmp_path, None, made, Limits(), srun_code=137)
    assert (verdict.how, verdict.rank) == ("failed", 1)


def test_what_an_earlier_start_said_is_not_taken_for_this_one(tmp_path: Path) -> None:
    attempt_before = start(tmp_path, 0)
    attempt.note_stopped(tmp_path, attempt_before, "stopped")
    logs.write_error(tmp_path, logs.ErrorRecord(0, 1, "old", time=1.0))
    made = start(tmp_path, 1)
    verdict = attempt.end(tmp_path, None, made, Limits(), srun_code=137)
    assert verdict.message == "srun ended with exit code 137"
    assert verdict.how == "failed"


@pytest.mark.parametrize(
    ("text", "rank", "message"),
    [
        (KILLED, 1, "killed on node2: Killed (out of memory?)"),
        (MEMORY, 5, "killed on node3: Out Of Memory (out of memory?)"),
    ],
)
def test_a_killed_rank_is_the_cause_not_its_peers(tmp_path: Path, text: str, rank: int, message: str) -> None:
    made = start(tmp_path)
    logs.write_error(tmp_path, logs.ErrorRecord(0, 1, "RuntimeError: connection closed by peer", time=1.0))
    attempt.srun_log(tmp_path, made).write_text(text)
    verdict = attempt.end(tmp_path, None, made, Limits(), srun_code=137)
    assert (verdict.rank, verdict.message) == (rank, message)
    assert logs.read_errors(tmp_path)[0].message == message, "status shows it"


def test_a_rank_that_srun_killed_is_not_the_cause(tmp_path: Path) -> None:
    made = start(tmp_path)
    logs.write_error(tmp_path, logs.ErrorRecord(1, 1, "ValueError: queue", time=1.0))
    attempt.srun_log(tmp_path, made).write_text(EXITED)
    assert attempt.end(tmp_path, None, made, Limits(), srun_code=1).message == "ValueError: queue"


def test_starts_have_a_limit(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"started 4 times, restarts\.total is 4: raise it"):
        attempt.begin(tmp_path, None, Start("7", 4), Limits(starts=4))


def test_a_ledger_cut_short_by_a_power_cut_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add("begin", Start("7", 0), {})
    with ledger.path.open("a") as stream:
        stream.write('{"event": "en')
    assert [row["event"] for row in ledger.rows()] == ["begin"]
    ledger.add("begin", Start("7", 1), {})
    assert [row["restart"] for row in ledger.rows()] == [0, 1]
    with ledger.path.open("ab") as stream:
        stream.write('{"message": "图'.encode()[:-1])  # in the middle of a character
    assert [row["restart"] for row in ledger.rows()] == [0, 1]


def test_a_ledger_that_cannot_be_written_does_not_take_the_verdict_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = start(tmp_path)
    logs.write_error(tmp_path, logs.ErrorRecord(0, worker.USER_ERROR, "no disk space left", time=1.0))
    Ledger(tmp_path).path.unlink()
    Ledger(tmp_path).path.mkdir()
    verdict = attempt.end(tmp_path, None, made, Limits(), srun_code=2)
    assert (verdict.code, verdict.message) == (worker.USER_ERROR, "no disk space left")
    assert "the verdict could not be noted: [Errno 21] Is a directory" in capsys.readouterr().err


def test_the_list_of_jobs_is_read_past_half_a_line(tmp_path: Path) -> None:
    run = RunView("tiny", tmp_path / "tiny.yaml", tmp_path, [], None)
    path = place(run) / "jobs.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"job": 1}\n{"job": 2, "stag\n{"job": 3}\n')
    assert [row["job"] for row in sent_jobs(run)] == [1, 3]


def test_ranks_come_from_slurm() -> None:
    slurm: dict[str, Any] = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16"}
    assert ranks(slurm | {"SLURM_NTASKS_PER_NODE": "8(x2)"}) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }
