"""The cluster that SLURM's tests stand on does what a real one does: ranks, chains, faults, preemption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import slurm_cluster
from tests.pipeline_harness import REPOSITORY
from tests.slurm_cluster import SlurmCluster, SlurmError


def test_64_tasks_have_their_rank_node_local_id_and_devices(slurm: SlurmCluster) -> None:
    seen = slurm.run(
        *("srun", "--nodes=8", "--gres=gpu:8", "--ntasks-per-node=8", "sh", "-c"),
        "echo $SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $(hostname) $CUDA_VISIBLE_DEVICES",
    )
    rows = sorted((line.split() for line in seen.splitlines()), key=lambda row: int(row[0]))
    assert rows == [
        [str(rank), str(rank // 8), str(rank % 8), f"node{rank // 8 + 1}", "0,1,2,3,4,5,6,7"]
        for rank in range(64)
    ]


def test_jobs_that_share_a_node_get_devices_of_their_own(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = f"echo $CUDA_VISIBLE_DEVICES; while [ ! -e {tmp_path}/end ]; do sleep 0.1; done"
    options = ("--nodelist=node2", "--gres=gpu:3", f"--output={tmp_path}/%j")
    jobs = [slurm.submit(script, *options), slurm.submit(script, *options)]
    slurm.wait(*jobs, states=("RUNNING",))
    (tmp_path / "end").touch()
    assert slurm.wait(*jobs) == ["COMPLETED", "COMPLETED"]
    devices = [device for job in jobs for device in (tmp_path / job).read_text().strip().split(",")]
    assert len(devices) == len(set(devices)) == 6


def test_nodes_find_each_other_and_share_folders_but_no_shared_memory(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    script = (
        f"touch {tmp_path}/$(hostname) /dev/shm/$(hostname); sleep 0.5; "
        "echo $(getent hosts node1 | cut -d' ' -f1) $(ls /dev/shm)"
    )
    seen = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", script)
    assert sorted(seen.splitlines()) == ["127.0.1.1 node1", "127.0.1.1 node2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node1", "node2"]


def test_a_chain_breaks_where_a_job_fails(slurm: SlurmCluster) -> None:
    first = slurm.submit("true")
    second = slurm.submit("exit 7", f"--dependency=afterok:{first}")
    third = slurm.submit("true", f"--dependency=afterok:{second}", "--kill-on-invalid-dep=yes")
    assert slurm.wait(first, second, third) == ["COMPLETED", "FAILED", "CANCELLED"]
    assert slurm.job(second)["ExitCode"] == "7:0"


def test_an_array_is_waited_for_task_by_task(slurm: SlurmCluster) -> None:
    array = slurm.submit("exit $((SLURM_ARRAY_TASK_ID % 2))", "--array=0-3%2")
    assert sorted(slurm.wait(array)) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    assert slurm.job(f"{array}_3")["ExitCode"] == "1:0"
    with pytest.raises(SlurmError, match="name one task"):
        slurm.job(array)


def test_limits_are_those_asked_for(slurm: SlurmCluster) -> None:
    with pytest.raises(SlurmError, match="Invalid job array specification"):
        slurm.submit("true", "--array=0-1001")
    with pytest.raises(SlurmError, match="Node count"):
        slurm.submit("true", "--nodes=9")


@pytest.mark.slow
def test_a_power_cut_requeues_the_job_on_other_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = f'touch {tmp_path}/started; [ "${{SLURM_RESTART_COUNT:-0}}" = 1 ] || srun sleep 300'
    job = slurm.submit(script, "--nodes=3", "--requeue")
    slurm.wait_until((tmp_path / "started").exists, 20, "the job to start")
    slurm.fail_node("node2")
    assert slurm.wait(job) == ["COMPLETED"]
    assert slurm.job(job)["Restarts"] == "1"
    nodes = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()
    assert len(nodes) == 3 and "node2" not in nodes
    assert slurm.node_states()["node2"].startswith("DOWN")
    slurm.start_node("node2")
    assert slurm.run("srun", "--nodelist=node2", "hostname") == "node2\n"


def test_a_job_outlives_the_controller(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = slurm.submit(f"touch {tmp_path}/started; while [ ! -e {tmp_path}/end ]; do sleep 0.1; done")
    slurm.wait_until((tmp_path / "started").exists, 20, "the job to start")
    slurm.wait_saved()
    slurm.kill_controller()
    with pytest.raises(SlurmError):
        slurm.run("scontrol", "ping")
    slurm.start_controller()
    assert slurm.job(job)["JobState"] == "RUNNING"
    (tmp_path / "end").touch()
    assert slurm.wait(job) == ["COMPLETED"]
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_higher_partition_preempts_and_the_job_comes_back(slurm: SlurmCluster) -> None:
    whole = ("--nodes=8", "--gres=gpu:8")
    low = slurm.submit("srun sleep 300", "--requeue", *whole)
    slurm.wait(low, states=("RUNNING",))
    high = slurm.submit("true", "--partition=urgent", *whole)
    assert slurm.wait(high) == ["COMPLETED"]
    slurm.wait(low, states=("RUNNING",))
    assert slurm.job(low)["Restarts"] == "1"


def test_another_shape_takes_jobs_of_that_shape_alone(slurm: SlurmCluster, tmp_path: Path) -> None:
    with SlurmCluster(tmp_path / "v100", nodes=6, gpu_type="v100", cpus=40, memory_mb=500_000) as other:
        accepted = ("sbatch", "--test-only", "--ntasks-per-node=8", "--wrap", "true")
        other.run(*accepted, "--nodes=6", "--gres=gpu:v100:8")
        with pytest.raises(SlurmError, match="node"):
            other.run(*accepted, "--nodes=7", "--gres=gpu:v100:8")
        with pytest.raises(SlurmError, match=r"(?i)gres|not available"):
            other.run(*accepted, "--nodes=6", "--gres=gpu:a100:8")
        assert len(slurm.node_states()) == 8, "the first cluster is still there"


def test_nothing_outlives_a_killed_test_process(slurm: SlurmCluster, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.slurm_cluster import SlurmCluster\n"
        "cluster = SlurmCluster(Path(sys.argv[1]), nodes=1).up(); cluster.submit('exec sleep 4321')\n"
        "cluster.wait(1, states=('RUNNING',)); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert _processes_of(tmp_path)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (left := _processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "PROGRAMS", ("sh", "slurm_of_tomorrow"))
    assert slurm_cluster.missing() == [f"slurm_of_tomorrow is not installed ({slurm_cluster.INSTALL})"]


def _processes_of(root: Path) -> list[str]:
    """Command lines of living processes that were started with this cluster's slurm.conf."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={root}/".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile
    return found
