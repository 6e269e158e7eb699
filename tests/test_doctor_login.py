"""`tandem doctor` on the login node: what it asks a real SLURM, and what it says of other settings."""

import functools
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.slurm.doctor_checks import Finding, Run, Wanted, gpus_of, login_checks, seconds_of
from tests.slurm_cluster import SlurmCluster

HOUR_S = 3600
FITTING = Wanted(nodes=8, gpus_per_node=8, cpus_per_node=64, time_limit_s=24 * HOUR_S)


def _asking(cluster: SlurmCluster, **replaced: str) -> Run:
    """subprocess.run as a user of the cluster; some settings are told otherwise than they are."""
    ask: Run = functools.partial(subprocess.run, env=cluster.environment)

    def ask_and_replace(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        done = ask(command, **options)
        for name, value in replaced.items():
            lines = done.stdout.splitlines()
            done.stdout = "\n".join(f"{name} = {value}" if line.startswith(name) else line for line in lines)
        return done

    return ask_and_replace if replaced else ask


def _checked(cluster: SlurmCluster, partitions: Mapping[str, Wanted], **replaced: str) -> dict[str, Finding]:
    findings = login_checks(partitions, _asking(cluster, **replaced))
    return {finding.check: finding for finding in findings}


def test_a_cluster_that_fits_has_no_failure(slurm: SlurmCluster) -> None:
    found = _checked(slurm, {"gpu": FITTING, "urgent": FITTING, "cpu": FITTING})
    assert {finding.state for finding in found.values()} == {"ok", "warning"}
    assert [check for check, finding in found.items() if finding.state == "warning"] == [
        "partition gpu: preemption",
        "partition cpu: preemption",
    ], "the test cluster's GraceTime is 0"
    assert "5 s to save" in found["partition gpu: preemption"].remedy
    assert "nothing preempts" in found["partition urgent: preemption"].seen
    assert "MaxArraySize=1001" in found["array size"].seen
    assert found["SLURM version"].seen.count(".") == 2
    assert "8 of them up" in found["partition gpu: nodes"].seen


def test_a_partition_that_does_not_exist_is_told_with_those_that_do(slurm: SlurmCluster) -> None:
    finding = _checked(slurm, {"gpus": FITTING})["partition gpus"]
    assert finding.state == "failure"
    assert "gpu, urgent, cpu" in finding.remedy


@pytest.mark.parametrize(
    ("wanted", "check", "told"),
    [
        (Wanted(9, 8, 64, HOUR_S), "nodes", "8 nodes, 8 with"),
        (Wanted(8, 9, 64, HOUR_S), "nodes", "8 nodes, 0 with 9 GPUs"),
        (Wanted(8, 8, 65, HOUR_S), "nodes", "8 nodes, 0 with"),
        (Wanted(8, 8, 64, 8 * 24 * HOUR_S), "time", "MaxTime=7-00:00:00"),
    ],
)
def test_more_than_a_partition_has_is_a_failure(
    slurm: SlurmCluster, wanted: Wanted, check: str, told: str
) -> None:
    finding = _checked(slurm, {"gpu": wanted})[f"partition gpu: {check}"]
    assert finding.state == "failure"
    assert told in finding.seen
    assert "the cluster file asks for" in finding.remedy


def test_nodes_that_are_down_are_a_warning_that_names_them(slurm: SlurmCluster) -> None:
    slurm.fail_node("node5")
    finding = _checked(slurm, {"gpu": FITTING})["partition gpu: nodes"]
    assert finding.state == "warning"
    assert "7 of them up" in finding.seen and "node5 DOWN" in finding.seen


def test_a_closed_partition_is_a_failure(slurm: SlurmCluster) -> None:
    slurm.run("scontrol", "update", "PartitionName=cpu", "State=DOWN")
    try:
        finding = _checked(slurm, {"cpu": FITTING})["partition cpu"]
    finally:
        slurm.run("scontrol", "update", "PartitionName=cpu", "State=UP")
    assert (finding.state, finding.seen) == ("failure", "State=DOWN")


@pytest.mark.slow
def test_a_dead_controller_is_a_finding_and_no_crash(slurm: SlurmCluster) -> None:
    slurm.kill_controller()
    finding = _checked(slurm, {"gpu": FITTING})["slurmctld"]
    assert finding.state == "failure"
    assert "scontrol show config" in finding.seen


def test_missing_programs_are_named() -> None:
    run = functools.partial(subprocess.run, env={"PATH": "/nowhere"})
    findings = {finding.check: finding for finding in login_checks({"gpu": FITTING}, run)}
    assert findings["program sbatch"].state == "failure"
    assert findings["program sacct"].state == "warning"
    assert set(findings) == {
        f"program {name}" for name in ("sbatch", "srun", "squeue", "scontrol", "scancel", "sacct")
    }


@pytest.mark.parametrize(
    ("setting", "value", "check", "state"),
    [
        ("SLURM_VERSION", "20.02.7", "SLURM version", "warning"),
        ("SLURM_VERSION", "24.05.1", "SLURM version", "ok"),
        ("MaxArraySize", "0", "array size", "failure"),
        ("MaxJobCount", "500", "job count", "warning"),
        ("EnforcePartLimits", "NO", "partition limits", "warning"),
        ("MinJobAge", "300 sec", "ended jobs", "warning"),
        ("AccountingStorageType", "accounting_storage/slurmdbd", "ended jobs", "ok"),
        ("KillWait", "60 sec", "partition gpu: preemption", "ok"),
        ("PreemptType", "preempt/none", "partition gpu: preemption", "ok"),
    ],
)
def test_what_other_settings_would_mean(
    slurm: SlurmCluster, setting: str, value: str, check: str, state: str
) -> None:
    finding = _checked(slurm, {"gpu": FITTING}, **{setting: value})[check]
    assert finding.state == state
    assert bool(finding.remedy) == (state != "ok")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("12:00:01", 12 * HOUR_S + 1),
        ("2-12", 60 * HOUR_S),
        ("2-12:30", 60 * HOUR_S + 30 * 60),
        ("7-00:00:00", 7 * 24 * HOUR_S),
    ],
)
def test_slurm_times(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="soon"):
        seconds_of("soon")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a100:4(S:0),gpu:v100:2,nvme:2", 6),
        ("mygpu:3", 0),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus
