"""`tandem doctor`'s job on a real SLURM: a healthy one, nodes that differ, ranks that die or hang."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.slurm import doctor_rank
from pipeline.slurm.doctor_checks import Finding
from pipeline.slurm.doctor_findings import job_findings
from tests.pipeline_harness import REPOSITORY, environment
from tests.slurm_cluster import SlurmCluster

Report = dict[str, Any]

# {alter} may change what a rank finds around it; {directory} may name a node
SCRIPT = """\
#!/bin/bash
set -e
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 1000))
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    {alter}
    exec {python} -P -m pipeline.slurm.doctor_rank --directory {directory} --bytes 1048576 {options}'
"""


def _examined(
    slurm: SlurmCluster,
    folder: Path,
    *,
    alter: str = "",
    directory: str = "shared",
    options: str = "",
    state: str = "COMPLETED",
) -> tuple[Report, dict[str, Finding]]:
    """Two tasks on each of two nodes; doctor.json, and its findings by check (the worst of a check)."""
    script = folder / "doctor.sh"
    script.write_text(
        SCRIPT.format(alter=alter, directory=folder / directory, options=options, python=sys.executable)
    )
    job = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2"),
        *(f"--output={folder}/log", script),
        environment={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    ).strip()
    ended = slurm.wait(job, timeout_s=240)
    assert ended == [state], (folder / "log").read_text()
    report: Report = json.loads((folder / "shared" / "doctor.json").read_text())
    order = ("ok", "warning", "failure")
    findings = sorted(job_findings(report), key=lambda finding: order.index(finding.state))
    return report, {finding.check: finding for finding in findings}


@pytest.mark.slow
def test_a_healthy_cluster(slurm: SlurmCluster, tmp_path: Path) -> None:
    report, findings = _examined(slurm, tmp_path)
    bad = [finding for finding in findings.values() if finding.state != "ok" and finding.check != "disk"]
    assert not bad
    assert [rank["host"] for rank in report["ranks"]] == ["node1", "node1", "node2", "node2"]
    assert {rank["slurm_gpus"] for rank in report["ranks"]} == {"0,1"}
    assert report["backend"] == "gloo"
    assert report["all_reduce"]["wrong_ranks"] == [] and report["all_reduce"]["gb_per_s"] > 0
    assert [(pair["a"], pair["b"]) for pair in report["pairs"]] == [("node1", "node2")]
    assert report["locks"] == [
        {"holder": "node1", "seen": {"node2": True}},
        {"holder": "node2", "seen": {"node1": True}},
    ]
    assert set(report["files"]["node2"]) == {"node1", "node2"}
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["doctor.json"], "nothing else is left"


@pytest.mark.slow
def test_nodes_that_differ_are_named(slurm: SlurmCluster, tmp_path: Path) -> None:
    """On node2: another transformers, a clock half a minute ahead, and a folder that is not shared."""
    other = tmp_path / "other"
    (other / "transformers-0.0.1.dist-info").mkdir(parents=True)
    (other / "transformers-0.0.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 0.0.1\n")
    (other / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 30\n"
    )
    (tmp_path / "shared").mkdir()
    (tmp_path / "of-node1").symlink_to(tmp_path / "shared")
    alter = f"if [ $(hostname) = node2 ]; then export PYTHONPATH={other}:$PYTHONPATH; fi"
    report, findings = _examined(
        slurm, tmp_path, alter=alter, directory="of-$(hostname)", options="--patience-s 30"
    )
    assert report["complete"]
    bad = {check for check, finding in findings.items() if finding.state == "failure"} - {"disk"}
    assert bad == {"versions", "clocks", "shared files", "locks"}
    assert findings["versions"].seen.endswith(" on node1; 0.0.1 on node2")
    assert findings["versions"].seen.startswith("transformers: ")
    assert "node2 +30.0" in findings["clocks"].seen
    assert (
        "node1 does not see what node2 wrote; node2 does not see what node1" in findings["shared files"].seen
    )
    assert "node2 does not see that node1 holds one" in findings["locks"].seen


@pytest.mark.slow
def test_ranks_that_die_or_hang_are_named_and_hold_nobody_up(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Rank 1's disk never answers, as a dead network file system's; rank 3 is killed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, shutil, signal, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    shutil.disk_usage = lambda path: time.sleep(3600)\n"
        "if os.environ.get('RANK') == '3':\n"
        "    shutil.disk_usage = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    began = time.monotonic()
    report, findings = _examined(
        slurm,
        tmp_path,
        alter=f"export PYTHONPATH={tmp_path}:$PYTHONPATH",
        options="--patience-s 6",
        state="FAILED",
    )
    assert time.monotonic() - began < 120
    assert not report["complete"]
    assert report["missing"] == [{"rank": 3, "host": "node2", "step": "look around"}]
    told = {(error["rank"], error["host"], error["message"]) for error in report["errors"]}
    assert (1, "node1", "not done in 6 s") in told
    assert findings["ranks"].seen == "rank 3 on node2 did not answer in step 'look around'"


@pytest.mark.slow
def test_on_one_node_the_pairs_are_of_ranks(tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 1000)
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.slurm.doctor_rank", "--directory", tmp_path / "runs"],
            env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        assert [process.wait(180) for process in ranks] == [0, 0, 0]
    finally:
        for process in ranks:
            process.kill()
    report = json.loads((tmp_path / "runs" / "doctor.json").read_text())
    pairs = [(pair["a"], pair["b"]) for pair in report["pairs"]]
    assert sorted(pairs) == [("rank 0", "rank 1"), ("rank 0", "rank 2"), ("rank 1", "rank 2")]
    assert report["locks"] == []
    assert "failure" not in {finding.state for finding in job_findings(report) if finding.check != "disk"}


def test_a_missing_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert doctor_rank.main(["--directory", str(tmp_path)]) == 2
    assert "'RANK': set RANK, WORLD_SIZE" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, value in zip(doctor_rank.VARIABLES, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert doctor_rank.main(["--directory", str(tmp_path / "file" / "runs")]) == 1
    assert f"{tmp_path}/file/runs" in capsys.readouterr().err
