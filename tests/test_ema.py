"""Averaged weights: against a plain simulation under ZeRO 0-3, over skipped steps, and over a resume."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learning.training.checkpoint import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.ema import Ema, EmaConfig
from learning.training.engine import AVERAGES, Engine
from learning.training.rates import OptimizerConfig
from tests.distributed_harness import run_distributed
from tests.test_engine import Skipping
from tests.training_case import CONFIGS, TinyMethod, part_of, tiny_batch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
EMA = EmaConfig(decay=0.9)


def test_the_warm_up_starts_low_and_ends_at_the_decay() -> None:
    config = EmaConfig(decay=0.999, warmup=True)
    assert [config.at(0), config.at(8)] == [0.1, 0.5]
    assert config.at(10_000) == 0.999
    assert EmaConfig(decay=0.999).at(0) == 0.999


def test_the_exchange_loses_nothing() -> None:
    weights = [torch.zeros(3), torch.zeros(2, 2)]
    ema = Ema(lambda: weights, EmaConfig(decay=0.75))
    for weight in weights:
        weight += 4.0
    ema.update()
    with ema.exchanged():
        assert [float(w.mean()) for w in weights] == [1.0, 1.0]
    assert [float(w.mean()) for w in weights] == [4.0, 4.0]
    ema.update()
    with ema.exchanged():
        assert float(weights[0][0]) == 1.75


def make(config: dict[str, Any], world_size: int = 1, ema: EmaConfig | None = EMA) -> Engine:
    torch.manual_seed(0)
    each = 8 // world_size
    return Engine(
        TinyMethod(), {"ccl": 1.0}, OPTIMIZER, config, batch_per_gpu=each, gradient_clip=0.5, ema=ema
    )


def follow(rank: int, world_size: int, name: str) -> None:
    """10 steps; after each the averages are those of a plain loop over the weights."""
    engine = make(read_deepspeed_config(CONFIGS / f"{name}.json"), world_size)
    names = {n for n, p in engine.method.named_parameters() if p.requires_grad}
    simulated = engine.full_state(averaged=False)
    for step in range(10):
        engine.step(part_of(tiny_batch(step), rank, world_size), 1.0)
        weights = engine.full_state(averaged=False)
        simulated = {n: EMA.decay * simulated[n] + (1 - EMA.decay) * w for n, w in weights.items()}
        told = engine.full_state()
        for key, value in told.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, simulated[key], rtol=1e-6, atol=1e-7)
            assert key not in names or not torch.equal(value, weights[key])
    engine.close()


def resume(rank: int, world_size: int, name: str, elsewhere: str, folder: str) -> None:
    """4 steps, saved, loaded by a new engine, 4 more: the bits of 8. Another ZeRO stage reads them too."""
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    directory = Path(folder) / name

    def run(engine: Engine, steps: range) -> dict[str, Tensor]:
        for step in steps:
            engine.step(part_of(tiny_batch(step), rank, world_size), 1.0)
        return engine.full_state() | {f"plain {n}": v for n, v in engine.full_state(averaged=False).items()}

    first = make(config, world_size)
    at_four = run(first, range(4))
    writer = Writer(directory)
    first.save(directory, writer)
    assert writer.error is None
    torch.distributed.barrier()
    expected = run(first, range(4, 8))
    first.close()
    second = make(config, world_size)
    second.load(directory)
    told = run(second, range(4, 8))
    second.close()
    assert set(told) == set(expected)
    for key, value in expected.items():
        assert torch.equal(told[key], value), key
    other = make(read_deepspeed_config(CONFIGS / f"{elsewhere}.json"), world_size)
    other._load_averages(directory / AVERAGES)
    for key, value in other.full_state().items():
        assert torch.equal(value, at_four[key]), key
    other.close()


def on_ranks(rank: int, world_size: int, names: list[str], folder: str) -> int:
    for place, name in enumerate(names):
        follow(rank, world_size, name)
        resume(rank, world_size, name, names[place - 1], folder)
    return len(names)


@pytest.mark.slow
def test_averages_follow_a_plain_loop_and_resume_bit_by_bit() -> None:
    names = ["zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32", "zero0_bf16", "zero1_bf16", "zero3_bf16"]
    with tempfile.TemporaryDirectory() as folder:
        assert run_distributed(on_ranks, 2, names, folder, timeout_s=400) == [len(names)] * 2


def alone(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """One skipped step; and a checkpoint without averages."""
    engine = make({}, ema=EmaConfig(decay=0.5))
    assert engine._ema is not None
    engine.step(tiny_batch(0), 1.0)
    before = engine.full_state()
    engine._engine = Skipping(engine._engine)
    engine.step(tiny_batch(1), 1.0)
    same = all(torch.equal(value, before[name]) for name, value in engine.full_state().items())
    plain = make({}, ema=None)
    plain.save(Path(folder), Writer(Path(folder)))
    try:
        make({}).load(Path(folder))
    except ValueError as error:
        return {"updates": engine._ema.updates, "same": same, "refusal": str(error)}
    return {}


@pytest.mark.slow
def test_a_skipped_step_is_not_averaged_and_a_checkpoint_without_averages_is_refused(tmp_path: Path) -> None:
    told = run_distributed(alone, 1, str(tmp_path))[0]
    assert (told["updates"], told["same"]) == (1, True)
    assert "ema.pt: missing: the checkpoint was written without `ema`" in told["refusal"]
