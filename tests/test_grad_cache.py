"""GradCache: parts of a batch, and steps of the engine that equal the undivided step's, dropout and all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from learning.methods.base import Batch, Texts
from learning.training import grad_cache
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig
from stages.base import StageError
from stages.pretrain import Config, run
from tests.distributed_harness import run_distributed
from tests.training_case import (
    CONFIGS,
    MODEL,
    TinyMethod,
    config_values,
    make_job,
    part_of,
    tiny_batch,
    write_corpus,
)

MICRO, STEPS = 3, 3
# eps well above a gradient's rounding: AdamW's first steps else turn the sign of a rounding into a whole step
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-4, lr_scale={"text": 0.5})


class Dropping(TinyMethod):
    """With dropout on both sides, from torch's generator."""

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {name: self._dropped(e) for name, e in super().encode(batch).items()}

    def _dropped(self, embedding: Tensor) -> Tensor:
        return nn.functional.normalize(nn.functional.dropout(embedding, 0.3, self.training), dim=-1)


class Divided(Dropping):
    """Embeds part by part within one graph: the undivided step with the random numbers of the divided one."""

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        parts = [super(Divided, self).encode(part) for part in grad_cache.parts_of(batch, MICRO)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def trained(
    rank: int, world_size: int, method: type[TinyMethod], name: str, micro_batch: int | None
) -> dict[str, Any]:
    """Weights, losses, gradient norms and the next random number after some steps."""
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    if name.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small ones are split too
    torch.manual_seed(0)
    engine = Engine(
        method(),
        {"ccl": 1.0},
        OPTIMIZER,
        config,
        batch_per_gpu=16 // world_size,
        gradient_clip=0.5,
        micro_batch=micro_batch,
    )
    torch.manual_seed(rank)
    results = []
    for step in range(STEPS):
        batch = part_of(tiny_batch(step, 16), rank, world_size)
        results.append(engine.step(batch, 1.0, want_norm=True))
    state = engine.full_state()
    engine.close()
    return {
        "state": state,
        "losses": [float(result.total) for result in results],
        "norms": [result.gradient_norm for result in results],
        "random": torch.rand(1).item(),
    }


NAMES = tuple(f"zero{stage}_fp32" for stage in range(4))


def both_ways(rank: int, world_size: int) -> list[list[dict[str, Any]]]:
    """The undivided step and the divided one under every ZeRO stage, in one start of the processes."""
    return [
        [trained(rank, world_size, Divided, name, None), trained(rank, world_size, Dropping, name, MICRO)]
        for name in NAMES
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_equal_the_undivided_ones_under_every_zero_stage(world_size: int) -> None:
    for told in run_distributed(both_ways, world_size, timeout_s=300):
        for name, (whole, divided) in zip(NAMES, told, strict=True):
            assert whole["losses"] == pytest.approx(divided["losses"], rel=1e-5), name
            assert whole["norms"] == pytest.approx(divided["norms"], rel=1e-4), name
            assert whole["random"] == divided["random"], name  # nothing was drawn twice
            torch.testing.assert_close(divided["state"], whole["state"], rtol=1e-5, atol=1e-5)
    start = TinyMethod().state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in told[0][0]["state"].items())


@pytest.mark.slow
def test_a_recipe_asks_for_it(tmp_path: Path) -> None:
    """From corpus to out/, with a frozen tower's tokens from the cache and a blockwise loss."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    text = MODEL["text"] | {"dropout": 0.0}
    model = MODEL | {"vision": MODEL["vision"] | {"trainable": False}, "text": text, "dropout": 0.0}
    optimizer = {"learning_rate": 1e-3, "eps": 1e-4}
    plain = config_values(model=model, data={"cache": "tokens"}, optimizer=optimizer, epochs=1)
    divided = plain | {"micro_batch": 3, "contrast": {"how": "blockwise", "block": 3}}
    for name, values in {"plain": plain, "divided": divided}.items():
        run(Config(**values), make_job(tmp_path / name, corpus))
    whole, parts = (load_file(tmp_path / name / "out/model.safetensors") for name in ("plain", "divided"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    learns = config_values(micro_batch=3)
    with pytest.raises(StageError, match=r"micro_batch: vision\.backbone\.\S+ and \d+ more normalise"):
        run(Config(**learns), make_job(tmp_path / "refused", corpus))


def test_parts_are_even_and_together_the_batch() -> None:
    batch = tiny_batch(0, 8)
    batch.tokens = {"image": torch.arange(8.0)}
    parts = grad_cache.parts_of(batch, 3)
    assert [len(part) for part in parts] == [2, 3, 3]
    assert [key for part in parts for key in part.keys] == batch.keys
    for name in ("images", "tokens"):
        whole = getattr(batch, name)["image"]
        assert torch.equal(torch.cat([getattr(part, name)["image"] for part in parts]), whole)
    assert torch.equal(torch.cat([part.texts["text"].ids for part in parts]), batch.texts["text"].ids)
    assert grad_cache.parts_of(batch, None) == grad_cache.parts_of(batch, 8) == [batch]


def test_ranks_with_other_numbers_of_rows_make_as_many_parts() -> None:
    def rows(count: int, counts: tuple[int, ...]) -> Batch:
        ids = torch.zeros(count, 2, dtype=torch.int64)
        return Batch({}, {"text": Texts(ids, ids)}, ["k"] * count, rows_by_rank=counts)

    parts = [[len(p) for p in grad_cache.parts_of(rows(n, (7, 3)), 3)] for n in (7, 3)]
    assert parts == [[2, 2, 3], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"micro_batch: 3 makes 3 parts of 7 rows, .* set it to 4 or more"):
        grad_cache.parts_of(rows(7, (7, 2)), 3)


class Normed(TinyMethod):
    """With batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


def test_statistics_of_the_batch_are_refused() -> None:
    method = Normed()
    with pytest.raises(ValueError, match=r"micro_batch: norm .*set model.vision.batch_norm: frozen"):
        Engine(method, {"ccl": 1.0}, OPTIMIZER, {}, batch_per_gpu=8, micro_batch=4)
    method.eval()
    grad_cache.refuse_what_needs_all(TinyMethod())
    with pytest.raises(ValueError, match="micro_batch"):
        grad_cache.refuse_what_needs_all(method)
    assert not method.training
