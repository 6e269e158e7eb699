"""`tandem submit`, `status` and `cancel` on a real SLURM, with tiny stages: chains, failures, restarts."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.slurm.attempt import Ledger
from tests.pipeline_harness import TINY, command, environment, write_recipe
from tests.slurm_cluster import SlurmCluster
from tests.slurm_desk import CLUSTER, Desk

pytestmark = pytest.mark.slow


@pytest.fixture
def desk(slurm: SlurmCluster, tmp_path: Path) -> Callable[..., Desk]:
    return lambda **options: Desk(slurm, tmp_path / "desk", **options)


def train(**fields: object) -> str:
    """The tiny recipe, its stage `train` changed."""
    changed = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return TINY.replace("epochs: 2}", f"epochs: 2, {changed}}}")


def states(rows: dict[str, dict[str, Any]]) -> list[str]:
    return [row["state"] for row in rows.values()]


def test_a_recipe_runs_as_a_chain_and_nothing_twice(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(step_s=0.4))
    first = user.submit()
    assert [one["action"] for one in first.values()] == ["submitted"] * 3
    again = user.submit()
    assert all(one["action"] in ("live", "done") for one in again.values()), again
    assert again["tune"]["jobs"] == first["tune"]["jobs"]
    rows = user.wait()
    assert states(rows) == ["done"] * 3
    assert [row["starts"] for row in rows.values()] == [1, 1, 1]
    job = user.slurm.job(first["train"]["jobs"][0])
    assert job["NumTasks"] == "2"
    assert (user.directory("train") / "out/total.txt").read_text() == "20"
    assert [one["action"] for one in user.submit().values()] == ["done"] * 3
    assert user.tandem("run").count("reused") == 3, "the laptop's run finds the same directories"


@pytest.mark.parametrize(
    ("how", "message"), [("crash", "not finite"), ("kill", "Killed"), ("stall", "stands still")]
)
def test_a_failure_once_is_survived(desk: Callable[..., Desk], how: str, message: str) -> None:
    rank = 0 if how == "stall" else 1
    user = desk(recipe=train(fail=how, fail_rank=rank, fail_step=3))
    user.submit()
    rows = user.wait()
    assert states(rows) == ["done"] * 3, user.tandem("status")
    assert rows["train"]["starts"] == 2
    ends = user.attempts("train")
    assert [end["code"] for end in ends] == [75, 0]
    assert message in ends[0]["message"]
    assert "starts at step 2" in (user.directory("train") / f"log/rank{rank}.log").read_text()


def test_the_same_failure_twice_ends_the_chain_and_comes_first(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(fail="crash", fail_rank=1, fail_step=3, fail_times=99))
    user.submit()
    rows = user.wait()
    assert states(rows) == ["done", "failed", "cancelled"]
    assert rows["train"]["starts"] == 2
    assert "the same as at the start before, at step" in rows["train"]["error"]
    told = user.tandem("status").splitlines()
    assert told[0].startswith("train failed: rank 1: ")
    assert "loss is not finite" in told[0]
    assert any("RuntimeError: the loss is not finite" in line for line in told[1:12]), "the right rank's log"


def test_failures_have_a_limit(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(fail="crash", fail_step=3), cluster=CLUSTER + "restarts: {failures: 0}\n")
    user.submit()
    rows = user.wait()
    assert states(rows) == ["done", "failed", "cancelled"]
    assert rows["train"]["starts"] == 1
    assert rows["train"]["error"].startswith("failure 1, restarts.failures is 0: RuntimeError: the loss")


def test_a_mistake_of_the_user_is_not_tried_again(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(fail="user", fail_step=2))
    sent = user.submit()
    rows = user.wait()
    assert states(rows) == ["done", "failed", "cancelled"]
    assert rows["train"]["starts"] == 1
    assert "shard.tar is damaged" in rows["train"]["error"]
    assert user.slurm.job(sent["train"]["jobs"][0])["ExitCode"] == "2:0"
    user.submit()  # it fails once: mended
    assert states(user.wait()) == ["done"] * 3


def test_cancel_and_submit_again_goes_on(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(step_s=1.0))
    first = user.submit()
    _wait_for_step(user, 2)
    told = user.tandem("cancel")
    assert told.count("cancelled") == 2, told
    again = user.submit()  # at once, while the job that was cancelled still saves
    assert [one["action"] for one in again.values()] == ["done", "submitted", "submitted"]
    assert again["train"]["jobs"] != first["train"]["jobs"]
    assert states(user.wait()) == ["done"] * 3
    log = (user.directory("train") / "log/rank0.log").read_text()
    assert log.count("starts at step 0") == 1


def _wait_for_step(user: Desk, step: int) -> None:
    def there() -> bool:
        path = user.folder / "runs/tiny/train"
        return any(
            (one / "checkpoints/rank0.txt").exists()
            and int((one / "checkpoints/rank0.txt").read_text().split()[0]) >= step
            for one in path.glob("*")
        )

    user.slurm.wait_until(there, 60, f"step {step}")


def test_the_signal_before_the_time_limit_saves_and_requeues(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(step_s=1.0))
    sent = user.submit()
    _wait_for_step(user, 2)
    user.slurm.run("scancel", "--batch", "--signal=USR2", str(sent["train"]["jobs"][0]))
    rows = user.wait()
    assert states(rows) == ["done"] * 3
    assert user.slurm.job(sent["train"]["jobs"][0])["Restarts"] == "1"
    assert [end["how"] for end in user.attempts("train")] == ["stopped", "done"]
    log = (user.directory("train") / "log/rank0.log").read_text()
    assert log.count("starts at step 0") == 1


def test_by_hand(desk: Callable[..., Desk]) -> None:
    user = desk()
    user.tandem("run", "--until", "numbers")
    repository = Path(__file__).parents[1]
    options = ["--parsable", f"--chdir={repository}", "--ntasks-per-node=2", f"--output={user.folder}/%j.log"]

    def stage() -> str:
        """Its log, once it has ended well."""
        script = [str(repository / "slurm/stage.sbatch"), str(user.recipe), "train"]
        job = user.slurm.run(
            *("sbatch", *options, *script, "--root", str(user.folder / "runs")),
            cwd=repository,
            environment={"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(repository)},
        ).strip()
        ended = user.slurm.wait(job)
        text = (user.folder / f"{job}.log").read_text()
        assert ended == ["COMPLETED"], text
        return text

    assert "tandem: train: done: done" in stage()
    assert user.status()["train"]["state"] == "done"
    assert user.submit()["train"]["action"] == "done"
    # as of a job whose node died between the end of the stage and its own: no rank waits for another
    assert "tandem: train: done before" in stage()
    assert user.status()["train"]["starts"] == 1


def test_an_array_runs_again_what_failed_alone(desk: Callable[..., Desk]) -> None:
    recipe = (
        "name: tiny\ntracking: {uri: 'off'}\nstages:\n  squares: {kind: tests.tiny.squares, count: 100}\n"
    )
    cluster = CLUSTER.replace("cpus: 1,", "cpus: 1, tasks: 12, tasks_at_once: 4,")
    user = desk(recipe=recipe, cluster=cluster)
    broken = (3, 4, 9)
    for task in broken:
        (user.folder / f"fail_{task}").write_text("crash")
    assert "12 of 12 tasks" in user.submit()["squares"]["what"]
    row = user.wait()["squares"]
    assert (row["state"], row["tasks_done"], row["tasks"]) == ("failed", 9, 12)
    assert "cannot be squared" in row["error"]
    assert row["error_task"] in broken
    for task in range(12):
        ends = [one for one in Ledger(user.directory("squares"), task).rows() if one["event"] == "end"]
        assert [end["code"] for end in ends] == ([75, 1] if task in broken else [0]), (
            "the same twice: given up"
        )
    for task in broken:
        (user.folder / f"fail_{task}").unlink()
    tasks = user.directory("squares") / "tasks"
    before = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.json")}
    assert "3 of 12 tasks" in user.submit()["squares"]["what"]
    assert user.wait()["squares"]["state"] == "done"
    after = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.json")}
    assert {name: after[name] for name in before} == before, "what was done is not done again"
    squares = (user.directory("squares") / "out/squares.txt").read_text().split()
    assert squares == [str(number**2) for number in range(100)]
    made = [line.split()[0] for line in (user.folder / "made.log").read_text().splitlines()]
    assert len(made) == len(set(made)) == 100


def test_a_recipe_that_changed_while_it_waited_is_refused(desk: Callable[..., Desk]) -> None:
    user = desk()
    user.slurm.run("scontrol", "update", "partitionname=cpu", "state=down")
    try:
        sent = user.submit()
        write_recipe(user.folder, TINY.replace("count: 4", "count: 5"))
    finally:
        user.slurm.run("scontrol", "update", "partitionname=cpu", "state=up")
    user.slurm.wait(sent["numbers"]["jobs"][0])
    job = user.slurm.job(sent["numbers"]["jobs"][0])
    assert job["ExitCode"] == "2:0"
    assert "changed since stage 'numbers' was submitted" in Path(job["StdOut"]).read_text()
    user.wait()
    number = sent["numbers"]["jobs"][0]
    assert user.status()["numbers"]["doing"] == f"the recipe changed after job {number}: submit it again"


def test_bad_requests_are_told_before_anything_is_sent(desk: Callable[..., Desk]) -> None:
    user = desk()
    assert "there is no stage 'tran'; did you mean 'train'" in user.tandem(
        "submit", "--cluster", user.cluster, "--from", "tran", code=2
    )
    assert "reads 'numbers', which is not done and has no job" in user.tandem(
        "submit", "--cluster", user.cluster, "--from", "train", code=2
    )
    user.cluster.write_text(CLUSTER + "stages: {tran: {nodes: 2}}\n")
    assert "the recipe has no such stage; did you mean 'train'" in user.tandem(
        "submit", "--cluster", user.cluster, code=2
    )
    user.cluster.write_text(CLUSTER)
    write_recipe(user.folder, train(ranks=3))
    assert (
        "stage 'train' would have 1 nodes × 2 GPUs = 2 ranks; its contrastive_batch / batch_per_gpu is 3"
        in (user.tandem("submit", "--cluster", user.cluster, code=2))
    )
    write_recipe(user.folder)
    user.cluster.write_text(CLUSTER.replace("partition: cpu", "partition: nowhere"))
    said = user.tandem("submit", "--cluster", user.cluster, code=2)
    assert "stage numbers: sbatch: " in said
    assert "invalid partition" in said
    assert not user.slurm.run("squeue", "--noheader").strip()


def test_status_without_slurm_says_so(desk: Callable[..., Desk]) -> None:
    user = desk()
    user.submit()
    user.wait()
    done = subprocess.run(
        command("status", user.recipe),
        cwd=user.folder,
        env=environment() | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "SLURM was not asked: squeue is not there" in done.stdout
    assert done.stdout.count("done") >= 3


def test_submit_and_status_are_quick(desk: Callable[..., Desk]) -> None:
    """Under 2 s and 1 s of this process's own CPU time; SLURM's answers come on top."""
    stages = ["  numbers: {kind: tests.tiny.numbers, count: 4}"]
    stages += [f"  train{k}: {{kind: tests.tiny.train, inputs: {{numbers: numbers}}}}" for k in range(6)]
    user = desk(recipe="name: tiny\ntracking: {uri: 'off'}\nstages:\n" + "\n".join(stages) + "\n")
    before = os.times()
    user.tandem("submit", "--cluster", user.cluster)
    between = os.times()
    user.tandem("status")
    after = os.times()
    assert between.children_user + between.children_system - before.children_user - before.children_system < 2
    assert after.children_user + after.children_system - between.children_user - between.children_system < 1
    time.sleep(1)  # slurmctld is not to be killed within a second of a job's start


def test_doctor_examines_a_whole_cluster(desk: Callable[..., Desk]) -> None:
    cluster = CLUSTER.replace("nodes: 1, gpus_per_node: 2", "nodes: 2, gpus_per_node: 1")
    user = desk(cluster=cluster)
    done = subprocess.run(
        command("doctor", "--cluster", user.cluster, "--json"),
        cwd=user.folder,
        env=environment() | {**user.slurm.environment, "PYTHONPATH": environment()["PYTHONPATH"]},
        capture_output=True,
        text=True,
        timeout=180,
    )
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    bad = [one for one in findings.values() if one["state"] == "failure" and one["check"] != "disk"]
    assert not bad, done.stderr
    assert {"all-reduce", "locks", "clocks"} <= set(findings), sorted(findings)


def test_doctor_names_what_a_partition_lacks(desk: Callable[..., Desk]) -> None:
    user = desk(cluster=CLUSTER.replace("nodes: 1, gpus_per_node: 2", "nodes: 9, gpus_per_node: 16"))
    done = subprocess.run(
        command("doctor", "--cluster", user.cluster),
        cwd=user.folder,
        env=environment() | {**user.slurm.environment, "PYTHONPATH": environment()["PYTHONPATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "failure" in done.stdout
    assert not user.slurm.run("squeue", "--noheader").strip()


def test_a_stage_that_runs_without_slurm_is_not_sent(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(step_s=2.0))
    running = subprocess.Popen(
        command("run", user.recipe), cwd=user.folder, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        _wait_for_step(user, 1)
        said = user.tandem("submit", "--cluster", user.cluster, code=2)
    finally:
        running.terminate()
        running.wait()
    assert "stage 'train': process " in said
    assert "works on it without SLURM" in said


def test_status_watches_until_all_has_ended(desk: Callable[..., Desk]) -> None:
    user = desk(recipe=train(step_s=0.5))
    user.submit()
    told = user.tandem("status", "--watch")
    assert told.count("status of tiny") == 1, "on a pipe the last state alone"
    assert not {"queued", "running"} & set(told.split())
    assert states(user.status()) == ["done"] * 3
