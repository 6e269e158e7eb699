"""How much tokens attend to the other side's [CLS] in training heads, over a split (ConLIP, Table 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_tools.shards import ShardIndex
from learning.evaluation.embed import Advance, evaluation_mode, plain_pixels, spread, weights_dtype
from learning.evaluation.gallery import TextField, texts_of
from learning.methods.base import AttendsToCls, Batch, Method
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform
from learning.training.randomness import stable_hash
from learning.training.text_views import TextViews

BINS = 20  # equal parts of the scores' range, 0 … 1
WAYS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class ClsAttention:
    """The scores of one direction: of every token in every attention head and sample."""

    mean: float
    std: float
    counts: list[int]  # scores in each of BINS equal parts of 0 … 1


@torch.no_grad()
def cls_attention(
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    texts: Sequence[TextField],
    *,
    seed: int,
    batch: int,
    device: torch.device,
    max_length: int,
    max_pixels: int,
    advance: Advance | None = None,
) -> dict[str, ClsAttention]:
    """By direction (`text_to_image`, `image_to_text`), what the heads of `method` give over a split.

    The inputs are those of training, masks and all: each image with one of its texts, which is drawn, as the
    masks are, by `seed` and key or place, so that the result is the same for any number of processes. Words
    and patches ask; [CLS] and [SEP] do not.

    `method` is on `device`. Raises ValueError for a method without such heads and a sample without a text.
    """
    # The paper is silent on how scores are averaged over heads and tokens: all count alike, in the mean and
    # in the standard deviation
    if not isinstance(method, AttendsToCls):
        raise ValueError(
            f"{type(method).__name__} has no heads in which one side attends to the other's [CLS]"
        )
    views, dtype = method.views(), weights_dtype(method)
    text_views = TextViews(tokenizer, views.texts, max_length, seed)
    ways: list[str] = []

    def block(start: int, stop: int) -> Tensor:
        keys = index.keys[start:stop]
        pixels = torch.stack([plain_pixels(index, i, transform, max_pixels) for i in range(start, stop)])
        ids = text_views(0, keys, [_text(index, i, texts, seed) for i in range(start, stop)])
        made = Batch(
            {name: pixels.to(device, dtype) for name in views.images},
            {
                name: tokenizer.pad([torch.from_numpy(row) for row in rows]).to(device)
                for name, rows in ids.items()
            },
            list(keys),
            draw=stable_hash(seed, "cls attention", start),
        )
        found = method.cls_attention(made)
        ways[:] = [way for way in WAYS if way in found]
        if not ways:
            raise ValueError(
                "the model has no such heads; give the weights of a pre-training stage with mlm or mim"
            )
        words = made.texts["text"].mask.cpu()
        return torch.stack([_statistics(found[way].double().cpu(), way, words) for way in ways], dim=1)

    with evaluation_mode(method):
        rows = spread(len(index), batch, block, advance)
    return {way: _joined(rows[:, place]) for place, way in enumerate(ways)}


def _text(index: ShardIndex, i: int, fields: Sequence[TextField], seed: int) -> str:
    own = [text for field in fields for text in texts_of(index.record(i), field)]
    if not own:
        raise ValueError(f"{index.where(i)} has no {' and no '.join(fields)}: there is no text for its image")
    return own[stable_hash(seed, "cls attention", index.keys[i]) % len(own)]


def _statistics(scores: Float[Tensor, "b h n"], way: str, words: Tensor) -> Float[Tensor, "b s"]:
    """Of each sample: the number of its scores, their mean, the sum of squares around it, and BINS counts."""
    made = []
    for row, own in zip(scores, words, strict=True):
        last = int(own.sum()) - 1 if way == "text_to_image" else row.shape[1]  # [SEP] is a text's last token
        asking = row[:, 1:last].flatten().clamp(0.0, 1.0)
        count = torch.tensor([len(asking)], dtype=torch.float64)
        mean = asking.sum()[None] / count.clamp(min=1)
        counts = torch.histc(asking, BINS, 0.0, 1.0)
        made.append(torch.cat([count, mean, ((asking - mean) ** 2).sum()[None], counts]))
    return torch.stack(made)


def _joined(rows: np.ndarray[Any, Any]) -> ClsAttention:
    """Of all samples together. Raises ValueError where no token asked."""
    count, means, squares = rows[:, 0], rows[:, 1], rows[:, 2]
    total = count.sum()
    if not total > 0:
        raise ValueError("no text of the split has a token beside [CLS] and [SEP]")
    mean = float((count * means).sum() / total)
    variance = float((squares + count * (means - mean) ** 2).sum() / total)
    return ClsAttention(mean, variance**0.5, [int(each) for each in rows[:, 3:].sum(axis=0)])
