"""Contrastive losses over the whole batch: pure functions of gathered tensors, with no rank in them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Queue:
    """Keys of earlier steps, contrasted beside the batch's own. They get no gradient."""

    keys_md: Float[Tensor, "m d"]
    ids_m: Int64[Tensor, " m"] | None = None  # by which they are positives too; None: of no query
    weights_m: Float[Tensor, " m"] | None = None  # w ≥ 0 of a key; 0 leaves it out; None: 1

    def log_weights(self) -> Float[Tensor, " m"] | None:
        """log w: what is added to a key's logits."""
        return None if self.weights_m is None else self.weights_m.detach().log()


@dataclass(frozen=True)
class Ids:
    """What queries and keys show: a key is a positive of every query that has its id."""

    queries_b: Int64[Tensor, " b"]
    keys_n: Int64[Tensor, " n"]


class Rows(NamedTuple):
    """What a loss gives for each query."""

    losses_b: Float[Tensor, " b"]
    hits_b: Bool[Tensor, " b"]  # whether the batch's most similar key is a positive: R@1 within the batch


def info_nce(
    queries_nd: Float[Tensor, "n d"], keys_nd: Float[Tensor, "n d"], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """InfoNCE: row i of `keys_nd` is the positive of row i of `queries_nd`, the other rows its negatives.

    -1/N Σ_i log( exp(q_i·k_i/τ) / Σ_j exp(q_i·k_j/τ) )   COOKIE, Eq. 5, by log-sum-exp with the maximum taken
    out, so that no τ overflows. Inputs are embeddings of unit length (not checked). Raises ValueError for
    less than two rows: there is no negative.
    """
    _check(queries_nd, keys_nd)
    logits_nn = queries_nd @ keys_nd.T / temperature
    return F.cross_entropy(logits_nn, torch.arange(len(logits_nn), device=logits_nn.device))


def info_nce_rows(
    queries_bd: Float[Tensor, "b d"],
    keys_nd: Float[Tensor, "n d"],
    temperature: Float[Tensor, ""] | float,
    *,
    first: int = 0,
    ids: Ids | None = None,
    queue: Queue | None = None,
) -> Rows:
    """InfoNCE of some queries against all keys, a query at a time, the queue's keys beside the batch's.

    -1/|P(i)| Σ_{p∈P(i)} log( w_p exp(q_i·k_p/τ) / Σ_j w_j exp(q_i·k_j/τ) )

    j and p go over the batch's keys (w = 1) and the queue's. Without `ids`, P(i) is key `first` + i alone;
    with no queue the mean over queries is then COOKIE's Eq. 5. With `ids`, P(i) are the keys of the query's
    id and of w > 0: soft labels, even over the positives, the mean outside of the logarithm (Khosla et al.
    2020, L_out of Eq. 2). A query without any positive has no loss: nan. fp16 and bf16 are computed in fp32.
    Raises ValueError for shapes that do not fit, and where there is no negative.
    """
    check_rows(queries_bd, keys_nd, first, ids, queue)
    queries_bd, keys_nd = widened(queries_bd), widened(keys_nd)
    logits = queries_bd @ keys_nd.T / temperature
    best_b = logits.detach().argmax(dim=1)
    left_out = None
    if queue is not None:
        stored = queries_bd @ queue.keys_md.detach().to(queries_bd.dtype).T / temperature
        log_weights = queue.log_weights()
        if log_weights is not None:
            stored = stored + log_weights
            left_out = torch.cat([log_weights.new_zeros(len(keys_nd)), log_weights]) == -torch.inf
        logits = torch.cat([logits, stored], dim=1)
    if ids is None:
        own_b = torch.arange(first, first + len(logits), device=logits.device)
        return Rows(F.cross_entropy(logits, own_b, reduction="none"), best_b == own_b)
    positive = ids.queries_b[:, None] == ids.keys_n
    hits_b = positive.gather(1, best_b[:, None]).squeeze(1)
    if queue is not None:
        same = positive.new_zeros((len(logits), len(queue.keys_md)))
        if queue.ids_m is not None:
            same = ids.queries_b[:, None] == queue.ids_m
        positive = torch.cat([positive, same], dim=1)
    if left_out is not None:
        positive = positive & ~left_out
    aligned = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    return Rows(-aligned.sum(dim=1) / positive.sum(dim=1), hits_b)


def queued_info_nce_rows(
    queries_bd: Float[Tensor, "b d"],
    positives_bd: Float[Tensor, "b d"],
    temperature: Float[Tensor, ""] | float,
    queue: Queue,
    ids_b: Int64[Tensor, " b"] | None = None,
) -> Rows:
    """InfoNCE with one positive a query, the queue's keys as its negatives (ConLIP, Eq. 9).

    -log( exp(q_i·p_i/τ) / (exp(q_i·p_i/τ) + Σ_j w_j exp(q_i·k_j/τ)) )

    j goes over the queue's keys but those of the query's id (`ids_b`; None: over all). Positives get a
    gradient as queries do. Without any negative a loss is 0. fp16 and bf16 are computed in fp32. Raises
    ValueError for shapes that do not fit.
    """
    positive_b, negative_bm = _positive_and_negatives(queries_bd, positives_bd, temperature, queue, ids_b)
    logits = torch.cat([positive_b[:, None], negative_bm], dim=1)
    return Rows(logits.logsumexp(dim=1) - positive_b, positive_b > negative_bm.amax(dim=1))


def decoupled_rows(
    queries_bd: Float[Tensor, "b d"],
    positives_bd: Float[Tensor, "b d"],
    temperature: Float[Tensor, ""] | float,
    queue: Queue,
    ids_b: Int64[Tensor, " b"] | None = None,
) -> Rows:
    """As `queued_info_nce_rows`, but the denominator is of the negatives alone (ConLIP, Eq. 10, 11).

    -q_i·p_i/τ + log Σ_j w_j exp(q_i·k_j/τ)
    """
    positive_b, negative_bm = _positive_and_negatives(queries_bd, positives_bd, temperature, queue, ids_b)
    there_b = (negative_bm > -torch.inf).any(dim=1)
    # a logarithm of nothing: its gradient would be nan, though where() left it out
    losses_b = negative_bm.masked_fill(~there_b[:, None], 0.0).logsumexp(dim=1) - positive_b
    return Rows(torch.where(there_b, losses_b, 0.0), positive_b > negative_bm.amax(dim=1))


def _positive_and_negatives(
    queries_bd: Tensor,
    positives_bd: Tensor,
    temperature: Tensor | float,
    queue: Queue,
    ids_b: Tensor | None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
    """Logits of each query's positive and of the queue's keys; -inf for a key that is no negative of it."""
    _check_queued(queries_bd, positives_bd, queue, ids_b)
    queries_bd, positives_bd = widened(queries_bd), widened(positives_bd)
    positive_b = (queries_bd * positives_bd).sum(dim=1) / temperature
    negative_bm = queries_bd @ queue.keys_md.detach().to(queries_bd.dtype).T / temperature
    log_weights = queue.log_weights()
    if log_weights is not None:
        negative_bm = negative_bm + log_weights
    if ids_b is not None and queue.ids_m is not None:
        negative_bm = negative_bm.masked_fill(ids_b[:, None] == queue.ids_m, -torch.inf)
    return positive_b, negative_bm


def hardest_negative_hinge(
    image_nd: Float[Tensor, "n d"], text_nd: Float[Tensor, "n d"], margin: float
) -> Float[Tensor, ""]:
    """The hinge on the hardest negative of the batch, in both directions, as a mean over the pairs.

    [α + S(I', T) - S(I, T)]₊ + [α + S(I, T') - S(I, T)]₊   COOKIE, Eq. 13; I' is the image most similar to T
    but its own, T' the text most similar to I but its own, S the cosine (inputs of unit length). Raises
    ValueError for less than two rows.
    """
    # The paper is silent: Eq. 13 is one pair's loss; VSE++ [24] sums it over the batch. Here it is the
    # mean, so that a learning rate means the same for every batch size.
    _check(image_nd, text_nd)
    similarity_nn = image_nd @ text_nd.T
    own = torch.eye(len(similarity_nn), dtype=torch.bool, device=similarity_nn.device)
    right_n = similarity_nn.diagonal()
    wrong_nn = similarity_nn.masked_fill(own, -torch.inf)
    by_image_n = F.relu(margin + wrong_nn.amax(dim=1) - right_n)
    by_text_n = F.relu(margin + wrong_nn.amax(dim=0) - right_n)
    return (by_image_n + by_text_n).mean()


@torch.no_grad()
def matching_accuracy(queries_nd: Float[Tensor, "n d"], keys_nd: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The share (0-1) of queries whose most similar key is their own: R@1 within the batch."""
    best_n = (queries_nd @ keys_nd.T).argmax(dim=1)
    return (best_n == torch.arange(len(best_n), device=best_n.device)).float().mean()


def widened(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """In fp32 at least: a logit of 100 has no place after the point in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_rows(
    queries_bd: Tensor, keys_nd: Tensor, first: int, ids: Ids | None = None, queue: Queue | None = None
) -> None:
    """Raises ValueError when queries, keys, ids and queue do not fit each other, or leave no negative."""
    if queries_bd.ndim != 2 or keys_nd.ndim != 2 or queries_bd.shape[1] != keys_nd.shape[1]:
        raise ValueError(
            f"(b, d) queries and (n, d) keys are needed: {tuple(queries_bd.shape)}, {tuple(keys_nd.shape)}"
        )
    if ids is None and not 0 <= first <= len(keys_nd) - len(queries_bd):
        raise ValueError(
            f"first: {len(queries_bd)} queries from row {first} on do not lie in {len(keys_nd)} keys"
        )
    if ids is not None and (len(ids.queries_b), len(ids.keys_n)) != (len(queries_bd), len(keys_nd)):
        raise ValueError(
            f"ids: {len(ids.queries_b)} of queries and {len(ids.keys_n)} of keys; there are "
            f"{len(queries_bd)} and {len(keys_nd)}"
        )
    stored = 0
    if queue is not None:
        stored = len(queue.keys_md)
        for name, values in (("ids_m", queue.ids_m), ("weights_m", queue.weights_m)):
            if values is not None and len(values) != stored:
                raise ValueError(f"queue.{name}: {len(values)} values for {stored} keys")
        if ids is None and queue.ids_m is not None:
            raise ValueError("queue.ids_m: there are no ids of the queries; give `ids` too, or neither")
    if len(keys_nd) + stored < 2:
        raise ValueError(f"a batch of {len(keys_nd)} has no negatives; contrastive_batch must be 2 or more")


def _check_queued(queries_bd: Tensor, positives_bd: Tensor, queue: Queue, ids_b: Tensor | None) -> None:
    _check_pairs(queries_bd, positives_bd)
    keys = queue.keys_md
    if keys.ndim != 2 or keys.shape[1] != queries_bd.shape[1] or len(keys) == 0:
        raise ValueError(f"queue: (m, {queries_bd.shape[1]}) keys are needed, m > 0: {tuple(keys.shape)}")
    for name, values in (("ids_m", queue.ids_m), ("weights_m", queue.weights_m)):
        if values is not None and len(values) != len(keys):
            raise ValueError(f"queue.{name}: {len(values)} values for {len(keys)} keys")
    if (ids_b is None) != (queue.ids_m is None):
        raise ValueError("ids: give those of the queries and of the queue's keys, or neither")
    if ids_b is not None and len(ids_b) != len(queries_bd):
        raise ValueError(f"ids: {len(ids_b)} of {len(queries_bd)} queries")


def _check_pairs(left_nd: Tensor, right_nd: Tensor) -> None:
    if left_nd.shape != right_nd.shape or left_nd.ndim != 2:
        raise ValueError(
            f"two (n, d) tensors of one shape are needed: {tuple(left_nd.shape)}, {tuple(right_nd.shape)}"
        )


def _check(left_nd: Tensor, right_nd: Tensor) -> None:
    _check_pairs(left_nd, right_nd)
    if len(left_nd) < 2:
        raise ValueError(f"a batch of {len(left_nd)} has no negatives; contrastive_batch must be 2 or more")
