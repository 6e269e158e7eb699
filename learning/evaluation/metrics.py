"""Retrieval metrics from ranks: R@K, Rsum, R@M, median rank, their chance levels, and the mean over folds."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

KS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")  # image-to-text: the query is an image; text-to-image: the query is a text


def recall_at(ranks: Int64[np.ndarray, " n"], k: int) -> float:
    """R@K in percent: the share of queries whose best right answer is among the first K; ranks start at 1."""
    if len(ranks) == 0:
        raise ValueError("ranks: empty; a recall needs at least one query")
    return 100.0 * float(np.count_nonzero(ranks <= k)) / len(ranks)


def recalls(i2t: Int64[np.ndarray, " n"], t2i: Int64[np.ndarray, " t"]) -> dict[str, float]:
    """R@1/5/10 both ways, median ranks, Rsum (COOKIE, Eq. 14) and R@M (the mean of the six recalls; Zero).

    Recalls, Rsum and R@M are in percent (Rsum up to 600). i2t holds a rank an image, t2i a rank a text.
    """
    values: dict[str, float] = {}
    for direction, ranks in zip(DIRECTIONS, (i2t, t2i), strict=True):
        for k in KS:
            values[f"{direction}_r@{k}"] = recall_at(ranks, k)
        values[f"{direction}_median_rank"] = float(np.median(ranks))
    six = [values[f"{direction}_r@{k}"] for direction in DIRECTIONS for k in KS]
    values["rsum"] = sum(six)
    values["r@m"] = sum(six) / len(six)
    return values


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


def chances(rights_i2t: Int64[np.ndarray, " n"], rights_t2i: Int64[np.ndarray, " t"]) -> dict[str, float]:
    """`chance_i2t_r@1` … `chance_t2i_r@10`, `chance_rsum` and `chance_r@m` of n images and t texts."""
    values: dict[str, float] = {}
    for direction, rights, gallery in (
        ("i2t", rights_i2t, len(rights_t2i)),
        ("t2i", rights_t2i, len(rights_i2t)),
    ):
        for k in KS:
            values[f"chance_{direction}_r@{k}"] = chance_recall_at(rights, gallery, k)
    total = sum(values.values())
    return values | {"chance_rsum": total, "chance_r@m": total / len(values)}


def mean_of(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over folds: COCO's 1K protocol is the mean of five folds of 1,000 images."""
    if not folds:
        raise ValueError("folds: empty; a mean needs at least one fold")
    if any(fold.keys() != folds[0].keys() for fold in folds):
        raise ValueError("folds: they name different metrics")
    return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0]}
