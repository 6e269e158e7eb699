"""A user at the login node of the tests' cluster: a recipe, a cluster file, `tandem` with SLURM in reach."""

import json
import subprocess
from pathlib import Path
from typing import Any

from pipeline.slurm.attempt import Ledger
from tests.pipeline_harness import TINY, command, environment, write_recipe
from tests.slurm_cluster import SlurmCluster

CLUSTER = """
name: tiny
train: {partition: gpu, nodes: 1, gpus_per_node: 2, cpus_per_gpu: 1, time_limit: "00:10:00"}
data: {partition: cpu, cpus: 1, time_limit: "00:10:00"}
environment: {variables: {DS_ACCELERATOR: cpu}}
save_s: 30
"""


class Desk:
    """A user of the cluster: a recipe, a cluster file, and `tandem` with SLURM in reach."""

    def __init__(self, slurm: SlurmCluster, folder: Path, recipe: str = TINY, cluster: str = CLUSTER):
        self.slurm, self.folder = slurm, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = write_recipe(folder, recipe)
        self.cluster = folder / "cluster.yaml"
        self.cluster.write_text(cluster)

    def tandem(self, *arguments: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            command(arguments[0], self.recipe, *arguments[1:]),
            cwd=self.folder,
            env=environment() | {**self.slurm.environment, "PYTHONPATH": environment()["PYTHONPATH"]},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *options: str | Path) -> dict[str, dict[str, Any]]:
        """Its stages by name."""
        text = self.tandem("submit", "--cluster", self.cluster, "--json", *options)
        return {stage["stage"]: stage for stage in json.loads(text)["stages"]}

    def status(self) -> dict[str, dict[str, Any]]:
        stages = json.loads(self.tandem("status", "--json"))["stages"]
        return {stage["stage"]: stage for stage in stages}

    def wait(self, timeout_s: float = 120) -> dict[str, dict[str, Any]]:
        """Until no job of anybody is left; the status then."""
        self.slurm.wait_until(
            lambda: not self.slurm.run("squeue", "--noheader").strip(), timeout_s, "all jobs to end"
        )
        return self.status()

    def directory(self, stage: str) -> Path:
        return Path(self.status()[stage]["directory"])

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        """How each start of the stage ended."""
        return [row for row in Ledger(self.directory(stage)).rows() if row["event"] == "end"]

    def step(self, stage: str) -> int:
        """The last that the stage logged; 0 before there is one."""
        paths = list((self.folder / "runs/tiny" / stage).glob("*/log/metrics.jsonl"))
        lines = paths[0].read_text().splitlines() if paths else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def rank_pid(job: str, rank: int) -> int:
    """The process of a rank, seen from outside its node."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            values = path.read_bytes().split(b"\0")
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        wanted = (f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode())
        if (
            b"pipeline.slurm.rank" in command
            and command.count(b"srun") == 0
            and all(w in values for w in wanted)
        ):
            return int(path.parent.name)
    raise RuntimeError(f"no process of rank {rank} of job {job}")
