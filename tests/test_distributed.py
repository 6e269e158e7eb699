"""The collectives with gradient, against one float64 process; the ones for control."""

import pytest
import torch
import torch.distributed as dist

from learning.training import distributed
from tests.distributed_harness import run_distributed

ROWS, WIDTH = 8, 5


def joined_loss(z: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Contrasts every row with every other, and scales by a parameter that stands after the gather."""
    return torch.nn.functional.cross_entropy(z @ z.T / temperature, torch.arange(len(z)).flip(0))


def parameters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return x, weight, torch.tensor([0.7], dtype=torch.float64, requires_grad=True)


def rank_losses(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    """Value and engine-averaged gradients on one rank: of as many rows as the others have, and of others."""
    each = ROWS // world_size
    uneven = {1: (8,), 2: (7, 1), 4: (2, 1, 4, 1)}[world_size]
    return [rank_loss(rank, world_size, counts) for counts in ((each,) * world_size, uneven)]


def rank_loss(rank: int, world_size: int, counts: tuple[int, ...]) -> list[torch.Tensor]:
    x, weight, temperature = parameters()
    own = x[sum(counts[:rank]) : sum(counts[: rank + 1])]
    loss = joined_loss(
        distributed.gather(own @ weight, counts if len(set(counts)) > 1 else None), temperature
    )
    loss.backward()
    averaged = []
    for parameter in (weight, temperature):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        averaged.append(parameter.grad / world_size)
    return [loss.detach(), *averaged]


def rank_statistics(rank: int, world_size: int) -> list[torch.Tensor]:
    """Batch statistics over ranks feed every row: the gradient must cross ranks."""
    x, weight, _ = parameters()
    each = ROWS // world_size
    y = x[rank * each : (rank + 1) * each] @ weight
    mean = distributed.sum_over_ranks(y.sum(0)) / ROWS
    variance = distributed.sum_over_ranks(((y - mean) ** 2).sum(0)) / ROWS
    loss = joined_loss(distributed.gather((y - mean) / variance.sqrt()), torch.ones(1, dtype=torch.float64))
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    return [loss.detach(), weight.grad / world_size]


def rank_control(rank: int, world_size: int) -> list[object]:
    half = distributed.gather(torch.full((1, 2), rank + 0.5, dtype=torch.bfloat16))
    ids = distributed.gather(torch.tensor([rank]))
    return [
        distributed.all_reduce_max(rank == 1),
        distributed.broadcast_object({"from": rank}),
        distributed.gather_objects(rank * 10),
        distributed.mean_over_ranks({"b": rank, "a": 1.0}),
        half,
        ids,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gather_equals_one_process(world_size: int) -> None:
    x, weight, temperature = parameters()
    loss = joined_loss(x @ weight, temperature)
    loss.backward()
    for rank in run_distributed(rank_losses, world_size):
        for told in rank:
            for value, expected in zip(told, [loss.detach(), weight.grad, temperature.grad], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_sum_over_ranks_has_the_gradient_of_the_joined_batch(world_size: int) -> None:
    x, weight, _ = parameters()
    y = x @ weight
    normal = (y - y.mean(0)) / y.var(0, correction=0).sqrt()
    loss = joined_loss(normal, torch.ones(1, dtype=torch.float64))
    loss.backward()
    for told in run_distributed(rank_statistics, world_size):
        for value, expected in zip(told, [loss.detach(), weight.grad], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_control() -> None:
    for told in run_distributed(rank_control, 2):
        flag, broadcast, gathered, means, half, ids = told
        assert flag == 1
        assert broadcast == {"from": 0}
        assert gathered == [0, 10]
        assert means == {"a": 1.0, "b": 0.5}
        assert half.tolist() == [[0.5, 0.5], [1.5, 1.5]]
        assert ids.tolist() == [0, 1]


def test_one_process_needs_no_group() -> None:
    x = torch.ones(2, 3)
    assert distributed.gather(x) is x
    assert distributed.sum_over_ranks(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce_max(True) == 1
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.mean_over_ranks({"a": 2.0}) == {"a": 2.0}
