"""Retrieval metrics from ranks: R@K, Rsum, R@M, median rank, their chance levels, and the mean over folds."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

KS = (1, 5, 10)
Direction = Literal["i2t", "t2i"]
DIRECTIONS: tuple[Direction, Direction] = ("i2t", "t2i")  # image-to-text: the query is an image; text-to-image: the query is a text


def recall_at(ranks: Int64[np.ndarray, " n"], k: int) -> float:
    """R@K in percent: the share of queries whose best right answer is among the first K; ranks start at 1."""
    if len(ranks) == 0:
        raise ValueError("ranks: empty; a recall needs at least one query")
    return 100.0 * float(np.count_nonzero(ranks <= k)) / len(ranks)


def recalls(
    i2t: Int64[np.ndarray, " n"] | None = None, t2i: Int64[np.ndarray, " t"] | None = None
) -> dict[str, float]:
    """R@1/5/10 both ways, median ranks, Rsum (COOKIE, Eq. 14) and R@M (the mean of the six recalls; Zero).

    Recalls, Rsum and R@M are in percent (Rsum up to 600). i2t holds a rank an image, t2i a rank a text. With
    one of them alone (MUGE has texts that ask for images) R@M is the mean of its three recalls, and there is
    no Rsum.
    """
    values: dict[str, float] = {}
    found: list[float] = []
    for direction, ranks in zip(DIRECTIONS, (i2t, t2i), strict=True):
        if ranks is None:
            continue
        at = {f"{direction}_r@{k}": recall_at(ranks, k) for k in KS}
        values |= at | {f"{direction}_median_rank": float(np.median(ranks))}
        found += at.values()
    return values | _sum_and_mean(found)


def _sum_and_mean(found: Sequence[float], before: str = "") -> dict[str, float]:
    """Rsum, where both directions are there, and R@M."""
    if not found:
        raise ValueError("ranks: none; give those of one direction at least")
    rsum = {f"{before}rsum": sum(found)} if len(found) == len(DIRECTIONS) * len(KS) else {}
    return rsum | {f"{before}r@m": sum(found) / len(found)}


def chance_recall_at(rights: Int64[np.ndarray, " n"], gallery: int, k: int) -> float:
    """R@K in percent of a uniformly random order: the mean over queries of 1 - C(m - r, K) / C(m, K).

    rights: the number r of right answers of each query in the gallery of m entries. Exact, in float64.
    """
    if len(rights) == 0:
        raise ValueError("rights: empty; a chance level needs at least one query")
    if rights.min() < 0 or rights.max() > gallery:
        raise ValueError(f"rights: {rights.min()} … {rights.max()} right answers in a gallery of {gallery}")
    k = min(k, gallery)
    missed = np.ones(len(rights), dtype=np.float64)
    for drawn in range(k):  # draw K entries without putting back, each of them wrong
        missed *= np.clip(gallery - rights - drawn, 0, None) / (gallery - drawn)
    return 100.0 * float(np.mean(1.0 - missed))


def chances(asked: Mapping[str, tuple[Int64[np.ndarray, " n"], int]]) -> dict[str, float]:
    """`chance_i2t_r@1` … `chance_t2i_r@10`, `chance_rsum` and `chance_r@m`, those of the directions asked.

    asked: of each direction the number of right answers of each query, and the size of its gallery.
    """
    values = {
        f"chance_{direction}_r@{k}": chance_recall_at(rights, gallery, k)
        for direction, (rights, gallery) in asked.items()
        for k in KS
    }
    return values | _sum_and_mean(list(values.values()), "chance_")


def mean_of(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over folds: COCO's 1K protocol is the mean of five folds of 1,000 images."""
    if not folds:
        raise ValueError("folds: empty; a mean needs at least one fold")
    if any(fold.keys() != folds[0].keys() for fold in folds):
        raise ValueError("folds: they name different metrics")
    return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0]}
