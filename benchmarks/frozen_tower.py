"""What freezing the image tower saves: memory and time of a training step, beside one that trains it.

python -m benchmarks.frozen_tower                                    (a minute of one idle core, 3 GB)
python -m benchmarks.frozen_tower --steps 3 --batch 8

Measured: the baseline method with CLIP's tower at ViT-B/16's patches, 6 layers of 384, and the engine's own
step in fp32 on the CPU. Memory is all that PyTorch holds at most while two steps run, weights among it (bytes
counted as tensors come and go); the optimizer's state is counted by itself. Time: the CPU seconds of one
thread, both engines in one process, step by step in turn; the ratio of the medians.
Counted, nothing computed: ViT-L/14 and BERT-base, 32 pictures of 224 px a GPU in bf16. A backward pass is
taken as twice its forward pass; under a frozen tower there is none.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from learning import methods
from learning.encoders.clip_vision import ClipVisionConfig, ClipVisionEncoder
from learning.methods.base import Batch, Method, Texts
from learning.training import distributed
from learning.training.engine import Engine
from learning.training.estimate import BERT_VOCABULARY, bytes_per_gpu, estimate
from learning.training.footprint import LiveBytes, footprint
from learning.training.rates import OptimizerConfig

MIB, GIB = 2**20, 2**30
LENGTH = 32  # tokens a text
SMALL: dict[str, Any] = {
    "method": "clip",
    "vision": {
        "tower": "clip",
        "layers": 6,
        "width": 384,
        "heads": 6,
        "intermediate": 1536,
        "patch_px": 16,
        "image_px": 224,
    },
    "text": {"name": "bert_mini", "max_length": LENGTH},
    "dimension": 256,
}
PAPER: dict[str, Any] = {
    "method": "clip",
    "vision": {"tower": "clip", "name": "clip_vit_l14", "image_px": 224},
    "text": {"name": "bert_base", "max_length": LENGTH},
    "dimension": 768,
}
PAPER_BATCH = 32  # pictures a GPU (R2D2, Sec. 4.1)
GPUS = 64


@dataclass(frozen=True)
class Held:
    """Bytes, of one way."""

    weights: int
    state: int  # AdamW's
    peak: int  # all at most, weights and state among it


class Way:
    """The method with its tower frozen or trained, its batch, and its engine."""

    def __init__(self, trainable: bool, batch: int):
        torch.manual_seed(0)
        config = methods.parse_config(with_tower(SMALL, trainable))
        self.method = methods.build(config, ("ccl",), BERT_VOCABULARY).train()
        self.weights = sum(p.nbytes for p in self.method.parameters())
        self.batch = made_batch(self.method, batch)

    def held(self) -> Held:
        """The engine is made and takes two steps: the first makes the optimizer's state."""
        live = LiveBytes()
        live.ignore([*self.method.parameters(), *self.method.buffers(), *tensors_of(self.batch)])
        with live:
            rates = OptimizerConfig(learning_rate=1e-4)
            self.engine = Engine(self.method, {"ccl": 1.0}, rates, {}, batch_per_gpu=len(self.batch))
            for _ in range(2):
                self.engine.step(self.batch, 1.0)
        states = self.engine._optimizer.state.values()
        state = sum(x.nbytes for each in states for x in each.values() if isinstance(x, Tensor) and x.ndim)
        return Held(self.weights, state, self.weights + live.peak)

    def step_s(self) -> float:
        begun = time.process_time()
        self.engine.step(self.batch, 1.0)
        return time.process_time() - begun


def with_tower(values: dict[str, Any], trainable: bool) -> dict[str, Any]:
    return values | {"vision": values["vision"] | {"trainable": trainable}}


def made_batch(method: Method, count: int) -> Batch:
    """Noise, and texts of full length: what is in them does not matter here."""
    generator = torch.Generator().manual_seed(0)
    px = SMALL["vision"]["image_px"]
    ids = torch.randint(5, BERT_VOCABULARY, (count, LENGTH), generator=generator)
    return Batch(
        {name: torch.randn(count, 3, px, px, generator=generator) for name in method.views().images},
        {name: Texts(ids, torch.ones_like(ids)) for name in method.views().texts},
        [str(number) for number in range(count)],
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    return [*batch.images.values(), *(x for texts in batch.texts.values() for x in (texts.ids, texts.mask))]


def measured(batch: int, steps: int) -> None:
    distributed.init()
    try:
        ways = {"trained": Way(True, batch), "frozen": Way(False, batch)}
        held = {name: way.held() for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(steps + 1):
            for name in sorted(ways, reverse=bool(turn % 2)):
                took = ways[name].step_s()
                if turn:  # the first is the warm-up
                    seconds[name].append(took)
        for way in ways.values():
            way.engine.close()
    finally:
        distributed.shutdown()
    print(f"measured: 6 layers of 384, batch {batch}, fp32, one thread")
    rows = {
        "weights, MiB": [held[name].weights / MIB for name in ways],
        "AdamW's state, MiB": [held[name].state / MIB for name in ways],
        "peak of a step, MiB": [held[name].peak / MIB for name in ways],
        "a step, CPU s (median)": [statistics.median(seconds[name]) for name in ways],
    }
    show(rows)
    pairs = zip(seconds["frozen"], seconds["trained"], strict=True)
    ratios = sorted(frozen / trained for frozen, trained in pairs)
    print(f"frozen/trained, a pair of steps: {ratios[0]:.2f} to {ratios[-1]:.2f}\n")


def counted() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        tower = ClipVisionEncoder(ClipVisionConfig.model_validate(PAPER["vision"]))
        tower(torch.empty(PAPER_BATCH, 3, tower.config.image_px, tower.config.image_px))
    of_tower = flops.get_total_flops()
    rows: dict[str, list[float]] = {
        name: [] for name in ("activations, GiB", "TFLOP a step", "states a GPU under ZeRO-1, GiB")
    }
    for trainable in (True, False):
        values = with_tower(PAPER, trainable)
        told = footprint(values, ("ccl",), PAPER_BATCH, torch.bfloat16, BERT_VOCABULARY)
        sizes = estimate(values, ("ccl",), GPUS)
        states = bytes_per_gpu(sizes.trainable, sizes.frozen, sizes.largest_layer, GPUS)["zero1"]
        backward = 2 * (told.forward_flops - (0 if trainable else of_tower))
        rows["activations, GiB"].append(told.activation_bytes / GIB)
        rows["TFLOP a step"].append((told.forward_flops + backward) / 1e12)
        rows["states a GPU under ZeRO-1, GiB"].append(states / GIB)
    print(f"counted: ViT-L/14, {PAPER_BATCH} pictures a GPU, bf16, {GPUS} GPUs")
    show(rows)


def show(rows: dict[str, list[float]]) -> None:
    print(f"{'':32}{'trained':>10}{'frozen':>10}{'ratio':>8}")
    for name, (trained, frozen) in rows.items():
        print(f"{name:32}{trained:10.2f}{frozen:10.2f}{frozen / trained:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7, help="timed, of each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured(options.batch, options.steps)
    counted()


if __name__ == "__main__":
    main()
