"""Image-text matching on one split: each sample is a picture with a text and a label, match or no match.

All ranks call this together, and all get the same result; each sample counts once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score

from data_tools.shards import ShardIndex
from learning.evaluation.embed import embed_both, evaluation_mode
from learning.evaluation.gallery import TextField, texts_of
from learning.evaluation.pairs import PairScorer
from learning.evaluation.retrieval import cosines
from learning.evaluation.validate import MAX_PIXELS
from learning.methods.base import Method, RanksPairs
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform

MatchBy = Literal["pairs", "cosine"]
LABEL = "match"  # as the benchmark stage names it


@dataclass(frozen=True)
class Matched:
    """What a matching set gave; rows in the order of the split."""

    metrics: dict[str, float]  # auc (percent), positives, negatives
    texts: list[str]
    is_match: Bool[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    by: MatchBy  # match probabilities, or cosines


def evaluate_matching(
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    texts: Sequence[TextField],
    label: str = LABEL,
    *,
    by: MatchBy | None = None,
    batch: int,
    device: str | torch.device,
    max_length: int,
    max_pixels: int = MAX_PIXELS,
    advance: Callable[[int], None] | None = None,
) -> Matched:
    """Score each sample's picture with its text, the first that `texts` name, and measure the AUC.

    by: `pairs`, the match probability, or `cosine` of the embeddings; None: the first where the method judges
    pairs. batch: pairs, or images or texts, a forward call. `advance` is told how many were done.
    Raises ValueError (a CorpusError is one) for a split without the label, a sample whose label is not "0" or
    "1" or that has no such text (it names the key), a split with labels of one kind, a method that judges no
    pairs where they are asked for, and a picture that cannot be read.
    """
    device = torch.device(device)
    is_match = _labels(index, label)
    asked = [_first_text(index, i, texts) for i in range(len(index))]
    by = by or ("pairs" if isinstance(method, RanksPairs) else "cosine")
    everyone = np.arange(len(index))
    with evaluation_mode(method):
        if by == "pairs":
            scorer = PairScorer(method, tokenizer, transform, index, batch, device, max_length, max_pixels)
            scores = scorer(everyone, everyone, asked, advance)
        else:
            images, read = embed_both(
                method,
                tokenizer,
                transform,
                index,
                asked,
                batch=batch,
                device=device,
                max_length=max_length,
                max_pixels=max_pixels,
                advance=advance,
            )
            scores = cosines(images, read)
    return Matched(area_under_curve(scores, is_match), asked, is_match, scores, by)


def area_under_curve(scores: Float[np.ndarray, " n"], is_match: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """`auc` in percent (the share of pairs of a match and no match that are in order; a tie is half a one),
    `positives`, `negatives`."""
    positives = int(np.count_nonzero(is_match))
    return {
        "auc": 100.0 * float(roc_auc_score(is_match, scores)),
        "positives": float(positives),
        "negatives": float(len(is_match) - positives),
    }


def _labels(index: ShardIndex, label: str) -> Bool[np.ndarray, " n"]:
    values = index.labels(label)
    wrong = next((i for i, value in enumerate(values) if value not in ("0", "1")), None)
    if wrong is not None:
        raise ValueError(
            f"label: sample '{index.keys[wrong]}' has the label '{label}' {values[wrong]!r}; it must be '1' "
            "(match) or '0' (no match)"
        )
    if len(Counter(values)) == 1:
        raise ValueError(
            f"label: every sample has the label '{label}' '{values[0]}'; an AUC needs matches and others, as "
            "a matching set of the benchmark stage has (icm, iqm)"
        )
    return np.array([value == "1" for value in values])


def _first_text(index: ShardIndex, i: int, fields: Sequence[TextField]) -> str:
    record = index.record(i)
    found = next((text for field in fields for text in texts_of(record, field)), None)
    if found is None:
        raise ValueError(f"texts: sample '{index.keys[i]}' has no {' and no '.join(fields)} to match")
    return found
