"""64 ranks on 8 nodes of a real SLURM: they start, all-reduce and train three steps, each where it should be.

    python -m benchmarks.slurm_64_ranks               # 26 GB of memory and swap
    python -m benchmarks.slurm_64_ranks --nodes 4 --gpus 4

A private cluster on this machine (tests/slurm_cluster.py), gloo and the CPU. `tandem submit` sends it, as any
other stage. Exits with 1 when a rank is not where it should be.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster

REPOSITORY = Path(__file__).parents[1]
RECIPE = """
name: ranks
tracking: {uri: "off"}
launch: {processes: 1}
stages:
  meet: {kind: benchmarks.ranks_stage}
"""
CLUSTER = """
name: ranks
train: {{partition: gpu, nodes: {nodes}, gpus_per_node: {gpus}, cpus_per_gpu: 1, time_limit: "00:30:00"}}
data: {{partition: cpu, time_limit: "00:30:00"}}
environment: {{variables: {{DS_ACCELERATOR: cpu}}}}
"""


def wrong(found: list[dict[str, Any]], nodes: int, gpus: int) -> list[str]:
    """Ranks that are not where SLURM's block distribution puts them, or that miss a GPU or the sum."""
    ranks = nodes * gpus
    devices = ",".join(map(str, range(gpus)))
    expected = [
        {
            "rank": rank,
            "node": f"node{rank // gpus + 1}",
            "local_rank": rank % gpus,
            "gpus": devices,
            "sum": ranks * (ranks - 1) / 2,
        }
        for rank in range(ranks)
    ]
    return [f"{seen}, not {right}" for seen, right in zip(found, expected, strict=True) if seen != right]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="a node")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with (
        tempfile.TemporaryDirectory() as name,
        SlurmCluster(Path(name) / "slurm", nodes=options.nodes, gpus_per_node=options.gpus) as cluster,
    ):
        folder = Path(name)
        (folder / "ranks.yaml").write_text(RECIPE)
        (folder / "cluster.yaml").write_text(CLUSTER.format(nodes=options.nodes, gpus=options.gpus))
        tandem = [sys.executable, "-P", "-m", "pipeline.cli"]
        began = time.monotonic()
        cluster.run(*tandem, "submit", "ranks.yaml", "--cluster", "cluster.yaml", cwd=folder)
        cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), 900, "the job to end")
        print(cluster.run(*tandem, "status", "ranks.yaml", cwd=folder))
        told = json.loads(next((folder / "runs/ranks/meet").glob("*/out/ranks.json")).read_text())
    mistakes = wrong(told["ranks"], options.nodes, options.gpus)
    took = time.monotonic() - began
    print(
        f"{len(told['ranks'])} ranks on {options.nodes} nodes, {len(mistakes)} misplaced; {took:.0f} s in all"
    )
    print(f"losses of {len(told['losses'])} steps: {', '.join(f'{loss:.4f}' for loss in told['losses'])}")
    for mistake in mistakes:
        print(mistake)
    sys.exit(int(bool(mistakes)))


if __name__ == "__main__":
    main()
