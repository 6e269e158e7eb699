"""Re-ranking: the first k answers of each query by cosine, put in order by a pair scorer.

The candidates of a query are its first k answers by exact cosine (retrieval.py), ties by position. A method
that judges pairs scores them, each distinct pair of the two directions once, and the candidates go in the
order of that score; all other answers stay behind them in the order of their cosines. So the rank of the best
right answer is 1 + the wrong candidates with a score equal to or above that of the best right candidate: a tie
counts against the model, as in retrieval.py. A query without a right candidate keeps its rank by cosine, which
is above k: each of its k candidates is wrong, with a cosine no lower than the right answer's.

Memory: some 40 bytes a candidate (queries × k, both directions), on every process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from pydantic import BaseModel, ConfigDict, Field

from learning.evaluation.embed import spread
from learning.evaluation.retrieval import QUERY_BLOCK, RightAnswers, first_by_cosine
from learning.training import distributed

Score = Literal["match+cosine", "match"]
MatchPairs = Callable[[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]], Float32[np.ndarray, " p"]]


class RerankConfig(BaseModel):
    """How many answers are judged as pairs, and what puts them in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: int = Field(
        default=64,
        ge=1,
        description="candidates of a query, the first by cosine; the size of the gallery or more: every pair is "
        "judged. Zero's released code: 128 (Flickr30K-CN), 64 (ICR, IQR)",
    )
    score: Score = Field(
        default="match+cosine",
        description="of a candidate: the match probability plus the cosine (Zero's released code), or it alone",
    )
    batch: int = Field(default=256, ge=1, description="pairs judged at a time, a rank")


@dataclass(frozen=True)
class Side:
    """One direction of a gallery, or of a part of it: who asks, what may be answered, what is right."""

    direction: Literal["i2t", "t2i"]
    queries: Float32[np.ndarray, "n d"]
    answers: Float32[np.ndarray, "m d"]
    right: RightAnswers
    query_ids: Int64[np.ndarray, " n"]  # place of each query among all images (i2t) or texts (t2i)
    answer_ids: Int64[np.ndarray, " m"]  # place of each answer on the other side
    ranks: Int64[np.ndarray, " n"]  # of the best right answer, by cosine


@dataclass(frozen=True)
class Reranked:
    """What became of one direction: rows by query, columns by the new order of its candidates.

    Equal scores: wrong before right, then by cosine and position.
    """

    candidates: Int64[np.ndarray, "n k"]  # positions among the side's answers
    cosines: Float64[np.ndarray, "n k"]
    match: Float64[np.ndarray, "n k"]  # probabilities
    ranks: Int64[np.ndarray, " n"]  # of the best right answer
    ceiling: float  # percent of queries with a right answer among the candidates: no recall can be above it


def rerank(
    sides: Sequence[Side],
    config: RerankConfig,
    match: MatchPairs,
    *,
    device: str | torch.device = "cpu",
    query_block: int = QUERY_BLOCK,
) -> list[Reranked]:
    """Put the candidates of each side in the order of their scores.

    match(images, texts): the match probability of each pair of ids. It is called once, with the distinct pairs
    of all sides in the order of their images. All processes call this together.
    """
    found = [_candidates(side, config.top_k, device, query_block) for side in sides]
    texts_n = 1 + max(
        int((side.answer_ids if side.direction == "i2t" else side.query_ids).max()) for side in sides
    )
    keys = [_pair_keys(side, positions, texts_n) for side, (positions, _) in zip(sides, found, strict=True)]
    pairs = np.unique(np.concatenate([of_side.ravel() for of_side in keys]))
    images, texts = np.divmod(pairs, texts_n)
    probability = match(images, texts).astype(np.float64)
    return [
        _ordered(side, positions, cosines, probability[np.searchsorted(pairs, own)], config.score)
        for side, (positions, cosines), own in zip(sides, found, keys, strict=True)
    ]


def _candidates(
    side: Side, k: int, device: str | torch.device, query_block: int
) -> tuple[Int64[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]:
    """`first_by_cosine`, the queries shared among the processes."""
    home = distributed.device()
    k = min(k, len(side.answers))

    def block(start: int, stop: int) -> torch.Tensor:
        positions, cosines = first_by_cosine(side.queries[start:stop], side.answers, k, device=device)
        return torch.stack([positions.to(torch.float64), cosines], dim=-1).to(home)

    rows = spread(len(side.queries), query_block, block)
    return rows[..., 0].astype(np.int64), rows[..., 1]


def _pair_keys(side: Side, positions: Int64[np.ndarray, "n k"], texts_n: int) -> Int64[np.ndarray, "n k"]:
    """A number for each pair of a query and a candidate, the same in both directions, ascending by image."""
    asked, answered = side.query_ids[:, None], side.answer_ids[positions]
    return asked * texts_n + answered if side.direction == "i2t" else answered * texts_n + asked


def _ordered(
    side: Side,
    positions: Int64[np.ndarray, "n k"],
    cosines: Float64[np.ndarray, "n k"],
    match: Float64[np.ndarray, "n k"],
    score: Score,
) -> Reranked:
    scores = match + cosines if score == "match+cosine" else match
    right = _is_right(side.right, positions, len(side.answers))
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    has_right = right.any(axis=1)
    above = np.count_nonzero((scores >= best) & ~right, axis=1)
    order = np.lexsort((right, -scores), axis=-1)  # stable: what is equal stays in the order of the cosines
    return Reranked(
        np.take_along_axis(positions, order, axis=1),
        np.take_along_axis(cosines, order, axis=1),
        np.take_along_axis(match, order, axis=1),
        np.where(has_right, 1 + above, side.ranks),
        100.0 * float(has_right.mean()),
    )


def _is_right(
    right: RightAnswers, positions: Int64[np.ndarray, "n k"], answers_n: int
) -> Bool[np.ndarray, "n k"]:
    query = np.arange(len(right))
    wanted = np.repeat(query, right.counts) * answers_n + right.answers
    return np.isin(query[:, None] * answers_n + positions, wanted, assume_unique=True)
