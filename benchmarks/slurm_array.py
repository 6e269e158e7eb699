"""A job array on a real SLURM of which some tasks fail: submitted again, those run alone.

    python -m benchmarks.slurm_array                      # 200 tasks, 5 of them fail
    python -m benchmarks.slurm_array --tasks 20 --fail 2

A private cluster on this machine (tests/slurm_cluster.py). The stage squares 1,000 numbers, a line for each
in made.log. Exits with 1 when another task ran again, or a number was squared twice or not at all.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster

REPOSITORY = Path(__file__).parents[1]
NUMBERS = 1000
RECIPE = f"""
name: squares
tracking: {{uri: "off"}}
stages:
  squares: {{kind: tests.tiny.squares, count: {NUMBERS}}}
"""
CLUSTER = """
name: array
train: {{partition: gpu, nodes: 1, gpus_per_node: 1, time_limit: "00:30:00"}}
data: {{partition: cpu, cpus: 1, time_limit: "00:30:00", tasks: {tasks}, tasks_at_once: 4}}
restarts: {{failures: 0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--fail", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    broken = sorted(random.Random(0).sample(range(options.tasks), options.fail))
    with tempfile.TemporaryDirectory() as name, SlurmCluster(Path(name) / "slurm", nodes=2) as cluster:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "cluster.yaml").write_text(CLUSTER.format(tasks=options.tasks))

        def tandem(*arguments: str) -> dict[str, Any]:
            command = [
                sys.executable,
                "-P",
                "-m",
                "pipeline.cli",
                arguments[0],
                "recipe.yaml",
                *arguments[1:],
            ]
            told: dict[str, Any] = json.loads(cluster.run(*command, "--json", cwd=folder))["stages"][0]
            return told

        def submit() -> tuple[str, dict[str, Any], float]:
            """What was sent, the state at the end, seconds."""
            began = time.monotonic()
            sent = tandem("submit", "--cluster", "cluster.yaml")["what"]
            cluster.wait_until(
                lambda: not cluster.run("squeue", "--noheader").strip(), 3000, "all jobs to end"
            )
            return sent, tandem("status"), time.monotonic() - began

        for task in broken:
            (folder / f"fail_{task}").write_text("crash")
        first, failed, first_s = submit()
        for task in broken:
            (folder / f"fail_{task}").unlink()
        second, done, second_s = submit()
        made = [line.split()[0] for line in (folder / "made.log").read_text().splitlines()]
    print(f"tasks that are to fail: {', '.join(map(str, broken))}")
    print(f"first:  {first}: {failed['state']}, {failed['tasks_done']} tasks done; {first_s:.0f} s")
    print(f"        {failed['error']} (task {failed['error_task']})")
    print(f"second: {second}: {done['state']}, {done['tasks_done']} tasks done; {second_s:.0f} s")
    print(f"{len(made)} squares made, {len(set(made))} of {NUMBERS} numbers")
    well = (
        failed["tasks_done"] == options.tasks - options.fail
        and second.startswith(f"{options.fail} of {options.tasks} tasks")
        and done["state"] == "done"
        and len(made) == len(set(made)) == NUMBERS
    )
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
