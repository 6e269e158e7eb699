"""The engine: parameter groups, DeepSpeed configs, and ZeRO 0-3 against one plain float32 loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learning.methods.base import Batch, Terms
from learning.training.deepspeed_setup import dtype_of, read_deepspeed_config, zero_stage
from learning.training.engine import Engine, Objective
from learning.training.rates import OptimizerConfig, parameter_groups
from tests.distributed_harness import run_distributed
from tests.training_case import CONFIGS, TinyMethod, part_of, tiny_batch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, lr_scale={"text": 0.5})
STEPS, CLIP = 20, 0.5


def test_groups_are_by_part_and_decay_spares_one_dimension() -> None:
    method = TinyMethod()
    groups = parameter_groups(method, OPTIMIZER)
    told = [(g["part"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
    assert told == [
        ("vision", 1e-2, 0.1, 2),
        ("vision", 1e-2, 0.0, 2),
        ("text", 5e-3, 0.1, 1),
        ("other", 1e-2, 0.0, 1),
    ]
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])


def test_an_unknown_part_is_refused_with_the_parts() -> None:
    with pytest.raises(ValueError, match=r"lr_scale: visoin is no trainable part .* vision, text, other"):
        parameter_groups(TinyMethod(), OptimizerConfig(learning_rate=1, lr_scale={"visoin": 0.1}))


def test_a_parameter_outside_all_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    method = TinyMethod()
    monkeypatch.setattr(method, "parts", lambda: {"vision": list(method.vision.parameters())})
    with pytest.raises(ValueError, match=r"leaves out .*text.weight"):
        parameter_groups(method, OptimizerConfig(learning_rate=1))


def test_a_shared_parameter_is_in_one_group() -> None:
    method = TinyMethod()
    method.extra = nn.Linear(8, 50, bias=False)
    method.extra.weight = method.text.weight
    groups = parameter_groups(method, OptimizerConfig(learning_rate=1))
    assert sum(p is method.text.weight for g in groups for p in g["params"]) == 1


class Misnamed(TinyMethod):
    """Computes a loss that the recipe does not weigh."""

    def forward(self, batch: Batch) -> Terms:
        return Terms({"cccl": super().forward(batch).losses["ccl"]})


def test_weights_and_terms_must_have_the_same_names() -> None:
    with pytest.raises(ValueError, match=r"weighs \['ccl'\], Misnamed computed \['cccl'\]"):
        Objective(Misnamed(), {"ccl": 1.0})(tiny_batch(0))


def test_the_loss_is_the_weighted_sum_of_the_terms_alone() -> None:
    method = TinyMethod()
    total, losses, report = Objective(method, {"ccl": 2.5})(tiny_batch(0))
    assert float(total.detach()) == pytest.approx(2.5 * float(losses["ccl"]))
    assert set(report) == {"temperature"}
    assert not losses["ccl"].requires_grad


def test_shipped_configs_say_what_their_name_says() -> None:
    paths = sorted(CONFIGS.glob("*.json"))
    assert len(paths) == 16
    for path in paths:
        config = read_deepspeed_config(path)
        stage, *offload, dtype = path.stem.removeprefix("zero").split("_")
        assert zero_stage(config) == int(stage)
        assert (
            dtype_of(config) == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        )
        assert ("offload_optimizer" in config["zero_optimization"]) == bool(offload)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 8}', "take 'train_batch_size' out; the recipe says it: contrastive_batch"),
        ('{"gradient_accumulation_steps": 2}', "accumulation adds no negatives"),
        ('{"optimizer": {}}', "take 'optimizer' out"),
        ("{", "is no JSON"),
        ("[]", "must hold one JSON object"),
    ],
)
def test_a_config_with_run_size_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json") as raised:
        read_deepspeed_config(path)
    assert message in str(raised.value)


def test_a_missing_config_lists_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"zero9.json: no such file; in .* zero0_bf16.json"):
        read_deepspeed_config(CONFIGS / "zero9.json")


def plain_state(steps: int = STEPS) -> dict[str, torch.Tensor]:
    return plain_run(steps)[0]


def plain_run(steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    """State and losses of AdamW on the joined batch in one process, without DeepSpeed."""
    torch.manual_seed(0)
    method = TinyMethod()
    optimizer = torch.optim.AdamW(parameter_groups(method, OPTIMIZER))
    objective = Objective(method, {"ccl": 1.0})
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate(step)
        optimizer.zero_grad()
        loss = objective(tiny_batch(step))[0]
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(method.parameters(), CLIP)
        optimizer.step()
    return {name: value.clone() for name, value in method.state_dict().items()}, losses


def rate(step: int) -> float:
    return 1.0 if step < STEPS // 2 else 0.1


def engine_state(rank: int, world_size: int, config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = Engine(
        TinyMethod(), {"ccl": 1.0}, OPTIMIZER, config, batch_per_gpu=8 // world_size, gradient_clip=CLIP
    )
    norms, losses = [], []
    for step in range(STEPS):
        result = engine.step(part_of(tiny_batch(step), rank, world_size), rate(step), want_norm=True)
        assert result.applied
        norms.append(result.gradient_norm)
        losses.append(float(result.total))
    state = engine.full_state()
    rates = engine.learning_rates()
    engine.close()
    return {"state": state, "norms": norms, "losses": losses, "rates": rates}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_follows_one_plain_process(stage: int) -> None:
    expected = plain_state()
    config = read_deepspeed_config(CONFIGS / f"zero{stage}_fp32.json")
    told = run_distributed(engine_state, 2, config)
    for rank in told:
        assert set(rank["state"]) == set(expected)
        for name, value in expected.items():
            assert rank["state"][name].dtype == torch.float32
            torch.testing.assert_close(rank["state"][name], value, rtol=1e-5, atol=1e-5)
        assert rank["rates"] == pytest.approx({"vision": 1e-3, "text": 5e-4, "other": 1e-3})
    assert told[0]["norms"] == pytest.approx(told[1]["norms"])
    assert min(told[0]["norms"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_offload_bf16"]
)
def test_bf16_follows_within_its_resolution(name: str) -> None:
    start, (expected, losses) = plain_state(0), plain_run()
    for told in run_distributed(engine_state, 2, read_deepspeed_config(CONFIGS / f"{name}.json")):
        moved = wrong = 0.0
        for key, value in expected.items():
            assert told["state"][key].dtype == torch.float32  # the master weights, not their bf16 copies
            moved += float((value - start[key]).square().sum())
            wrong += float((told["state"][key] - value).square().sum())
        # AdamW's first steps are those of signs: a gradient near 0 that rounds to the other side moves as
        # far. So 20 steps leave more than bf16's 2^-8: sixteen times that in the loss.
        assert wrong < 0.05 * moved
        assert told["losses"] == pytest.approx(losses, rel=2**-4)
        assert any(not torch.equal(v, v.bfloat16().float()) for v in told["state"].values())


@pytest.mark.slow
def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run_distributed(engine_state, 1, read_deepspeed_config(CONFIGS / "zero0_fp32.json"))[0]
    for name, value in plain_state().items():
        torch.testing.assert_close(told["state"][name], value, rtol=1e-5, atol=1e-5)


class Skipping:
    """What DeepSpeed's engine does when fp16 overflows: the step is not applied."""

    def __init__(self, engine: Any):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def was_step_applied(self) -> bool:
        return False


class Counting(TinyMethod):
    calls = 0

    def after_step(self) -> None:
        self.calls += 1


def skipped_steps(rank: int, world_size: int, config: dict[str, Any]) -> list[int]:
    method = Counting()
    engine = Engine(method, {"ccl": 1.0}, OptimizerConfig(learning_rate=1e-2), config, batch_per_gpu=8)
    engine.step(tiny_batch(0), 1.0)
    before = method.calls
    engine._engine = Skipping(engine._engine)
    result = engine.step(tiny_batch(1), 1.0)
    return [before, method.calls, int(result.applied)]


@pytest.mark.slow
def test_after_step_is_skipped_with_the_step() -> None:
    config = json.loads((CONFIGS / "zero0_fp32.json").read_text())
    assert run_distributed(skipped_steps, 1, config) == [[1, 1, 0]]


def refusals(rank: int, world_size: int) -> list[str]:
    told = []
    scalar = TinyMethod()
    scalar.temperature = nn.Parameter(torch.tensor(0.3))
    fp16 = read_deepspeed_config(CONFIGS / "zero1_fp16.json")
    for method, config in ((TinyMethod(), fp16), (scalar, {})):
        try:
            Engine(method, {"ccl": 1.0}, OptimizerConfig(learning_rate=1), config, batch_per_gpu=8)
        except ValueError as error:
            told.append(str(error))
    return told


def test_what_cannot_run_here_is_refused() -> None:
    fp16, scalar = refusals(0, 1)
    assert "fp16 does not run on a CPU" in fp16
    assert "temperature; give them the shape (1,)" in scalar
