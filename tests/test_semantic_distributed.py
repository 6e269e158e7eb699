"""Semantic Sharing on several ranks: losses and gradients are those of one plain process."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from learning.training.engine import Objective
from tests import semantic_case
from tests.distributed_harness import run_distributed
from tests.plain_engine import PlainEngine
from tests.semantic_case import ALL, BERT, EQ_6, GRID, Plain, build
from tests.test_semantic_sharing import GLOBAL, WEIGHTS

COUNT = 5
ROWS = {1: (5,), 2: (2, 3)}


@dataclass(frozen=True)
class Case:
    """A recipe; `seed` of its batch."""

    losses: tuple[str, ...]
    model: str = "regions"
    seed: int = 0

    def build(self) -> Any:
        changed: dict[str, dict[str, Any]] = {
            "regions": {},
            "separate": {"sharing": "separate"},
            "grid": GRID | {"text": BERT},
            "global": GLOBAL,
        }
        return build(self.losses, **changed[self.model])


CASES = (
    Case(ALL),
    Case(EQ_6, "separate", seed=1),
    Case(("labels", "words", "triplet"), "grid", seed=2),
    Case(("consistency",), "global", seed=3),
    Case(("words", "objects"), seed=4),
)


def steps(rank: int, world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    """Each case's losses and averaged gradients on one rank."""
    found = []
    for case in CASES:
        model = case.build()
        batch = semantic_case.rows(semantic_case.batch(model, COUNT, case.seed), ROWS[world_size], rank)
        engine = PlainEngine(Objective(model, {name: WEIGHTS[name] for name in case.losses}))
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.grad = torch.zeros_like(parameter)
        losses = engine.backward_of(batch, None)[1]
        found.append({"losses": losses, "gradients": engine.averaged_gradients()})
    return found


@pytest.fixture(scope="module")
def expected() -> list[dict[str, dict[str, Tensor]]]:
    """By the reference alone, on the whole batch."""
    found = []
    for case in CASES:
        model = case.build()
        losses = Plain(model, semantic_case.batch(model, COUNT, case.seed)).losses()
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
        }
        found.append({"losses": {n: loss.detach() for n, loss in losses.items()}, "gradients": gradients})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_compute_what_one_plain_process_does(
    world_size: int, expected: list[dict[str, dict[str, Tensor]]]
) -> None:
    """Two rows and three: a mean of means would differ, and so would a mask drawn by each rank's own rows."""
    ranks = [steps(0, 1)] if world_size == 1 else run_distributed(steps, world_size, timeout_s=200)
    for rank, found in enumerate(ranks):
        for case, ours, theirs in zip(CASES, found, expected, strict=True):
            for part in ("losses", "gradients"):
                assert set(ours[part]) == set(theirs[part])
                for name, value in theirs[part].items():
                    torch.testing.assert_close(
                        ours[part][name].detach(),
                        value,
                        rtol=1e-7,
                        atol=1e-10,
                        msg=lambda text, at=f"rank {rank} of {world_size}, {case}, {name}": f"{at}: {text}",
                    )
