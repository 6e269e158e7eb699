"""Rows of other ranks, fetched by their place in the global batch: only those that are asked for travel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor

from learning.training.distributed import rank, world_size


class _Route(NamedTuple):
    """Which rows go where, as one rank sees it."""

    order: Int64[Tensor, " k"]  # what it wants, by the rank that has it: places in `wanted`
    arriving: list[int]  # rows from each rank
    leaving: list[int]  # rows to each rank
    own: Int64[Tensor, " l"]  # its rows that leave, in the order in which they do


class Exchange:
    """One question to all ranks, for several tensors with the same rows. All ranks make it together."""

    def __init__(self, wanted: Int64[Tensor, " k"], rows_by_rank: Sequence[int]):
        """`wanted`: places in the global batch, rank 0's rows first; each rank may want other ones, and none.

        `rows_by_rank`: rows of every rank. Raises ValueError for a place that is not in the batch; one rank
        alone raises IndexError in `fetch`: looking first would wait for the device.
        """
        self.wanted, self.rows = wanted, int(rows_by_rank[rank()])
        self._route = _route(wanted, rows_by_rank) if world_size() > 1 else None

    def fetch(self, x: Shaped[Tensor, " b *d"]) -> Shaped[Tensor, " k *d"]:
        """The wanted rows of a tensor that every rank has its part of, with gradient.

        Backward brings each row's gradients back to the rank that has it and sums them: the convention of
        learning/training/distributed.py.
        """
        if self._route is None:
            return x.index_select(0, self.wanted)  # refuses a negative place too
        return _Fetch.apply(x, self._route)


def fetch_rows(
    x: Shaped[Tensor, " b *d"], wanted: Int64[Tensor, " k"], rows_by_rank: Sequence[int] | None = None
) -> Shaped[Tensor, " k *d"]:
    """`Exchange` of one tensor; `rows_by_rank` None: all ranks have as many rows as this one."""
    return Exchange(wanted, rows_by_rank or (len(x),) * world_size()).fetch(x)


class _Fetch(torch.autograd.Function):
    """All to all, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route) -> Tensor:
        ctx.route, ctx.rows = route, len(x)
        sent = _moved(x[route.own], route.leaving, route.arriving)
        fetched = torch.empty_like(sent)
        fetched[route.order] = sent
        return fetched

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        back = _moved(gradient[route.order], route.arriving, route.leaving)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        summed = torch.zeros((ctx.rows, *gradient.shape[1:]), dtype=wide, device=gradient.device)
        summed.index_add_(0, route.own, back.to(wide))
        return summed.to(gradient.dtype), None


def _route(wanted: Int64[Tensor, " k"], rows_by_rank: Sequence[int]) -> _Route:
    batch = sum(rows_by_rank)
    outside = wanted[(wanted < 0) | (wanted >= batch)].tolist()
    if outside:
        raise ValueError(f"wanted: {outside} are no rows of a batch of {batch}; rows are 0 … {batch - 1}")
    ends = torch.tensor(rows_by_rank, device=wanted.device).cumsum(0)
    owners = torch.searchsorted(ends, wanted, right=True)
    order = owners.argsort(stable=True)
    # both are short: a number a rank, and a number a row
    arriving = torch.bincount(owners, minlength=len(ends))
    leaving = torch.empty_like(arriving)
    dist.all_to_all_single(leaving, arriving)
    inside = wanted[order] - (ends - torch.tensor(rows_by_rank, device=ends.device))[owners[order]]
    to, of = arriving.tolist(), leaving.tolist()
    return _Route(order, to, of, _moved(inside, to, of))


def _moved(x: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
    """Rows sent to each rank, and rows that come from each, in rank order."""
    received = x.new_empty((sum(arriving), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), arriving, leaving)
    return received
