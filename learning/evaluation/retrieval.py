"""Ranks of right answers, block by block: exact, and the same for every block size and number of processes.

Scores are inner products of unit-length embeddings, rounded to multiples of 2^-26 a component. A product of
two such vectors, and every partial sum of it, is then an integer under 2^53 (Cauchy-Schwarz: at most 2^26 ·
2^26): float64 holds it exactly, whatever the order of the additions. So a matrix product in blocks of any
shape, on any number of threads, gives the same scores to the last bit, equal embeddings give equal scores,
and a tie is a tie. The rounding (2^-27 a component) is that of float32 itself; plain float32 products
differ with the block's shape.

The rank of a query is that of its best right answer, as Flickr30K and COCO count several right answers (an
image has five texts there, a text one image): 1 + the number of wrong answers with a score equal to or
above it. So a tie counts against the model, both ways.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

QUERY_BLOCK = 1024
GALLERY_BLOCK = 4096
_UNIT = 2.0**26
_PAIRS_BLOCK = 2**23  # elements of gathered right pairs at a time


@dataclass(frozen=True)
class RightAnswers:
    """Right answers in rows: query i has `answers[offsets[i]:offsets[i + 1]]`, ascending, none twice."""

    offsets: Int64[np.ndarray, " n1"]
    answers: Int64[np.ndarray, " pairs"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | set[int]]) -> "RightAnswers":
        """From the right gallery positions of each query."""
        sets = [sorted(set(row)) for row in rows]
        offsets = np.zeros(len(sets) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in sets], out=offsets[1:])
        answers = np.fromiter((a for row in sets for a in row), dtype=np.int64, count=int(offsets[-1]))
        return cls(offsets, answers)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of_query(self, query: int) -> Int64[np.ndarray, " r"]:
        return self.answers[self.offsets[query] : self.offsets[query + 1]]

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        return np.diff(self.offsets)

    def rows(self, start: int, stop: int) -> "RightAnswers":
        """The right answers of queries start … stop - 1."""
        low, high = self.offsets[start], self.offsets[stop]
        return RightAnswers(self.offsets[start : stop + 1] - low, self.answers[low:high])


def best_ranks(
    queries: Float32[np.ndarray, "n d"],
    gallery: Float32[np.ndarray, "m d"],
    right: RightAnswers,
    *,
    query_block: int = QUERY_BLOCK,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Int64[np.ndarray, " n"]:
    """The rank (from 1) of each query's best right answer in the gallery; a wrong answer before a right tie.

    Embeddings have unit length. Memory: a few float64 blocks of (query_block, gallery_block) and (block, d),
    never (n, m). `advance` is told the number of queries done.
    Raises ValueError for embeddings that are not finite or not of unit length, for a query without a right
    answer, and for a right answer outside the gallery.
    """
    _check(queries, gallery, right)
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), query_block):
        stop = min(start + query_block, len(queries))
        block = fixed_point(queries[start:stop], device)
        rows = right.rows(start, stop)
        best, ties = _best_right(block, gallery, rows, device)
        above = torch.zeros(stop - start, dtype=torch.int64, device=block.device)
        for low in range(0, len(gallery), gallery_block):
            scores = block @ fixed_point(gallery[low : low + gallery_block], device).T
            above += (scores >= best[:, None]).sum(dim=1)
        # `above` counts the right answers that score the best too: they are no wrong answers
        ranks[start:stop] = (1 + above - ties).cpu().numpy()
        if advance is not None:
            advance(stop - start)
    return ranks


def top_answers(
    queries: Float32[np.ndarray, "n d"],
    gallery: Float32[np.ndarray, "m d"],
    right: RightAnswers,
    k: int,
) -> tuple[Int64[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]:
    """The first k answers of each query and their cosines, in the order that `best_ranks` counts.

    For a few queries: one row of scores at a time. Equal scores: wrong before right, then by position.
    """
    _check(queries, gallery, right)
    k = min(k, len(gallery))
    positions = np.empty((len(queries), k), dtype=np.int64)
    cosines = np.empty((len(queries), k), dtype=np.float64)
    for row in range(len(queries)):
        query = fixed_point(queries[row : row + 1], "cpu")
        scores = np.concatenate(
            [
                (query @ fixed_point(gallery[low : low + GALLERY_BLOCK], "cpu").T)[0].numpy()
                for low in range(0, len(gallery), GALLERY_BLOCK)
            ]
        )
        is_right = np.zeros(len(gallery), dtype=bool)
        is_right[right.of_query(row)] = True
        order = np.lexsort((np.arange(len(gallery)), is_right, -scores))[:k]
        positions[row], cosines[row] = order, scores[order] / _UNIT**2
    return positions, cosines


def first_by_cosine(
    queries: Float32[np.ndarray, "n d"],
    gallery: Float32[np.ndarray, "m d"],
    k: int,
    *,
    gallery_block: int = GALLERY_BLOCK,
    device: str | torch.device = "cpu",
) -> tuple[Int64[Tensor, "n k"], Float64[Tensor, "n k"]]:
    """Positions of the first k answers of each query and their exact cosines, best first, ties by position.

    Right answers are unknown here, unlike in `top_answers`. k is at most the gallery's size. Memory: float64
    blocks of (n, k + gallery_block): give a block of queries at a time.
    """
    block = fixed_point(queries, device)
    scores = torch.empty((len(queries), 0), dtype=torch.float64, device=block.device)
    positions = torch.empty((len(queries), 0), dtype=torch.int64, device=block.device)
    for low in range(0, len(gallery), gallery_block):
        part = fixed_point(gallery[low : low + gallery_block], device)
        places = torch.arange(low, low + len(part), device=block.device).expand(len(queries), -1)
        scores = torch.cat([scores, block @ part.T], dim=1)
        positions = torch.cat([positions, places], dim=1)
        kept = _largest(scores, k)
        scores, positions = scores.gather(1, kept), positions.gather(1, kept)
    # the columns are in the order of the positions: a stable sort leaves equal scores in it
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return positions.gather(1, order), scores / _UNIT**2


def cosines(a: Float32[np.ndarray, "n d"], b: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
    """The exact cosine of each row of a with the same row of b; unit length."""
    found = np.empty(len(a), dtype=np.float64)
    for low in range(0, len(a), GALLERY_BLOCK):
        rows = slice(low, low + GALLERY_BLOCK)
        found[rows] = (fixed_point(a[rows], "cpu") * fixed_point(b[rows], "cpu")).sum(dim=1).numpy()
    return found / _UNIT**2


def _largest(scores: Float64[Tensor, "n m"], k: int) -> Int64[Tensor, "n k"]:
    """The columns of each row's k largest values, ascending; of equal values the first columns."""
    least = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1:]  # a value: the same whatever the ties
    above, equal = scores > least, scores == least
    spare = min(k, scores.shape[1]) - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(dim=1) <= spare))
    return taken.nonzero()[:, 1].view(len(scores), -1)


def fixed_point(embeddings: Float32[np.ndarray, "b d"], device: str | torch.device) -> Float64[Tensor, "b d"]:
    """Multiples of 2^-26 as whole numbers in float64."""
    return torch.from_numpy(embeddings).to(device, torch.float64).mul_(_UNIT).round_()


def _best_right(
    block: Float64[Tensor, "b d"],
    gallery: Float32[np.ndarray, "m d"],
    right: RightAnswers,
    device: str | torch.device,
) -> tuple[Float64[Tensor, " b"], Int64[Tensor, " b"]]:
    """The best right answer's score of each query, and how many right answers have that score."""
    pairs = np.repeat(np.arange(len(right)), right.counts)
    scores = torch.empty(len(pairs), dtype=torch.float64, device=block.device)
    step = max(1, _PAIRS_BLOCK // max(1, gallery.shape[1]))
    for low in range(0, len(pairs), step):
        answers = fixed_point(gallery[right.answers[low : low + step]], device)
        asked = block[torch.from_numpy(pairs[low : low + step]).to(block.device)]
        scores[low : low + step] = (asked * answers).sum(dim=1)
    query = torch.from_numpy(pairs).to(block.device)
    best = torch.full((len(right),), -torch.inf, dtype=torch.float64, device=block.device)
    best.scatter_reduce_(0, query, scores, reduce="amax")
    ties = torch.zeros(len(right), dtype=torch.int64, device=block.device)
    ties.scatter_add_(0, query, (scores == best[query]).to(torch.int64))
    return best, ties


def check_embeddings(queries: np.ndarray, gallery: np.ndarray) -> None:
    """Raise ValueError, that names it, for a row that is not float32, not finite or not of unit length."""
    for name, embeddings in (("queries", queries), ("gallery", gallery)):
        if embeddings.dtype != np.float32 or embeddings.ndim != 2:
            raise ValueError(f"{name}: {embeddings.dtype} {embeddings.shape}; give float32 (rows, dimension)")
        for low in range(0, len(embeddings), GALLERY_BLOCK):  # in blocks: a copy of a gallery is large
            lengths = np.linalg.norm(embeddings[low : low + GALLERY_BLOCK], axis=1)
            wrong = np.flatnonzero(~(np.abs(lengths - 1.0) < 1e-3))  # catches nan as well
            if len(wrong):
                row = low + int(wrong[0])
                raise ValueError(
                    f"{name}: row {row} has length {lengths[wrong[0]]:.4g}; embeddings have unit length "
                    "(not a number: the training that made the model has diverged)"
                )


def _check(queries: np.ndarray, gallery: np.ndarray, right: RightAnswers) -> None:
    check_embeddings(queries, gallery)
    if len(right) != len(queries):
        raise ValueError(f"right: {len(right)} rows for {len(queries)} queries")
    if len(queries) and right.counts.min() == 0:
        raise ValueError(f"right: query {int(np.argmin(right.counts))} has no right answer in the gallery")
    if len(right.answers) and not (right.answers.min() >= 0 and right.answers.max() < len(gallery)):
        raise ValueError(f"right: an answer is outside the gallery of {len(gallery)}")
