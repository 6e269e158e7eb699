"""Stages as arrays on the real cluster: 10,000 tasks in few arrays, and a task that starts again, alone."""

import re
from pathlib import Path

import pytest

from pipeline.array_tasks import chunks, ranges
from pipeline.slurm import queue
from pipeline.slurm.cluster import Cluster
from pipeline.slurm.script import JobSpec, render
from tests.pipeline_harness import inline_json
from tests.slurm_cluster import SlurmCluster, SlurmError

RECIPE = """\
name: large
stages:
  filter: {kind: filter, click_log: clicks.parquet}
  crawl: {kind: crawl, inputs: {pairs: filter}}
"""
CLUSTER = """\
name: large
train: {nodes: 1, gpus_per_node: 1, time_limit: '01:00:00'}
data: {partition: cpu, cpus: 2, time_limit: '01:00:00', tasks: 10000, tasks_at_once: 64}
"""


def test_10_000_tasks_are_planned_under_the_clusters_max_array_size(
    client: SlurmCluster, tmp_path: Path
) -> None:
    assert queue.max_array_size() == 1001
    for name, text in (("large.yaml", RECIPE), ("cluster.yaml", CLUSTER), ("clicks.parquet", "")):
        (tmp_path / name).write_text(text)
    arguments = ("submit", "large.yaml", "--cluster", "cluster.yaml", "--dry-run")
    filtered, crawled = inline_json(*arguments, cwd=tmp_path)["stages"]
    assert list(filtered["scripts"]) and filtered["action"] == crawled["action"] == "submitted"
    arrays = {name: text for name, text in crawled["scripts"].items() if "-tasks-" in name}
    others = [text for name, text in crawled["scripts"].items() if name not in arrays]
    assert (len(arrays), len(others)) == (10, 1)
    assert "--tasks 10000 --finish\n" in others[0] and "#SBATCH --array" not in others[0]
    tasks, at_once = [], 0
    for name, text in arrays.items():
        script = tmp_path / name
        script.write_text(text)
        client.run("sbatch", "--test-only", script)
        first, last, limit = map(
            int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)%(\d+)$", text, re.MULTILINE)[0]
        )
        offset = int(re.findall(r"--task \$\(\((\d+) \+ SLURM_ARRAY_TASK_ID\)\)$", text, re.MULTILINE)[0])
        assert last < 1001
        assert re.search(rf"comment=\S+large@\S+/crawl/\S+/tasks\+{offset}$", text, re.MULTILINE)
        tasks += range(offset + first, offset + last + 1)
        at_once += limit
    assert sorted(tasks) == list(range(10_000))
    assert at_once <= 64
    assert not client.run("squeue", "--noheader"), "nothing was sent"


def test_a_list_of_scattered_tasks_is_cut_where_slurmctld_would_refuse_it(tmp_path: Path) -> None:
    """It takes 4,096 characters: only clusters of a larger MaxArraySize than the usual get there."""
    scattered = list(range(0, 10_000, 2))
    with SlurmCluster(tmp_path, nodes=1, max_array_size=10_001) as machine:
        options = ("sbatch", "--test-only", "--wrap", "true")
        with pytest.raises(SlurmError, match="parameter too long"):
            machine.run(*options, f"--array={ranges(scattered)}%1000")
        parts = chunks(scattered, 10_001)
        for offset, tasks in parts:
            machine.run(*options, f"--array={ranges(task - offset for task in tasks)}%1000")
    assert sorted(task for _, tasks in parts for task in tasks) == scattered
    assert len({offset for offset, _ in parts}) == len(parts), "the scripts are named by the offset"
    assert chunks([0, 5000], 10_001) == [(0, [0, 5000])]


# In the place of Python: each task says at its end that it shall start again, once, and notes its starts.
TASK = """\
#!/bin/bash
cd "${0%/*}"
[ "$4" = begin ] && mkdir -p log && echo "$PWD" && echo "${*: -1}" >>starts
[ "$4" = end ] && [ "${*: -1}" = 3 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && exit 75
[ "$3" = pipeline.slurm.rank ] && [ "${*: -1}" != 3 ] && sleep 4
exit 0
"""


@pytest.mark.slow
def test_the_last_task_of_an_array_starts_again_alone(client: SlurmCluster, tmp_path: Path) -> None:
    """Its job number is the array's too: to SLURM it means all the tasks, those that run as well."""
    python = tmp_path / "python"
    python.write_text(TASK)
    python.chmod(0o755)
    cluster = Cluster.model_validate(
        {
            "name": "array",
            "train": {"nodes": 1, "gpus_per_node": 1, "time_limit": "01:00:00"},
            "data": {"cpus": 1, "time_limit": "01:00:00"},
        }
    )
    spec = JobSpec(
        name="array",
        comment="tandem:array tasks+0",
        log=tmp_path / "%A_%a.log",
        arguments=("recipe.yaml", "crawl", "--tasks", "4"),
        placement=cluster.data,
        working_directory=tmp_path,
        python=str(python),
        array="0-3",
    )
    (tmp_path / "array.sbatch").write_text(render(spec, cluster))
    job = queue.submit(tmp_path / "array.sbatch")
    client.wait_until(
        lambda: [r["JobState"] for r in client.records(job)] == ["COMPLETED"] * 4, 60, "the four tasks"
    )
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1", "2", "3", "3"]
    restarts = {record["ArrayTaskId"]: record["Restarts"] for record in client.records(job)}
    assert restarts == {"0": "0", "1": "0", "2": "0", "3": "1"}


def test_variables_of_the_shell_change_nothing(
    client: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As set by a user, or by a job that `tandem submit` runs in."""
    cluster = Cluster.model_validate(
        {
            "name": "plain",
            "account": "vision",
            "train": {
                "partition": "gpu",
                "nodes": 2,
                "gpus_per_node": 2,
                "cpus_per_gpu": 3,
                "time_limit": "01:00:00",
            },
            "data": {"time_limit": "01:00:00"},
            "environment": {"source": str(tmp_path / "show.sh")},
        }
    )
    show = f"srun bash -c 'env -0 >{tmp_path}/$SLURM_PROCID'\nenv -0 >{tmp_path}/batch\nexit 0\n"
    (tmp_path / "show.sh").write_text(show)
    spec = JobSpec("plain", "", tmp_path / "%j.log", ("recipe.yaml", "s"), cluster.train, tmp_path, "python")
    (tmp_path / "plain.sbatch").write_text(render(spec, cluster))
    disturbing = {
        "SBATCH_PARTITION": "urgent",
        "SBATCH_ACCOUNT": "others",
        "SBATCH_TIMELIMIT": "7",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_GRES": "gpu:1",
        "SLURM_PARTITION": "urgent",
        "SLURM_NTASKS": "3",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "9",
        "SLURM_EXCLUSIVE": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOBID": "77",
        "SLURM_RESTART_COUNT": "5",
        "SLURM_DISTRIBUTION": "cyclic",
        "SQUEUE_STATES": "SUSPENDED",
        "SQUEUE_FORMAT": "%j",
        "SCANCEL_STATE": "SUSPENDED",
        "SRUN_CPUS_PER_TASK": "9",
    }
    for name, value in disturbing.items():
        monkeypatch.setenv(name, value)
    job = queue.submit(tmp_path / "plain.sbatch")
    held = client.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    assert {one.id for one in queue.jobs()} >= {job, int(held)}
    queue.cancel([int(held)])
    assert client.wait(job, held) == ["COMPLETED", "CANCELLED"]
    record = client.job(job)
    wanted = {"Partition": "gpu", "Account": "vision", "TimeLimit": "01:00:00", "NumNodes": "2"}
    assert {name: record[name] for name in wanted} == wanted
    assert (record["NumTasks"], record["CPUs/Task"], record["Restarts"]) == ("4", "3", "0")
    assert "ArrayJobId" not in record
    for rank in ("0", "1", "2", "3"):
        own = dict(row.split("=", 1) for row in (tmp_path / rank).read_text().split("\0")[:-1])
        assert (own["SLURM_NTASKS"], own["SLURM_JOB_ID"]) == ("4", str(job))
        assert (own["SLURM_PROCID"], own["SLURM_NODEID"]) == (rank, str(int(rank) // 2))
        assert "SLURM_EXCLUSIVE" not in own and "SLURM_RESTART_COUNT" not in own
    assert not [
        name for name in disturbing if name.startswith("SBATCH_") and name in (tmp_path / "batch").read_text()
    ]
