"""Bytes a rank really holds and gives to collectives under ZeRO 0-3, beside learning/training/scale.py's.

python -m benchmarks.scale_check                       1, 2 and 4 ranks of this machine's CPU, bf16 and fp32
python -m benchmarks.scale_check --ranks 2 --configs zero1_bf16

Every tensor that is made counts, each storage once, so DeepSpeed's flat buffers and copies do too; the
batch does not. Collectives are counted where torch.distributed is called, by their payload.
"""

import argparse
import gc
import inspect
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learning import methods
from learning.methods.base import Batch, Texts
from learning.training.deepspeed_setup import dtype_of, read_deepspeed_config, zero_stage
from learning.training.engine import Engine
from learning.training.footprint import LiveBytes
from learning.training.rates import OptimizerConfig
from learning.training.scale import Held, Moved, held, moved
from tests.distributed_harness import run_distributed

CONFIGS = Path(__file__).parents[1] / "ds_configs"
NAMES = [f"zero{stage}_{dtype}" for dtype in ("bf16", "fp32") for stage in range(4)]
BUCKET = 200_000  # elements: the shipped buckets are larger than this whole model
MODEL: dict[str, Any] = {
    "method": "clip",
    "vision": {"name": "test_vit", "image_px": 64},
    "text": {"layers": 4, "width": 128, "heads": 2, "intermediate": 512, "max_length": 12},
    "dimension": 64,
}
BATCH, PX, WORDS = 4, 64, 12
# what a collective moves is named by this argument of it
PAYLOAD = {
    "all_reduce": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "all_gather": "tensor_list",
    "reduce_scatter_tensor": "input",
    "reduce_scatter": "input_list",
    "broadcast": "tensor",
    "reduce": "tensor",
}


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Payload bytes by kind of collective, of the calls inside."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in PAYLOAD}

    def counting(name: str) -> Any:
        original, signature = originals[name], inspect.signature(originals[name])

        def call(*args: Any, **kwargs: Any) -> Any:
            payload = signature.bind(*args, **kwargs).arguments[PAYLOAD[name]]
            tensors = payload if isinstance(payload, list | tuple) else [payload]
            counts[name] += sum(tensor.nbytes for tensor in tensors)
            return original(*args, **kwargs)

        return call

    for name in PAYLOAD:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def small_buckets(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config with buckets that fit this model, and every parameter partitioned."""
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            zero[key] = BUCKET
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return config


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 900, (BATCH, WORDS), generator=generator)
    images = torch.randn(BATCH, 3, PX, PX, generator=generator)
    return Batch(
        {"image": images}, {"text": Texts(ids, torch.ones_like(ids))}, [str(i) for i in range(BATCH)]
    )


def settled(live: LiveBytes, wait_s: float = 0.5) -> int:
    """Bytes alive once none is on its way out: gloo's threads let go of tensors after a collective's end."""
    gc.collect()
    least, until = live.live, time.monotonic() + wait_s
    while time.monotonic() < until:
        time.sleep(0.01)
        if live.live < least:
            least, until = live.live, time.monotonic() + wait_s
    return least


def measure(rank: int, world_size: int, names: list[str]) -> list[dict[str, Any]]:
    """Of the third step of an engine of each config: bytes held, and payload bytes by kind of collective."""
    with counted_collectives() as counts:  # once a process: DeepSpeed keeps the functions that it finds first
        return [_third_step(name, counts) for name in names]


def _third_step(name: str, counts: Counter[str]) -> dict[str, Any]:
    config, batches = small_buckets(name), [batch(step) for step in range(3)]
    torch.manual_seed(0)
    before_step: list[int] = []
    with LiveBytes() as live:
        method = methods.build(methods.parse_config(MODEL), ("ccl",), 1000)
        parameters = sum(p.numel() for p in method.parameters())
        engine = Engine(
            method, {"ccl": 1.0}, OptimizerConfig(learning_rate=1e-3), config, batch_per_gpu=BATCH
        )
        step = engine._engine.step

        def noting(*args: Any) -> Any:
            before_step.append(settled(live))
            return step(*args)

        engine._engine.step = noting
        for each in batches:
            counts.clear()
            engine.step(each, 1.0)
        after_step = settled(live)
    engine.close()
    return {
        "parameters": parameters,
        "after_step": after_step,
        "before_step": before_step[-1],
        "collectives": dict(counts),
    }


def expected(name: str, parameters: int, ranks: int) -> tuple[Held, Moved]:
    config = small_buckets(name)
    stage, dtype = zero_stage(config), dtype_of(config)
    return (
        held(parameters, 0, stage, dtype, ranks, bucket=BUCKET),
        moved(parameters, stage, dtype, ranks, samples=BATCH * ranks, features=2 * MODEL["dimension"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--configs", nargs="+", default=NAMES)
    options = parser.parse_args()
    print("bytes a parameter: measured (formula)")
    print(f"{'ranks':>5} {'config':12} {'held after a step':>20} {'before it':>18} {'to collectives':>18}")
    for ranks in options.ranks:
        found = run_distributed(measure, ranks, options.configs, timeout_s=590)[0]
        for name, told in zip(options.configs, found, strict=True):
            count = told["parameters"]
            holds, moves = expected(name, count, ranks)
            pairs = [
                (told["after_step"], holds.after_step),
                (told["before_step"], holds.before_step),
                (sum(told["collectives"].values()), moves.payload),
            ]
            shown = " ".join(f"{real / count:9.3f} ({said / count:6.3f})" for real, said in pairs)
            print(f"{ranks:5} {name:12} {shown}   {told['collectives']}", flush=True)


if __name__ == "__main__":
    main()
