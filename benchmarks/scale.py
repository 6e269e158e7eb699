"""A recipe's training stages on many GPUs, on paper: memory, bytes moved, FLOPs, steps and hours.

python -m benchmarks.scale recipes/cookie.yaml --gpus 48 64 --peak-tflops 125 --mfu 0.3 --gb-per-s 10

Memory, bytes and FLOPs come from the model's own shapes (learning/training/scale.py, footprint.py), with
DeepSpeed's estimator beside them. The peak of the GPU, the share of it that is used (MFU) and the bandwidth
of a GPU's link are assumptions that the caller states. Nothing is trained.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learning import methods
from learning.model_files import without_weights
from learning.training.deepspeed_setup import dtype_of, read_deepspeed_config, zero_stage
from learning.training.estimate import BERT_VOCABULARY, estimate
from learning.training.footprint import Footprint, footprint
from learning.training.scale import held, moved
from pipeline.recipe import load

GIB = 2**30


@dataclass(frozen=True)
class Assumed:
    """What the shapes do not tell."""

    peak_tflops: float
    mfu: float
    gb_per_s: float


def features(config: Any, losses: tuple[str, ...]) -> int:
    """fp32 numbers a sample that ranks exchange: one embedding a view."""
    values = without_weights(config.model)
    with torch.device("meta"):
        views = methods.build(methods.parse_config(values), losses, BERT_VOCABULARY).views()
    return int(config.model["dimension"]) * (len(views.images) + len(views.texts))


def row(config: Any, deepspeed: dict[str, Any], samples: int, gpus: int, assumed: Assumed) -> dict[str, Any]:
    """One stage on `gpus` GPUs; a global batch that they do not divide is rounded up to one that they do."""
    losses, dtype, stage = tuple(config.losses), dtype_of(deepspeed), zero_stage(deepspeed)
    each = math.ceil(config.contrastive_batch / gpus)
    batch = each * gpus
    counted = estimate(config.model, losses, gpus)
    plain: Footprint = footprint(config.model, losses, each, dtype, BERT_VOCABULARY)
    again = footprint(config.model, losses, each, dtype, BERT_VOCABULARY, recomputed=True)
    holds = held(counted.trainable, counted.frozen, stage, dtype, gpus)
    numbers = features(config, losses)
    moves = moved(
        counted.trainable, stage, dtype, gpus, samples=batch, features=numbers, frozen=counted.frozen
    )
    exchange = moved(0, stage, dtype, gpus, samples=batch, features=numbers)
    steps = config.epochs * (samples // batch)
    flops = plain.training_flops(recomputed=False)
    compute_s = flops / (assumed.mfu * assumed.peak_tflops * 1e12)
    link_s = moves.on_the_wire / (assumed.gb_per_s * 1e9)
    return {
        "GPUs": str(gpus),
        "batch": f"{gpus} × {each}",
        "steps": f"{steps:,}",
        "states GiB": f"{holds.before_step / GIB:.2f}",
        "DeepSpeed's": f"{counted.bytes_per_gpu[f'zero{stage}'] / GIB:.2f}",
        "activations GiB": f"{plain.activation_bytes / GIB:.2f}",
        "recomputed": f"{again.activation_bytes / GIB:.2f}",
        "sent GB a step": f"{moves.on_the_wire / 1e9:.2f}",
        "of it features": f"{exchange.on_the_wire / 1e9:.4f}",
        "TFLOP a step": f"{flops / 1e12:.2f}",
        "compute s": f"{compute_s:.3f}",
        "link s": f"{link_s:.3f}",
        "hours": f"{steps * compute_s / 3600:.1f} to {steps * (compute_s + link_s) / 3600:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[48, 64])
    parser.add_argument("--peak-tflops", type=float, default=125.0, help="of a GPU in the recipe's precision")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak that training reaches")
    parser.add_argument("--gb-per-s", type=float, default=10.0, help="that a GPU sends, GB = 10^9 bytes")
    options = parser.parse_args()
    assumed = Assumed(options.peak_tflops, options.mfu, options.gb_per_s)
    recipe = load(options.recipe)
    first = True
    for name, stage in recipe.stages.items():
        config: Any = stage
        if config.kind not in ("pretrain", "finetune"):
            continue
        deepspeed = read_deepspeed_config(recipe.directory / config.deepspeed)
        samples = recipe.head.samples[config.inputs["corpus"]]
        for gpus in options.gpus:
            told = {"stage": name} | row(config, deepspeed, samples, gpus, assumed)
            if first:
                print("| " + " | ".join(told) + " |\n|" + "---|" * len(told))
            first = False
            print("| " + " | ".join(told.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
