"""Small towers trained by Tandem's own loop, for the benchmarks: the time of its steps, block by block.

As a program it is one rank of benchmarks/peer_training.py: it prints images, wall and CPU seconds as JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.photos import captions
from data_tools.shards import ShardIndex
from learning import methods
from learning.methods.base import Method
from learning.tokenizer import train_wordpiece
from learning.training import distributed
from learning.training.augment import ImageTransform
from learning.training.checkpoint import CheckpointConfig, Checkpoints
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig
from learning.training.loader import Batches, DataConfig, Failed, Loaded
from learning.training.loop import fit
from learning.training.plan import Plan
from learning.training.schedule import ScheduleConfig

CONFIGS = Path(__file__).parents[1] / "ds_configs"
HALF = (0.5, 0.5, 0.5)
DIMENSION, LAYERS, WIDTH, HEADS, TOKENS = 128, 2, 128, 2, 32
VOCABULARY = 49_408  # open_clip's: the embedding is to be as large


def model_config(tower: str, image_px: int) -> dict[str, Any]:
    """A recipe's `model` section."""
    text = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "intermediate": 4 * WIDTH, "dropout": 0.0}
    return {
        "method": "clip",
        "vision": {"name": tower, "image_px": image_px},
        "text": text | {"max_length": TOKENS},
        "dimension": DIMENSION,
    }


def build(tower: str, image_px: int) -> Method:
    torch.manual_seed(0)
    return methods.build(methods.parse_config(model_config(tower, image_px)), ("ccl",), VOCABULARY)


class ReadyBatches(Batches):
    """The batch of step 0, whatever the step: made once."""

    def __getitem__(self, step: int) -> Loaded | Failed:
        if not hasattr(self, "_ready"):
            self._ready = super().__getitem__(0)
        return self._ready


def make_batches(corpus: Path, method: Method, image_px: int, batch: int, ready: bool) -> Batches:
    return (ReadyBatches if ready else Batches)(
        ShardIndex.open(corpus, "train"),
        train_wordpiece(captions(), 400),
        ImageTransform(image_px, HALF, HALF),
        method.views(),
        DataConfig(texts=("title",)),
        seed=0,
        contrastive_batch=batch,
        max_length=TOKENS,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


class Clock:
    """The loop's Shown: wall and CPU seconds of each block of steps, `between` called after each."""

    def __init__(self, blocks: int, between: Callable[[], None] = lambda: None):
        self.blocks: list[tuple[float, float]] = []
        self._wanted, self._between = blocks, between

    def begin(self, step: int, steps: int) -> None:
        self._start = now()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.blocks.append(since(self._start))
        self._between()
        self._start = now()

    def advance(self, n: int, **shown: Any) -> None:
        """Nothing is shown."""

    def should_stop(self) -> bool:
        return len(self.blocks) >= self._wanted


def now() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def train(method: Method, batches: Batches, clock: Clock, steps: int, directory: Path) -> None:
    """Blocks of `steps` steps until the clock has as many as it wants."""
    engine = Engine(
        method,
        {"ccl": 1.0},
        OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, betas=(0.9, 0.98)),
        read_deepspeed_config(CONFIGS / "zero0_fp32.json"),
        batch_per_gpu=batches.contrastive_batch // distributed.world_size(),
        gradient_clip=0.0,
        log_file=directory / f"deepspeed_{distributed.rank()}.log",
    )
    plan = Plan(10**6, ScheduleConfig(), CheckpointConfig(every_steps=10**9), log_every_steps=steps)
    fit(engine, batches, plan, Checkpoints(directory, 1), clock)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="that all ranks see, for a checkpoint")
    parser.add_argument("--tower", required=True)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--batch", type=int, required=True, help="over all ranks")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ready", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    try:
        method = build(options.tower, options.image_px)
        batches = make_batches(options.corpus, method, options.image_px, options.batch, options.ready)
        clock = Clock(blocks=2)  # the first is the warm-up
        with tempfile.TemporaryDirectory(dir=options.directory) as own:
            place = Path(distributed.broadcast_object(own))
            train(method, batches, clock, options.steps, place)
            distributed.barrier()
        wall, cpu = clock.blocks[1]
        told = distributed.gather_objects(cpu)
        if distributed.rank() == 0:
            images = options.steps * options.batch
            print(json.dumps({"images": images, "wall_s": wall, "cpu_s": sum(told)}))
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    main()
