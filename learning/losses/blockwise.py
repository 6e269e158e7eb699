"""The contrastive losses over a stream of key blocks: memory grows with block × queries, not with the keys.

Value and gradients are those of learning/losses/contrastive.py; logits are made again in backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from learning.losses.contrastive import Ids, Queue, Rows, check_rows, widened


def info_nce_rows_blockwise(
    queries_bd: Float[Tensor, "b d"],
    keys_nd: Float[Tensor, "n d"],
    temperature: Float[Tensor, ""] | float,
    *,
    first: int = 0,
    ids: Ids | None = None,
    queue: Queue | None = None,
    block: int,
) -> Rows:
    """`info_nce_rows`, `block` keys at a time, with gradient to queries, keys and temperature.

    The log-sum-exp is online: log Σ over all blocks so far, the maximum of each block taken out of it. Beside
    what goes in and out it holds one (b, block) matrix, and sums over keys in fp32 (float64 for float64).
    Raises ValueError as `info_nce_rows` does, and for a block of no keys.
    """
    check_rows(queries_bd, keys_nd, first, ids, queue)
    if block < 1:
        raise ValueError(f"contrast.block: {block} keys at a time; there must be at least one")
    temperature = torch.as_tensor(temperature, device=queries_bd.device)
    losses_b, best_b = _InfoNCE.apply(queries_bd, keys_nd, temperature, first, ids, queue, block)
    if ids is None:
        return Rows(losses_b, best_b == torch.arange(first, first + len(best_b), device=best_b.device))
    return Rows(losses_b, ids.keys_n[best_b] == ids.queries_b)


def hinge_rows(
    queries_bd: Float[Tensor, "b d"],
    keys_nd: Float[Tensor, "n d"],
    margin: float,
    *,
    first: int = 0,
    block: int,
) -> Rows:
    """One direction of COOKIE, Eq. 13, a query at a time: [α + S(q, hardest wrong key) - S(q, own key)]₊.

    Key `first` + i is query i's own. The hardest key is looked for `block` keys at a time and without
    gradient; of keys that are equally hard the first gets the gradient, where `hardest_negative_hinge` shares
    it out. Raises ValueError for shapes that do not fit, and where there is no wrong key.
    """
    check_rows(queries_bd, keys_nd, first)
    own_b = torch.arange(first, first + len(queries_bd), device=queries_bd.device)
    with torch.no_grad():
        nearest, hardest = _Best(queries_bd), _Best(queries_bd)
        for start in range(0, len(keys_nd), block):
            similarity = queries_bd @ keys_nd[start : start + block].T
            nearest.see(similarity, start)
            similarity.diagonal(first - start).fill_(-torch.inf)
            hardest.see(similarity, start)
    right_b = (queries_bd * keys_nd[own_b]).sum(dim=1)
    wrong_b = (queries_bd * keys_nd[hardest.place_b]).sum(dim=1)
    return Rows(F.relu(margin + wrong_b - right_b), nearest.place_b == own_b)


class _Best:
    """The largest value of each row over blocks of columns, and its column; the first of equals."""

    def __init__(self, like_bd: Tensor):
        self.value_b = like_bd.new_full((len(like_bd),), -torch.inf)
        self.place_b = torch.zeros(len(like_bd), dtype=torch.int64, device=like_bd.device)

    def see(self, values: Float[Tensor, "b k"], start: int) -> Float[Tensor, " b"]:
        """The largest of these columns, the first of which is column `start`."""
        value_b, place_b = values.max(dim=1)
        better_b = value_b > self.value_b
        self.place_b = torch.where(better_b, place_b + start, self.place_b)
        self.value_b = torch.where(better_b, value_b, self.value_b)
        return value_b


class _Block(NamedTuple):
    """Some keys: of the batch, from key `start` on, or of the queue (`start` is None)."""

    keys_kd: Tensor
    start: int | None
    ids_k: Int64[Tensor, " k"] | None
    log_weights_k: Float[Tensor, " k"] | None


class _InfoNCE(torch.autograd.Function):
    """Losses and nearest batch keys of queries.

    With s_ij = q_i·k_j/τ + log w_j, L_i = log Σ_j exp s_ij - Σ_j t_ij s_ij, where t_ij is 1/|P(i)| for i's
    positives and 0 for other keys. So with c_ij = g_i (exp(s_ij - lse_i) - t_ij), g_i the gradient of L_i:
    dq_i = Σ_j c_ij k_j / τ; dk_j = Σ_i c_ij q_i / τ; and as s depends on q/τ alone, dτ = -Σ_i q_i·dq_i / τ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_bd: Tensor,
        keys_nd: Tensor,
        temperature: Tensor,
        first: int,
        ids: Ids | None,
        queue: Queue | None,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        scaled_bd = widened(queries_bd) / temperature
        lse_b = scaled_bd.new_full((len(scaled_bd),), -torch.inf)
        aligned_b, counts_b = torch.zeros_like(lse_b), torch.zeros_like(lse_b)
        best = _Best(scaled_bd)
        for part in _blocks(keys_nd, ids, queue, block):
            logits = _logits(scaled_bd, part)
            if ids is None:
                own = _own(logits, first, part)
                after = max(part.start - first, 0) if part.start is not None else 0
                aligned_b[after : after + len(own)] += own
            else:
                positive = _positive(ids, part)
                aligned_b += logits.masked_fill(~positive, 0.0).sum(dim=1)
                counts_b += positive.sum(dim=1)
            top_b = logits.amax(dim=1) if part.start is None else best.see(logits, part.start)
            top_b = top_b.clamp(min=torch.finfo(top_b.dtype).min)  # a block may have weights of 0 alone
            sums_b = logits.sub_(top_b[:, None]).exp_().sum(dim=1)
            lse_b = torch.logaddexp(lse_b, top_b + sums_b.log())
        if ids is None:
            counts_b.fill_(1.0)
        ctx.save_for_backward(queries_bd, keys_nd, temperature, lse_b, counts_b)
        ctx.rest = first, ids, queue, block
        ctx.mark_non_differentiable(best.place_b)
        return lse_b - aligned_b / counts_b, best.place_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_b: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries_bd, keys_nd, temperature, lse_b, counts_b = ctx.saved_tensors
        first, ids, queue, block = ctx.rest
        scaled_bd = widened(queries_bd) / temperature
        weighted_bd = scaled_bd * gradient_b[:, None]
        mean_bd = torch.zeros_like(scaled_bd)  # of the keys under softmax, less that of the positives
        to_keys_nd = torch.empty_like(keys_nd) if ctx.needs_input_grad[1] else None
        for part in _blocks(keys_nd, ids, queue, block):
            errors = _logits(scaled_bd, part).sub_(lse_b[:, None]).exp_()
            if ids is None:
                _own(errors, first, part).sub_(1.0)
            else:
                errors.sub_(_positive(ids, part) / counts_b[:, None])
            mean_bd.addmm_(errors, part.keys_kd.to(errors.dtype))
            if to_keys_nd is not None and part.start is not None:
                rows = slice(part.start, part.start + len(part.keys_kd))
                to_keys_nd[rows] = errors.T @ weighted_bd
        to_queries_bd = mean_bd.mul_(gradient_b[:, None]).div_(temperature)
        to_temperature = None
        if ctx.needs_input_grad[2]:
            to_temperature = -(scaled_bd * to_queries_bd).sum().to(temperature.dtype)
        return to_queries_bd.to(queries_bd.dtype), to_keys_nd, to_temperature, None, None, None, None


def _blocks(keys_nd: Tensor, ids: Ids | None, queue: Queue | None, block: int) -> Iterator[_Block]:
    """The batch's keys, then the queue's, never both in one."""
    for start in range(0, len(keys_nd), block):
        rows = slice(start, start + block)
        yield _Block(keys_nd[rows], start, None if ids is None else ids.keys_n[rows], None)
    if queue is None:
        return
    log_weights_m = queue.log_weights()
    for start in range(0, len(queue.keys_md), block):
        rows = slice(start, start + block)
        yield _Block(
            queue.keys_md[rows].detach(),
            None,
            None if queue.ids_m is None else queue.ids_m[rows],
            None if log_weights_m is None else log_weights_m[rows],
        )


def _logits(scaled_bd: Tensor, part: _Block) -> Float[Tensor, "b k"]:
    logits = scaled_bd @ part.keys_kd.to(scaled_bd.dtype).T
    return logits if part.log_weights_k is None else logits.add_(part.log_weights_k)


def _own(values: Float[Tensor, "b k"], first: int, part: _Block) -> Float[Tensor, " rows"]:
    """A view of the places where a query meets its own key: a diagonal of the block, or nothing."""
    if part.start is None:
        return values.new_empty(0)
    return values.diagonal(first - part.start)


def _positive(ids: Ids, part: _Block) -> Tensor:
    """(b, k): which keys are positives of which queries."""
    if part.ids_k is None:
        return torch.zeros(
            (len(ids.queries_b), len(part.keys_kd)), dtype=torch.bool, device=part.keys_kd.device
        )
    same = ids.queries_b[:, None] == part.ids_k
    return same if part.log_weights_k is None else same & (part.log_weights_k > -torch.inf)
