"""How long training stands still for one checkpoint: written while it waits, and in the background.

    python -m benchmarks.checkpoint_stall
    python -m benchmarks.checkpoint_stall --parameters 5_000_000 --repeats 2

Two CPU ranks over gloo save in turn: a checkpoint that is awaited, one in the background. Stall: the time
that the loop spends in saving (copying, agreeing, committing) and not in steps. Where no core is free,
hashing and writing slow the steps as well: the last column counts that in, against steps beside which
nothing is written.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from learning.training.checkpoint import Checkpoints
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig
from tests.distributed_harness import run_distributed
from tests.training_case import CONFIGS, TinyMethod, part_of, tiny_batch

WIDTH = 1024
WARM_UP = 3
RANKS = 2


class Loop:
    """Steps and checkpoints as learning/training/loop.py interleaves them."""

    def __init__(self, rank: int, world_size: int, config: str, parameters: int):
        words = max(64, (parameters - 3 * 16 * 16 * WIDTH - WIDTH * WIDTH) // WIDTH)
        self.engine = Engine(
            TinyMethod(words=words, width=WIDTH),
            {"ccl": 1.0},
            OptimizerConfig(learning_rate=1e-3),
            read_deepspeed_config(CONFIGS / f"{config}.json"),
            batch_per_gpu=8 // world_size,
        )
        self.batch = part_of(tiny_batch(0), rank, world_size)
        self.number = 0

    def step(self) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        self.engine.step(self.batch, 1.0)
        self.number += 1
        return time.perf_counter() - begun

    def checkpoint(self, checkpoints: Checkpoints) -> tuple[float, float, int]:
        """Seconds in saving, seconds from begin to commit, steps in between."""
        begun, steps = time.perf_counter(), 0
        checkpoints.begin(self.number, {}, self.engine.save, self.engine.state_bytes())
        settled = checkpoints.settle(wait=not checkpoints.background)
        stall = time.perf_counter() - begun
        while settled is None:
            self.step()
            steps += 1
            asked = time.perf_counter()
            settled = checkpoints.settle(wait=False)
            stall += time.perf_counter() - asked
        assert settled.problem is None, settled.problem
        return stall, time.perf_counter() - begun, steps


def measure(rank: int, world_size: int, folder: str, config: str, parameters: int, repeats: int) -> Any:
    """A row of (stall, whole, steps) a checkpoint, by kind; the step's seconds; bytes of a checkpoint."""
    loop = Loop(rank, world_size, config, parameters)
    for _ in range(WARM_UP):
        loop.step()
    kinds = {
        kind: Checkpoints(Path(folder) / kind, keep=1, background=kind == "background")
        for kind in ("awaited", "background")
    }
    rows: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    steps: list[float] = []
    for _ in range(repeats):
        for kind, checkpoints in kinds.items():
            steps += [loop.step() for _ in range(2)]
            rows[kind].append([float(value) for value in loop.checkpoint(checkpoints)])
    found = kinds["awaited"].newest()
    assert found is not None
    size = sum(path.stat().st_size for path in found.directory.rglob("*") if path.is_file())
    return {"rows": rows, "step_s": statistics.median(steps), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--config", default="zero1_fp32", help="of ds_configs/")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        told = run_distributed(
            measure, RANKS, folder, options.config, options.parameters, options.repeats, timeout_s=3600
        )[0]
    print(
        f"{options.parameters:,} parameters, {options.config}, {RANKS} ranks, "
        f"{told['bytes'] / 2**20:.0f} MiB; a step {told['step_s']:.3f} s; medians of {options.repeats}"
    )
    titles = f"{'stall s':>9} {'to commit s':>12} {'steps meanwhile':>16} {'with slower steps s':>20}"
    print(f"{'checkpoint':12} {titles}")
    stalls = {}
    for kind, rows in told["rows"].items():
        stall, whole, steps = (statistics.median(column) for column in zip(*rows, strict=True))
        stalls[kind] = stall
        slower = statistics.median(row[1] - row[2] * told["step_s"] for row in rows)
        print(f"{kind:12} {stall:9.3f} {whole:12.3f} {steps:16.0f} {slower:20.3f}")
    print(
        f"the stall in the background is {stalls['background'] / stalls['awaited']:.1%} of the awaited one's"
    )


if __name__ == "__main__":
    main()
