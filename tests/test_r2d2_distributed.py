"""R2D2 on several ranks: ten steps leave what one plain process leaves: weights, teacher, queues, centres."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from learning.training.contrast import ContrastConfig
from learning.training.engine import Objective
from tests import r2d2_case
from tests.distributed_harness import run_distributed
from tests.plain_engine import PlainEngine
from tests.r2d2_case import EQ_8, MODEL, Plain, build, momentum
from tests.r2d2_reference import Stored
from tests.test_r2d2 import FROZEN_CNN, WEIGHTS

COUNT, STEPS, RATE = 8, 10, 0.004  # at 0.05 rounding grows a hundredfold a step
EVEN = {1: (8,), 2: (4, 4), 4: (2, 2, 2, 2)}
UNEVEN = {1: (8,), 2: (5, 3), 4: (3, 1, 2, 2)}
FROZEN_VIT = {"vision": MODEL["vision"] | {"trainable": False}}


@dataclass(frozen=True)
class Case:
    """A recipe, and how its rows lie on the ranks."""

    losses: tuple[str, ...]
    model: str = "vit"
    enhanced: bool = True
    uneven: bool = False
    how: str = "full"
    ids: int = COUNT  # different ones of a batch
    steps: int = 1

    def build(self) -> Any:
        changed: dict[str, Any] = FROZEN_CNN if self.model == "cnn" else {}
        if self.model == "frozen vit":
            changed = FROZEN_VIT
        made = build(self.losses, enhanced_training=self.enhanced, **changed)
        made.contrast = ContrastConfig(how=self.how, block=3)  # type: ignore[arg-type]
        return made

    def batch(self, model: Any, step: int) -> Any:
        """Ids come again in later steps: then the queues hold positives."""
        ids = [(3 * step + row) % self.ids for row in range(COUNT)]
        return r2d2_case.batch(model, COUNT, seed=step, ids=ids)


LONG = Case(EQ_8, "frozen vit", ids=7, steps=STEPS)
CASES = (
    LONG,
    Case(EQ_8, "cnn", uneven=True, steps=3),
    Case(EQ_8, enhanced=False, uneven=True, ids=5),
    Case(EQ_8, ids=1),  # no rank has a negative
    Case(EQ_8, ids=2, uneven=True),  # a rank's rows may all show the same
    Case(("gcpr", "fgr", "mlm", "fgd"), uneven=True, how="blockwise", ids=5),
    Case(("gcpr", "fgr"), how="local"),
    Case(("match",), uneven=True),
    Case(("mlm",), uneven=True),
)
CASES_OF = {1: CASES, 2: CASES, 4: CASES[:2] + CASES[4:5]}  # by ranks: four take long on two cores


def steps(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """Each case's steps on one rank; what it then holds."""
    return [_steps(rank, world_size, case) for case in cases]


def _steps(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    model = case.build()
    rows_by_rank = (UNEVEN if case.uneven else EVEN)[world_size]
    engine = PlainEngine(Objective(model, {name: WEIGHTS[name] for name in case.losses}))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}
    for step in range(case.steps):
        model.zero_grad()
        batch = r2d2_case.rows(case.batch(model, step), rows_by_rank, rank)
        if not case.uneven:
            batch.rows_by_rank = None
        losses.append(engine.backward_of(batch, None)[1])
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
            gradients[name] = parameter.grad.clone()
            parameter.data -= RATE * parameter.grad
        model.after_step()
    return {"losses": losses, "gradients": gradients} | state(model)


def state(model: Any) -> dict[str, Any]:
    """Weights and momentum, in words that no layout of a queue has a part in."""
    kept = momentum(model)
    return {
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "teacher": kept.teacher,
        "image_queue": as_dict(kept.image_queue),
        "text_queue": as_dict(kept.text_queue),
        "centres": {"image": kept.image_centre, "text": kept.text_centre},
    }


def as_dict(queue: Stored) -> dict[str, Any]:
    return {"features": queue.features, "ids": queue.ids, "weights": queue.weights}


def plain(case: Case) -> dict[str, Any]:
    """The same steps in one process by the reference alone: its losses, its autograd, its momentum."""
    model = case.build()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = momentum(model)
    losses, gradients = [], {}
    for step in range(case.steps):
        model.zero_grad()
        batch = case.batch(model, step)
        told = Plain(model, batch, kept, quick=True).told()
        losses.append({name: loss.detach() for name, loss in told.losses.items()})
        torch.stack([WEIGHTS[name] * loss for name, loss in told.losses.items()]).sum().backward()
        for name, parameter in trained.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = gradient.clone()
            parameter.data -= RATE * gradient
        if kept.teacher:
            kept.after_step(dict(model.named_parameters()), told.images, told.texts, batch.ids.tolist())
    found = {"losses": losses, "gradients": gradients} | state(model)
    if kept.teacher:
        found["teacher"] = kept.teacher
    if "gcpr_tgd" in case.losses:
        found |= {"image_queue": as_dict(kept.image_queue), "text_queue": as_dict(kept.text_queue)}
    if "fgd" in case.losses:
        found["centres"] = {"image": kept.image_centre, "text": kept.text_centre}
    return found


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return [plain(case) for case in CASES]


def close(ours: Any, theirs: Any, at: str) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), at
        for name, value in theirs.items():
            close(ours[name], value, f"{at}: {name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), at
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            close(one, other, f"{at}: {number}")
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=lambda text: f"{at}: {text}")
    else:
        assert ours == pytest.approx(theirs, rel=1e-12), at


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_learn_and_remember_what_one_plain_process_does(
    world_size: int, expected: list[dict[str, Any]]
) -> None:
    """Losses, averaged gradients, and after ten steps order, ids and weights of the queues, μ and teacher."""
    cases = CASES_OF[world_size]
    ranks = (
        [steps(0, 1, cases)] if world_size == 1 else run_distributed(steps, world_size, cases, timeout_s=400)
    )
    for rank, found in enumerate(ranks):
        for case, ours in zip(cases, found, strict=True):
            close(ours, expected[CASES.index(case)], f"rank {rank} of {world_size}: {case}")


def test_the_plain_process_goes_round_its_queue(expected: list[dict[str, Any]]) -> None:
    """Else the test above would see no ring's end, no positive in a queue, no teacher that stands still."""
    long = expected[CASES.index(LONG)]
    queue = long["text_queue"]
    assert len(queue["ids"]) == 20 < STEPS * COUNT
    assert queue["weights"][-1] == 1.0
    assert queue["weights"][0] == pytest.approx(0.99**2)
    assert set(queue["ids"]) == set(range(7))
    moved = max(float((long["teacher"][n] - long["weights"][n]).abs().max()) for n in long["teacher"])
    assert moved > 1e-3
    assert float(long["centres"]["text"].abs().max()) > 1e-2
