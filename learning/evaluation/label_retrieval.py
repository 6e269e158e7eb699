"""Label-wise retrieval on one split: what shares a label with the query is right (Semantic Sharing, Sec. 4).

All ranks call this together, and all get the same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.evaluation.embed import embed_both, evaluation_mode, spread
from learning.evaluation.gallery import Gallery, TextField, gallery_of
from learning.evaluation.label_metrics import (
    Gain,
    LabelJudged,
    judge_labels,
    label_metrics,
    query_block_of,
)
from learning.evaluation.label_sets import LabelRows, LabelSetConfig, SplitLabels, split_labels
from learning.evaluation.metrics import DIRECTIONS, Direction, mean_of
from learning.evaluation.validate import MAX_PIXELS
from learning.methods.base import Method
from learning.tokenizer import Tokenizer
from learning.training import distributed
from learning.training.augment import ImageTransform

EVERY_LABEL = LabelSetConfig()


@dataclass(frozen=True)
class LabelSide:
    """One direction: who asks, what may be answered, the labels of both, and what became of each query."""

    direction: Direction
    queries: Float32[np.ndarray, "n d"]
    answers: Float32[np.ndarray, "m d"]
    asked: LabelRows  # of the queries
    given: LabelRows  # of the answers
    judged: LabelJudged


@dataclass(frozen=True)
class LabelOutcome:
    """What a gallery gave: metrics in percent, and what examples are picked from."""

    metrics: dict[str, float]
    gallery: Gallery
    names: tuple[str, ...]  # the labels that were counted
    sides: list[LabelSide]  # of the whole gallery, not of a fold


def evaluate_labels(
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    texts: Sequence[TextField],
    label_set: LabelSetConfig = EVERY_LABEL,
    *,
    gain: Gain = "linear",
    cut: int | None = None,
    batch: int,
    device: str | torch.device,
    max_length: int,
    max_pixels: int = MAX_PIXELS,
    folds: int = 1,
    directions: Sequence[Direction] = DIRECTIONS,
    regions: RegionStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> LabelOutcome:
    """Embed a split, judge every answer by the labels that it shares with the query, and count.

    metrics: those of `label_metrics`, of `directions` alone; images, texts, labels (how many are counted),
    unlabelled (images without one: wrong answers to every query, and no queries). gain, cut: see
    `judge_labels`. With folds > 1 metrics are means over so many parts of consecutive images with their texts
    (COCO 1K: five of the 5,000), each a gallery of its own, and `left_out` are sums. regions: read in place
    of the pictures, by a method that embeds regions.
    `advance` is told the images and the texts done. Raises ValueError as `gallery_of`, `split_labels`,
    `label_metrics` and `embed_images` do; `method` and what it leaves as it was are as in `evaluate_gallery`.
    """
    device = torch.device(device)
    gallery = gallery_of(index, texts)
    labels = split_labels(index, label_set)
    parts = gallery.folds(folds) if folds > 1 else []
    with evaluation_mode(method):
        images, asked = embed_both(
            method,
            tokenizer,
            transform,
            index,
            gallery.texts,
            batch=batch,
            device=device,
            max_length=max_length,
            max_pixels=max_pixels,
            regions=regions,
            advance=advance,
        )
    how = (labels, directions, gain, cut, device)
    whole = _sides(gallery, images, asked, *how)
    found = [_sides(part, images[own_i], asked[own_t], *how) for part, own_i, own_t in parts] or [whole]
    metrics = _mean([label_metrics({side.direction: side.judged for side in one}, cut) for one in found])
    metrics |= {
        "images": float(len(images)),
        "texts": float(len(asked)),
        "labels": float(len(labels.names)),
        "unlabelled": float(sum(not row for row in labels.rows)),
    }
    return LabelOutcome(metrics, gallery, labels.names, whole)


def _mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over folds; of queries that were left out the sum, as they are a number of queries."""
    metrics = mean_of(parts)
    counts = [name for name in metrics if name.endswith("_left_out")]
    return metrics | {name: sum(part[name] for part in parts) for name in counts}


def _sides(
    part: Gallery,
    images: Float32[np.ndarray, "n d"],
    texts: Float32[np.ndarray, "t d"],
    labels: SplitLabels,
    directions: Sequence[Direction],
    gain: Gain,
    cut: int | None,
    device: torch.device,
) -> list[LabelSide]:
    """The directions of a gallery, or of a fold with its own images and texts, judged."""
    of_images, of_texts = labels.of_images(part), labels.of_texts(part)
    sides = []
    for direction in directions:
        if direction == "i2t":
            asked = (images, texts, of_images, of_texts)
        else:
            asked = (texts, images, of_texts, of_images)
        sides.append(LabelSide(direction, *asked, _judged(*asked, gain, cut, device)))
    return sides


def _judged(
    queries: np.ndarray,
    answers: np.ndarray,
    asked: LabelRows,
    given: LabelRows,
    gain: Gain,
    cut: int | None,
    device: torch.device,
) -> LabelJudged:
    """`judge_labels`, the queries shared among the processes."""
    home = distributed.device()

    def block(start: int, stop: int) -> torch.Tensor:
        own = asked.rows(start, stop)
        rows = judge_labels(queries[start:stop], answers, own, given, gain=gain, cut=cut, device=device)
        return torch.from_numpy(rows).to(home)

    return LabelJudged.of(spread(len(queries), query_block_of(len(answers)), block), len(answers))
