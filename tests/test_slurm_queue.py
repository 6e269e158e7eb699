"""What SLURM says is read right: task lists of arrays, a slurmctld that is down, jobs that it forgot."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.slurm import queue
from pipeline.slurm.queue import Ended, QueueError
from tests.pipeline_harness import inline
from tests.slurm_cluster import SlurmCluster, missing
from tests.test_slurm_arrays import CLUSTER, RECIPE


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("3-9,12%4", [*range(3, 10), 12]),
        ("0-1000%64", list(range(1001))),
        ("0-998:2", list(range(0, 999, 2))),  # squeue writes it so
        ("5", [5]),
        (",".join(str(i * i % 1001) for i in range(300)), sorted({i * i % 1001 for i in range(300)})),
    ],
    ids=["limit", "many", "step", "one", "scattered"],
)
def test_the_task_list_of_an_array_that_waits(client: SlurmCluster, given: str, tasks: list[int]) -> None:
    job = int(client.submit("true", "--hold", f"--array={given}", "--comment=tandem:a|b c"))
    rows = [row for row in queue.jobs() if row.array_id == job]
    assert sorted(task for row in rows for task in row.task_numbers()) == tasks
    assert {(row.state, row.reason, row.comment, row.live, row.waits) for row in rows} == {
        ("PENDING", "JobHeldUser", "tandem:a|b c", True, True)
    }


def test_each_task_that_runs_or_ended_has_its_row(client: SlurmCluster, tmp_path: Path) -> None:
    script = f"[ $SLURM_ARRAY_TASK_ID = 0 ] && exit 3; until [ -e {tmp_path}/end ]; do sleep 0.1; done"
    job = int(client.submit(script, "--array=0-5%3"))

    def states() -> dict[int, str]:
        rows = [row for row in queue.jobs() if row.array_id == job]
        return {task: row.state for row in rows for task in row.task_numbers()}

    wanted = {0: "FAILED", 1: "RUNNING", 2: "RUNNING", 3: "RUNNING", 4: "PENDING", 5: "PENDING"}
    client.wait_until(lambda: states() == wanted, 30, lambda: str(states()))
    single = int(client.submit("true"))
    (row,) = queue.jobs([single])
    assert (row.array_id, row.tasks, row.task_numbers()) == (single, None, [])
    (tmp_path / "end").touch()
    client.wait_until(lambda: set(states().values()) == {"FAILED", "COMPLETED"}, 30, "all tasks to end")
    assert not [row for row in queue.jobs() if row.live]


def test_thousands_of_rows_are_read_in_a_moment(client: SlurmCluster) -> None:
    for _ in range(5):
        client.submit("true", "--hold", "--array=0-1000")
    began = time.monotonic()
    rows = [row for row in queue.jobs() if row.waits]
    assert time.monotonic() - began < 5
    assert sum(len(row.task_numbers()) for row in rows) == 5 * 1001


def test_cancel_takes_hundreds_and_those_that_ended(client: SlurmCluster) -> None:
    ended = int(client.submit("true"))
    client.wait(ended)
    waiting = [int(client.submit("true", "--hold")) for _ in range(3)]
    queue.cancel([ended, *waiting, *range(900_000, 900_400)])
    assert client.wait(*waiting) == ["CANCELLED"] * 3


def test_no_slurm_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QueueError, match="squeue is not there: run this on a login node of the cluster"):
        queue.jobs()
    assert queue.ended(1) is None


@pytest.mark.slow
def test_a_slurmctld_that_is_down_is_told_in_time(client: SlurmCluster, tmp_path: Path) -> None:
    for name, text in (("large.yaml", RECIPE), ("cluster.yaml", CLUSTER), ("clicks.parquet", "")):
        (tmp_path / name).write_text(text)
    client.kill_controller()
    began = time.monotonic()
    with pytest.raises(QueueError, match=r"squeue: .*(Unable to contact slurm controller|gave no answer)"):
        queue.jobs()
    assert time.monotonic() - began < queue.TIMEOUT_S + 5
    with pytest.raises(QueueError, match=r"squeue gave no answer within 0\.2 s: is slurmctld up\?"):
        queue.ask("squeue", timeout_s=0.2)
    shown = inline("submit", "large.yaml", "--cluster", "cluster.yaml", cwd=tmp_path, code=2)
    assert shown.stderr.startswith("tandem: squeue")
    assert not list(tmp_path.glob("runs/large/slurm/*.sbatch"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that forgets a job a few seconds after it ended."""
    if missing():
        pytest.skip(f"no slurm cluster here: {'; '.join(missing())}")
    with SlurmCluster(tmp_path_factory.mktemp("forgetful"), nodes=1, min_job_age_s=2) as cluster:
        yield cluster


def test_how_a_job_ended_while_slurm_knows_it(client: SlurmCluster) -> None:
    misleading = "--job-name=a JobState=X Reason=Y Dependency=Z ExitCode=9:9"
    jobs = [client.submit("exit 3", misleading), client.submit("true"), client.submit("true", "--hold")]
    client.run("scancel", jobs[2])
    client.wait(*jobs)
    assert [queue.ended(int(job)) for job in jobs] == [
        Ended("FAILED", "3:0", "NonZeroExitCode"),
        Ended("COMPLETED", "0:0", "None"),
        Ended("CANCELLED", "0:0", "JobHeldUser"),
    ]
    assert queue.ended(987_654) is None


@pytest.mark.slow
def test_a_job_that_slurmctld_forgot_and_no_accounting_has(
    forgetful: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, forgetful.environment[name])
    job = int(forgetful.submit("exit 3"))
    forgetful.wait(job)
    assert queue.ended(job) == Ended("FAILED", "3:0", "NonZeroExitCode")
    forgetful.wait_until(lambda: not queue.jobs(), 60, "the job to be forgotten")
    assert queue.ended(job) is None


@pytest.mark.parametrize(
    ("rows", "ended"),
    [
        ("FAILED|3:0\n", Ended("FAILED", "3:0")),
        ("CANCELLED by 1000|0:0\n", Ended("CANCELLED", "0:0")),
        ("REQUEUED|0:0\nREQUEUED|0:0\nTIMEOUT|0:15\n", Ended("TIMEOUT", "0:15")),
        ("", None),
    ],
)
def test_what_sacct_prints_is_read_right(rows: str, ended: Ended | None) -> None:
    """Rows as SLURM 22.05 with slurmdbd prints them, which this test's cluster has not."""
    assert queue.of_accounting(rows) == ended
