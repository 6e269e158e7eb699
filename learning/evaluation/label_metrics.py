"""NDCG and average precision where an answer is the better the more labels it shares with the query.

Semantic Sharing, Sec. 4.2: of multi-label sets, in which an answer is right as soon as one label is shared
(Sec. 4.4). One pass over blocks of queries × gallery gives each query's NDCG, average precision and rank of
the best right answer, and what a random order would give. Scores are the exact ones of retrieval.py and the
sums over equal scores are of whole numbers, so the result hangs on no order of the gallery and is the same to
the last bit for every block size and number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from learning.evaluation.label_sets import LabelRows
from learning.evaluation.metrics import chances, recalls
from learning.evaluation.retrieval import GALLERY_BLOCK, check_embeddings, fixed_point

# The paper is silent on the gain and on ties: see docs/papers.md.
Gain = Literal["linear", "exponential"]
BLOCK_ELEMENTS = 2**21  # of queries × gallery at a time
_EXACT = 2**53  # whole numbers below it are exact in float64


@dataclass(frozen=True)
class LabelJudged:
    """What became of each query of one direction. Shares are 0 … 1; of a query with no right answer 0."""

    ndcg: Float64[np.ndarray, " n"]
    precision: Float64[np.ndarray, " n"]  # average precision
    ranks: Int64[np.ndarray, " n"]  # of the best right answer, from 1; a wrong answer before a right tie
    rights: Int64[np.ndarray, " n"]  # answers that share a label
    chance_ndcg: Float64[np.ndarray, " n"]  # expected of a uniformly random order
    chance_precision: Float64[np.ndarray, " n"]
    answers: int  # in the gallery

    COLUMNS = 6

    @classmethod
    def of(cls, columns: Float64[np.ndarray, "n 6"], answers: int) -> "LabelJudged":
        """From what `judge_labels` gave."""
        ndcg, precision, ranks, rights, chance_ndcg, chance_precision = np.ascontiguousarray(columns.T)
        whole = (ranks.astype(np.int64), rights.astype(np.int64))
        return cls(ndcg, precision, *whole, chance_ndcg, chance_precision, answers)

    @property
    def counted(self) -> Bool[np.ndarray, " n"]:
        """Whether a query has a right answer: the others are left out of every mean."""
        return self.rights > 0


@dataclass(frozen=True)
class _Scale:
    """What a shared label and a place in the order are worth."""

    gains: Float64[np.ndarray, " levels"]  # of 0, 1, … shared labels
    discounts: Float64[np.ndarray, " m1"]  # summed over the first 0, 1, … m places; none from the cut on
    cut: int  # places that count

    @classmethod
    def of(cls, answers: LabelRows, gain: Gain, cut: int | None) -> "_Scale":
        most = int(answers.counts.max(initial=0))  # shared labels: of the gallery, the same for any block
        shared = np.arange(most + 1, dtype=np.float64)
        gains = shared if gain == "linear" else np.exp2(shared) - 1.0
        if gains[-1] * len(answers) >= _EXACT:
            raise ValueError(
                f"gain: {gain}: an answer has {most} labels, whose gain is too large to be summed exactly; "
                "set gain: linear, or count fewer label_set.names"
            )
        cut = len(answers) if cut is None else min(cut, len(answers))
        each = 1.0 / np.log2(np.arange(len(answers)) + 2.0)
        each[cut:] = 0.0
        return cls(gains, np.concatenate([[0.0], np.cumsum(each)]), cut)


def judge_labels(
    queries: np.ndarray,
    gallery: np.ndarray,
    asked: LabelRows,
    answers: LabelRows,
    *,
    gain: Gain = "linear",
    cut: int | None = None,
    query_block: int | None = None,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
) -> Float64[np.ndarray, "n 6"]:
    """A row a query: the fields of `LabelJudged` in their order.

    queries (n, d) and gallery (m, d) are float32 of unit length; `asked` and `answers` are their labels. An
    answer's gain is the number c of labels that it shares with the query, or 2^c - 1 (`exponential`), its
    discount 1 / log2(1 + rank); answers of equal scores share the mean of their gains. NDCG is the sum of
    gain × discount over that of the best order. Average precision is the mean over right answers of the share
    of right ones among those that score at least as high. With a `cut` k the first k places count: NDCG@k,
    and AP@k, which is divided by min(k, right answers), so that the best is 1; of equal scores on both sides
    of the cut their even share before it counts. Memory: some fifteen blocks of (query_block, m) numbers.

    Raises ValueError for embeddings that are not finite or not of unit length, for labels of another number
    of rows, and for gains that float64 cannot sum exactly.
    """
    check_embeddings(queries, gallery)
    for name, rows, labels in (("asked", queries, asked), ("answers", gallery, answers)):
        if len(labels) != len(rows):
            raise ValueError(f"{name}: labels of {len(labels)} rows for {len(rows)} embeddings")
    if len(gallery) == 0:
        raise ValueError("gallery: empty; there is nothing to find")
    scale = _Scale.of(answers, gain, cut)
    step = query_block or query_block_of(len(gallery))
    columns = np.empty((len(queries), LabelJudged.COLUMNS), dtype=np.float64)
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        block = fixed_point(queries[start:stop], device)
        own = asked.rows(start, stop).indicators(device)
        scores = torch.empty((stop - start, len(gallery)), dtype=torch.float64, device=device)
        shared = torch.empty((stop - start, len(gallery)), dtype=torch.int64, device=device)
        for low in range(0, len(gallery), gallery_block):
            high = min(low + gallery_block, len(gallery))
            scores[:, low:high] = block @ fixed_point(gallery[low:high], device).T
            # float32 counts labels exactly: there are fewer than 2^24
            shared[:, low:high] = (own @ answers.rows(low, high).indicators(device).T).long()
        columns[start:stop] = _judge_block(scores, shared, scale)
    return columns


def query_block_of(answers: int) -> int:
    """Queries of a block that holds no more than BLOCK_ELEMENTS scores."""
    return max(1, BLOCK_ELEMENTS // max(1, answers))


def label_metrics(judged: Mapping[str, LabelJudged], cut: int | None = None) -> dict[str, float]:
    """`i2t_ndcg`, `t2i_ndcg`, `ndcg` (their mean), `…map`, the recalls of `metrics.recalls`, and the chance_…
    of all of these, in percent, over the queries with a right answer; `i2t_left_out` … how many have none.

    With a `cut` they are `ndcg@k` and `map@k`. Raises ValueError when no query of a direction has a right
    answer.
    """
    after = "" if cut is None else f"@{cut}"
    values: dict[str, float] = {}
    for direction, found in judged.items():
        if not found.counted.any():
            raise ValueError(
                f"label_set: no query of {direction} shares a label with any answer; "
                "count other names or fields"
            )
    for name, field in (("ndcg", "ndcg"), ("map", "precision")):
        for chance in ("", "chance_"):
            each = {
                way: 100.0 * float(np.mean(getattr(found, f"{chance}{field}")[found.counted]))
                for way, found in judged.items()
            }
            values |= {f"{chance}{way}_{name}{after}": value for way, value in each.items()}
            values[f"{chance}{name}{after}"] = sum(each.values()) / len(each)
    values |= recalls(**{way: found.ranks[found.counted] for way, found in judged.items()})
    values |= chances({way: (found.rights[found.counted], found.answers) for way, found in judged.items()})
    return values | {
        f"{way}_left_out": float(np.count_nonzero(~found.counted)) for way, found in judged.items()
    }


def _judge_block(
    scores: Float64[Tensor, "b m"], shared: Int64[Tensor, "b m"], scale: _Scale
) -> Float64[np.ndarray, "b 6"]:
    right = shared > 0
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ranks = 1 + ((scores >= best) & ~right).sum(dim=1)
    rights = right.sum(dim=1)
    answers = scores.shape[1]

    ordered, order = scores.sort(dim=1, descending=True)
    shared = shared.gather(1, order)
    gains = torch.from_numpy(scale.gains).to(scores.device)[shared]
    is_right = (shared > 0).double()  # float64 throughout: whole numbers divide to float32
    groups = _Groups.of(ordered)
    gained, found = groups.sums(gains), groups.sums(is_right)
    discounts = torch.from_numpy(scale.discounts).to(scores.device)
    after = torch.arange(1, answers + 1, device=scores.device)  # places up to and with this one
    size = after - groups.start
    spread = discounts[after] - discounts[groups.start]
    dcg = _row_sums(groups.ends * (gained / size * spread))
    # of a group that the cut goes through, the part of its right answers that stands before it
    share = (scale.cut - groups.start).clamp(min=0).minimum(size).double() / size
    upto = is_right.cumsum(dim=1) / after
    precision = _row_sums(groups.ends * (found * share * upto))

    ideal = _ideal(shared, scale)
    counts = rights.cpu().numpy()
    has = np.maximum(counts, 1)
    total = gains.sum(dim=1).cpu().numpy()  # of whole numbers: exact in any order
    best_dcg = np.where(counts > 0, ideal, 1.0)
    return np.stack(
        [
            dcg / best_dcg,
            precision / np.minimum(has, scale.cut),
            ranks.cpu().numpy(),
            counts,
            total / answers * scale.discounts[-1] / best_dcg,
            _chance_precision(counts, answers, scale.cut),
        ],
        axis=1,
    )


@dataclass(frozen=True)
class _Groups:
    """Runs of equal scores in rows in descending order."""

    start: Int64[Tensor, "b m"]  # where the run of each place begins
    ends: Bool[Tensor, "b m"]  # the last place of a run

    @classmethod
    def of(cls, ordered: Float64[Tensor, "b m"]) -> "_Groups":
        differs = ordered[:, 1:] != ordered[:, :-1]
        edge = torch.ones_like(ordered[:, :1], dtype=torch.bool)
        begins = torch.cat([edge, differs], dim=1)
        places = torch.arange(ordered.shape[1], device=ordered.device)
        start = torch.where(begins, places, 0).cummax(dim=1).values
        return cls(start, torch.cat([differs, edge], dim=1))

    def sums(self, values: Float64[Tensor, "b m"]) -> Float64[Tensor, "b m"]:
        """At the end of a run the sum over it. Of whole numbers: exact, whatever the order in the run."""
        upto = torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
        return upto[:, 1:] - upto.gather(1, self.start)


def _ideal(shared: Int64[Tensor, "b m"], scale: _Scale) -> Float64[np.ndarray, " b"]:
    """The sum of gains × discounts of the best order: by the number of answers a gain has."""
    counts = torch.zeros((len(shared), len(scale.gains)), dtype=torch.int64, device=shared.device)
    counts.scatter_add_(1, shared, torch.ones_like(shared))
    down = counts.flip(1).cpu().numpy()
    upto = np.cumsum(down, axis=1)
    return np.sum(scale.gains[::-1] * (scale.discounts[upto] - scale.discounts[upto - down]), axis=1)


def _chance_precision(rights: Int64[np.ndarray, " b"], answers: int, cut: int) -> Float64[np.ndarray, " b"]:
    """E[AP@k] of a uniformly random order of m answers, r of them right.

    Place i holds a right one with probability r/m; then i · precision is 1 plus, of the i - 1 before it, each
    right with probability (r - 1)/(m - 1). Summed over i = 1 … k, H_k = 1 + 1/2 + … + 1/k.
    """
    harmonic = float(np.sum(1.0 / np.arange(1, cut + 1)))
    others = (rights - 1) / max(1, answers - 1)
    summed = rights / answers * (harmonic + others * (cut - harmonic))
    return np.where(rights > 0, summed / np.minimum(np.maximum(rights, 1), cut), 0.0)


def _row_sums(values: Float64[Tensor, "b m"]) -> Float64[np.ndarray, " b"]:
    """Row by row, by numpy: torch splits a single row among threads, and so adds it in another order."""
    return np.ascontiguousarray(values.cpu().numpy()).sum(axis=1)
