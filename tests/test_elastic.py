"""A checkpoint of other ranks or another ZeRO stage: weights, moments, steps, buffers, frozen parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learning.training import distributed, elastic
from learning.training.checkpoint_files import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.elastic import Layout, Saved, stretch
from learning.training.engine import Engine, OptimizerConfig
from tests.distributed_harness import run_distributed
from tests.training_case import CONFIGS, PX, TinyMethod, part_of, tiny_batch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, lr_scale={"text": 0.5})
BEFORE, AFTER = 3, 3  # steps
FP32 = [f"zero{stage}_fp32" for stage in range(4)]
BF16 = ["zero0_bf16", "zero2_bf16", "zero3_bf16"]


class Stateful(TinyMethod):
    """With what only a checkpoint knows: a queue, a teacher that does not learn, a rank's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(4, 8))
        self.teacher = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.norm = nn.BatchNorm1d(3 * PX * PX, affine=False)

    def embed_images(self, images: Tensor) -> Tensor:
        self.norm(images.detach().flatten(1))
        return super().embed_images(images)

    def after_step(self) -> None:
        self.queue += 1


def engine(name: str, seed: int, world_size: int) -> Engine:
    torch.manual_seed(seed)
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    return Engine(Stateful(), {"ccl": 1.0}, OPTIMIZER, config, batch_per_gpu=8 // world_size)


def take(made: Engine, steps: range, rank: int, world_size: int) -> list[float]:
    batches = [part_of(tiny_batch(step), rank, world_size) for step in steps]
    return [float(made.step(batch, 1.0).total) for batch in batches]


def save_each(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Any]:
    """Checkpoints by config; what each engine held, and the losses of the steps that follow."""
    told: dict[str, Any] = {}
    for name in names:
        made = engine(name, 0, world_size)
        take(made, range(BEFORE), rank, world_size)
        directory = Path(folder) / name
        writer = Writer(directory)
        made.save(directory, writer)
        assert writer.error is None
        state = made.full_state()
        told[name] = {"state": state, "losses": take(made, range(BEFORE, BEFORE + AFTER), rank, world_size)}
        made.close()
    return told


def load_each(rank: int, world_size: int, folder: str, pairs: list[tuple[str, str]]) -> list[Any]:
    """Each checkpoint into an engine of another config, and the losses of the steps that follow."""
    told = []
    for source, target in pairs:
        made = engine(target, 1, world_size)  # other weights: nothing may be left of them
        made.load(Path(folder) / source)
        state = made.full_state()
        told.append({"state": state, "losses": take(made, range(BEFORE, BEFORE + AFTER), rank, world_size)})
        made.close()
    return told


def check(pairs: list[tuple[str, str]], loaded: list[Any], saved: dict[str, Any]) -> None:
    for (source, target), told in zip(pairs, loaded, strict=True):
        expected = saved[source]
        assert set(told["state"]) == set(expected["state"])
        for name, value in expected["state"].items():
            exact = torch.equal(told["state"][name], value)
            assert exact or "running" in name, f"{source} → {target}: {name}"
            torch.testing.assert_close(told["state"][name], value, rtol=2**-7, atol=1e-6)
        tolerance = 1e-5 if "fp32" in source else 2**-6
        assert told["losses"] == pytest.approx(expected["losses"], rel=tolerance), f"{source} → {target}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_state_moves_between_ranks_and_zero_stages(tmp_path: Path) -> None:
    folder = str(tmp_path)
    saved = run_distributed(save_each, 2, folder, FP32 + BF16, timeout_s=600)[0]
    assert float(saved["zero1_fp32"]["state"]["queue"][0, 0]) == BEFORE

    distributed.init()
    try:
        pairs = [*zip(FP32, FP32[1:] + FP32[:1], strict=True), ("zero2_fp32", "zero2_fp32")]
        check(pairs, load_each(0, 1, folder, pairs), saved)
        alone = str(tmp_path / "alone")
        saved_alone = save_each(0, 1, alone, ["zero0_fp32", "zero3_fp32"])
    finally:
        distributed.shutdown()

    across = list(zip(FP32[1:] + FP32[:1], FP32, strict=True))
    across += list(zip(BF16, BF16[1:] + BF16[:1], strict=True))
    check(across, run_distributed(load_each, 2, folder, across, timeout_s=600)[1], saved)
    grown = [("zero0_fp32", "zero1_fp32"), ("zero3_fp32", "zero0_fp32"), ("zero3_fp32", "zero3_fp32")]
    check(grown, run_distributed(load_each, 2, alone, grown, timeout_s=600)[1], saved_alone)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("values", [1, 2, 6, 7, 15])
def test_stretches_cover_a_parameter_once(values: int, ranks: int) -> None:
    cuts = [stretch(values, rank, ranks) for rank in range(ranks)]
    assert [i for _, first, end in cuts for i in range(first, end)] == list(range(values))
    assert all(end - first <= each for each, first, end in cuts)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"_optim_states.pt of rank 0, 1 is not there"):
        Saved(tmp_path, Layout(2, 1, [["a"]]))


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of another model; b, c differ"):
        elastic.load(tmp_path, Layout(2, 1, [["a"], ["b"]]), Layout(1, 1, [["a", "c"]]), None)
