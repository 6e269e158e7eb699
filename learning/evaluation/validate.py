"""Retrieval on one split: embeddings, ranks and metrics; for the evaluate stage and during training.

All ranks call these functions together, and all get the same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64

from data_tools.shards import ShardIndex
from learning.evaluation.embed import embed_images, embed_texts, evaluation_mode, spread
from learning.evaluation.gallery import Gallery, TextField, gallery_of
from learning.evaluation.metrics import chances, mean_of, recalls
from learning.evaluation.retrieval import QUERY_BLOCK, RightAnswers, best_ranks
from learning.methods.base import Method
from learning.tokenizer import Tokenizer
from learning.training import distributed
from learning.training.augment import ImageTransform

MAX_PIXELS = 50_000_000  # of a stored picture: the crawl let none in that is larger by default


@dataclass(frozen=True)
class Outcome:
    """What a gallery gave: metrics in percent, and what examples are picked from."""

    metrics: dict[str, float]
    gallery: Gallery
    images: Float32[np.ndarray, "n d"]
    texts: Float32[np.ndarray, "t d"]
    right_texts: RightAnswers
    right_images: RightAnswers
    i2t_ranks: Int64[np.ndarray, " n"]  # in the whole gallery, not in a fold
    t2i_ranks: Int64[np.ndarray, " t"]


def validate(
    method: Method,
    tokenizer: Tokenizer,
    index: ShardIndex,
    texts: Sequence[TextField],
    image_transform: ImageTransform,
    relevance: str | None = None,
    batch: int = 256,
    device: str | torch.device = "cpu",
    *,
    max_length: int = 50,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, float]:
    """Metrics of a validation split during training: the dictionary of `evaluate_gallery`, nothing kept.

    `method` may be the module of a DeepSpeed engine on `device` (`engine.module`), its images are cast to
    the dtype of its weights. Under ZeRO-3 parameters are gathered by the hooks of its children: weights
    that `embed_images` and `embed_texts` use outside any child's forward (an nn.Parameter of the method
    itself) must be gathered around this call. Every rank makes the same number of calls. Training or
    evaluation mode of each module and the random state are as before afterwards.
    """
    return evaluate_gallery(
        method,
        tokenizer,
        image_transform,
        index,
        texts,
        relevance,
        batch=batch,
        device=device,
        max_length=max_length,
        max_pixels=max_pixels,
    ).metrics


def evaluate_gallery(
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    texts: Sequence[TextField],
    relevance: str | None,
    *,
    batch: int,
    device: str | torch.device,
    max_length: int,
    max_pixels: int = MAX_PIXELS,
    folds: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Embed a split, rank both ways, and count.

    metrics: i2t_r@1/5/10, t2i_r@1/5/10, medians, rsum, r@m, the chance_… of the recalls, images, texts.
    With folds > 1 the recalls and chances are means over that many parts (COCO's 1K protocol is five_folds
    of its 5K split). `advance` is told the images and texts done. Raises ValueError as `gallery_of` and
    `embed_images` do.
    """
    device = torch.device(device)
    gallery = gallery_of(index, texts, relevance)
    with evaluation_mode(method):
        images = embed_images(
            method, index, transform, batch=batch, device=device, max_pixels=max_pixels, advance=advance
        )
        asked = embed_texts(
            method,
            tokenizer,
            gallery.texts,
            max_length=max_length,
            batch=batch,
            device=device,
            advance=advance,
        )
    right_texts, right_images = gallery.right_texts(), gallery.right_images()
    i2t = _ranks(images, asked, right_texts, device)
    t2i = _ranks(asked, images, right_images, device)
    if folds == 1:
        metrics = recalls(i2t, t2i) | chances(right_texts.counts, right_images.counts)
    else:
        metrics = five_folds(images, asked, gallery, device, folds)
    metrics |= {"images": float(len(images)), "texts": float(len(asked))}
    return Outcome(metrics, gallery, images, asked, right_texts, right_images, i2t, t2i)


def five_folds(
    images: Float32[np.ndarray, "n d"],
    texts: Float32[np.ndarray, "t d"],
    gallery: Gallery,
    device: str | torch.device = "cpu",
    folds: int = 5,
) -> dict[str, float]:
    """The mean over `folds` parts of consecutive images with their texts (COCO 1K: five)."""
    found = []
    for part, own_images, own_texts in gallery.folds(folds):
        right_texts, right_images = part.right_texts(), part.right_images()
        i2t = _ranks(images[own_images], texts[own_texts], right_texts, device)
        t2i = _ranks(texts[own_texts], images[own_images], right_images, device)
        found.append(recalls(i2t, t2i) | chances(right_texts.counts, right_images.counts))
    return mean_of(found)


def _ranks(
    queries: np.ndarray, gallery: np.ndarray, right: RightAnswers, device: str | torch.device
) -> Int64[np.ndarray, " n"]:
    """`best_ranks`, the queries shared among the processes."""
    home = distributed.device()

    def block(start: int, stop: int) -> torch.Tensor:
        ranks = best_ranks(queries[start:stop], gallery, right.rows(start, stop), device=device)
        return torch.from_numpy(ranks).to(home)

    return spread(len(queries), QUERY_BLOCK, block)
