"""Rows fetched from other ranks: values and gradients of plain indexing of the joined tensor."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from learning.training.distributed import sum_over_ranks
from learning.training.exchange import Exchange, _route, fetch_rows
from tests.distributed_harness import run_distributed

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """Rows of every rank, and the places that every rank wants."""

    rows: tuple[int, ...]
    wanted: tuple[tuple[int, ...], ...]
    stated: bool = True  # whether rows_by_rank is given


CASES: dict[int, tuple[Case, ...]] = {
    1: (
        Case((4,), ((3, 0, 0, 2, 1),)),
        Case((4,), ((),)),
        Case((4,), ((2, 2),), stated=False),
    ),
    2: (
        Case((3, 3), ((5, 0, 4), (2, 1, 3)), stated=False),
        Case((5, 2), ((6, 6, 0, 6, 4), (1, 6))),  # the same row by both, and more than once
        Case((2, 3), ((1, 0, 1), (0, 0))),  # rank 1 is asked for nothing
        Case((2, 3), ((), (4, 0, 3, 1))),  # rank 0 wants nothing
        Case((2, 2), ((), ())),
        Case((4, 0), ((3, 1), (0,))),  # rank 1 has nothing
    ),
    4: (
        Case((2, 2, 2, 2), ((7, 5, 3), (6, 0), (1,), (0, 4, 2, 7)), stated=False),
        Case(
            (4, 1, 3, 2), ((9, 4, 4), (), (0, 9, 5, 0), (3, 4))
        ),  # rank 2's row 5 alone, rank 1 wants nothing
        Case((1, 4, 2, 3), ((3, 2), (3,), (4, 1), (2, 3, 3))),  # all of rank 1
    ),
}


class Model(nn.Module):
    """Rows to features (…, 2), and what comes after the exchange."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(3, 2).double()
        self.temperature = nn.Parameter(torch.tensor([0.7], dtype=DOUBLE))

    def loss(self, own: Tensor, fetched: Tensor, places: Tensor) -> Tensor:
        """Of the own rows, and of each fetched one with its own weight."""
        weights = 1.0 + torch.arange(len(fetched), dtype=DOUBLE) + places.double() / 7
        told = torch.sin(fetched / self.temperature).flatten(1).sum(1) @ weights
        return told + (own * self.temperature).square().sum()


def inputs(case: Case) -> Tensor:
    """(rows, 2 tokens, 3): what is fetched may have any number of dimensions."""
    generator = torch.Generator().manual_seed(sum(case.rows))
    return torch.randn(sum(case.rows), 2, 3, generator=generator, dtype=DOUBLE)


def alone(case: Case) -> dict[str, Any]:
    """One process that has all rows."""
    model, x = Model(), inputs(case).requires_grad_()
    features = model.tower(x)
    parts = features.split(case.rows)
    fetched = [features[list(wanted)] for wanted in case.wanted]
    loss = torch.stack(
        [
            model.loss(own, rows, torch.tensor(wanted, dtype=torch.int64))
            for own, rows, wanted in zip(parts, fetched, case.wanted, strict=True)
        ]
    ).sum()
    loss.backward()
    assert x.grad is not None
    return {
        "loss": loss.detach(),
        "fetched": [rows.detach() for rows in fetched],
        "inputs": x.grad,
        "parameters": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def together(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """The same on one of several ranks, with parameter gradients averaged over ranks as an engine does."""
    told = []
    for case in cases:
        model = Model()
        first = sum(case.rows[:rank])
        whole = inputs(case)
        x = whole[first : first + case.rows[rank]].clone().requires_grad_()
        places = torch.tensor(case.wanted[rank], dtype=torch.int64)
        features = model.tower(x)
        fetched = fetch_rows(features, places, case.rows if case.stated else None)
        loss = sum_over_ranks(model.loss(features, fetched, places))
        loss.backward()
        assert x.grad is not None
        parameters = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
            parameters[name] = parameter.grad / world_size
        told.append(
            {
                "loss": loss.detach(),
                "fetched": fetched.detach(),
                "inputs": x.grad / world_size,
                "parameters": parameters,
                "others": others(whole, first, case, rank, places),
            }
        )
    return told


def others(whole: Tensor, first: int, case: Case, rank: int, places: Tensor) -> list[bool]:
    """Whole numbers, truth values and half precision by one question; what needs no gradient stays so."""
    own = slice(first, first + case.rows[rank])
    exchange = Exchange(places, case.rows)
    numbers = torch.arange(sum(case.rows)) * 11 - 3
    half = whole.bfloat16()
    return [
        torch.equal(exchange.fetch(numbers[own]), numbers[places]),
        torch.equal(exchange.fetch((numbers % 2 == 0)[own]), (numbers % 2 == 0)[places]),
        torch.equal(exchange.fetch(half[own]), half[places]),
        not exchange.fetch(half[own]).requires_grad,
    ]


def check(case: Case, told: list[dict[str, Any]]) -> None:
    expected = alone(case)
    for rank, found in enumerate(told):
        first = sum(case.rows[:rank])
        assert found["others"] == [True] * 4, (case, rank)
        assert torch.equal(found["fetched"], expected["fetched"][rank]), (case, rank)
        own = expected["inputs"][first : first + case.rows[rank]]
        for one, other in (
            (found["loss"], expected["loss"]),
            (found["inputs"], own),
            *((found["parameters"][name], value) for name, value in expected["parameters"].items()),
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda m: f"{case}: {m}")


def test_one_process_indexes() -> None:
    for case, told in zip(CASES[1], together(0, 1, CASES[1]), strict=True):
        check(case, [told])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_fetch_what_one_process_indexes(world_size: int) -> None:
    cases = CASES[world_size]
    ranks = run_distributed(together, world_size, cases)
    for number, case in enumerate(cases):
        check(case, [rank[number] for rank in ranks])


def test_a_place_outside_of_the_batch_is_refused() -> None:
    for place in (4, -1):
        with pytest.raises(IndexError):
            fetch_rows(torch.randn(4, 2), torch.tensor([0, place]))
        with pytest.raises(ValueError, match=str(place)):
            _route(torch.tensor([0, place]), (2, 2))


def late_rows(rank: int, world_size: int) -> list[bool]:
    """Gradients in half precision are summed in it no worse than to its own rounding."""
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    fetched = fetch_rows(x, torch.zeros(256, dtype=torch.int64), (1,) * world_size)
    sum_over_ranks(fetched.float().sum()).backward()
    assert x.grad is not None
    expected = (
        256.0 * world_size**2 if rank == 0 else 0.0
    )  # each of 256 rows of every rank, times the factor W
    return [x.grad.dtype == torch.bfloat16, bool((x.grad.float() == expected).all())]


@pytest.mark.slow
def test_many_gradients_of_one_row_add_up_in_bf16() -> None:
    """256 + 1 is 256 in bf16: a sum row by row would stand still."""
    assert run_distributed(late_rows, 2) == [[True, True]] * 2
