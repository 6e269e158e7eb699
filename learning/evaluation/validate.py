"""Retrieval on one split: embeddings, ranks and metrics; for the evaluate stage and during training.

All ranks call these functions together, and all get the same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64

from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.evaluation.embed import embed_both, evaluation_mode, spread
from learning.evaluation.gallery import Gallery, TextField, gallery_of
from learning.evaluation.metrics import DIRECTIONS, Direction, chances, mean_of, recalls
from learning.evaluation.pairs import PairScorer
from learning.evaluation.rerank import RerankConfig, Reranked, Side, rerank
from learning.evaluation.retrieval import QUERY_BLOCK, RightAnswers, best_ranks
from learning.methods.base import Method
from learning.tokenizer import Tokenizer
from learning.training import distributed
from learning.training.augment import ImageTransform

MAX_PIXELS = 50_000_000  # of a stored picture: the crawl let none in that is larger by default


@dataclass(frozen=True)
class Part:
    """A gallery, or a fold of it: the directions that were asked, and what re-ranking made of each."""

    sides: list[Side]
    reranked: list[Reranked]  # one a side; none where nothing was re-ranked

    def ranks(self) -> dict[str, Int64[np.ndarray, " n"]]:
        """The rank of each query's best right answer, by direction; after re-ranking where there was one."""
        final = [made.ranks for made in self.reranked] or [side.ranks for side in self.sides]
        return {side.direction: ranks for side, ranks in zip(self.sides, final, strict=True)}

    def metrics(self) -> dict[str, float]:
        """Recalls, and `cosine_…` (before re-ranking) and `ceiling_…` beside them; chance levels last."""
        values = recalls(**self.ranks())
        if self.reranked:
            before = recalls(**{side.direction: side.ranks for side in self.sides})
            values |= {f"cosine_{name}": value for name, value in before.items()}
            values |= {
                f"ceiling_{side.direction}": made.ceiling
                for side, made in zip(self.sides, self.reranked, strict=True)
            }
        return values | chances(
            {side.direction: (side.right.counts, len(side.answers)) for side in self.sides}
        )


@dataclass(frozen=True)
class Outcome:
    """What a gallery gave: metrics in percent, and what examples are picked from."""

    metrics: dict[str, float]
    gallery: Gallery
    images: Float32[np.ndarray, "n d"]
    texts: Float32[np.ndarray, "t d"]
    whole: Part  # the whole gallery, not a fold

    @property
    def i2t_ranks(self) -> Int64[np.ndarray, " n"]:
        return self.whole.ranks()["i2t"]

    @property
    def t2i_ranks(self) -> Int64[np.ndarray, " t"]:
        return self.whole.ranks()["t2i"]


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
    directions: Sequence[Direction] = DIRECTIONS,
    rerank_by: RerankConfig | None = None,
    regions: RegionStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Embed a split, rank both ways, re-rank where `rerank_by` says how, and count.

    metrics: i2t_r@1/5/10, t2i_r@1/5/10, medians, rsum, r@m, the chance_… of the recalls, images, texts; those
    of `directions` alone. Re-ranked, these are the metrics of the new order, beside cosine_… of the old one
    and ceiling_i2t, ceiling_t2i.
    With folds > 1 recalls, ceilings and chances are means over that many parts (COCO's 1K protocol is
    five_folds of its 5K split), each with candidates of its own; the whole is re-ranked too, for
    the examples.
    regions: read in place of the pictures, by a method that embeds regions; nothing is re-ranked then.
    `advance` is told the images, the texts and the pairs done. Raises ValueError as `gallery_of`,
    `embed_images` and `PairScorer` do.

    `method` may be the module of a DeepSpeed engine on `device` (`engine.module`), its images are cast to
    the dtype of its weights. Under ZeRO-3 parameters are gathered by the hooks of its children: weights
    that it uses outside any child's forward (an nn.Parameter of the method itself) must be gathered around
    this call. Every rank makes the same number of calls. Training or evaluation mode of each module and the
    random state are as before afterwards.
    """
    device = torch.device(device)
    scorer: PairScorer | None = None
    if rerank_by is not None:
        scorer = PairScorer(
            method, tokenizer, transform, index, rerank_by.batch, device, max_length, max_pixels
        )
    gallery = gallery_of(index, texts, relevance)
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
        parts = [_sides(gallery, images, asked, directions, device)]
        if folds > 1:
            parts += _fold_sides(gallery, images, asked, directions, device, folds)
        made: list[Reranked] = []
        if rerank_by is not None and scorer is not None:
            made = rerank(
                [side for part in parts for side in part],
                rerank_by,
                lambda of_images, of_texts: scorer(of_images, of_texts, gallery.texts, advance),
                device=device,
            )
    each = len(directions)
    whole, *of_folds = [
        Part(sides, made[place * each : (place + 1) * each]) for place, sides in enumerate(parts)
    ]
    metrics = mean_of([part.metrics() for part in of_folds or [whole]])
    metrics |= {"images": float(len(images)), "texts": float(len(asked))}
    return Outcome(metrics, gallery, images, asked, whole)


def five_folds(
    images: Float32[np.ndarray, "n d"],
    texts: Float32[np.ndarray, "t d"],
    gallery: Gallery,
    device: str | torch.device = "cpu",
    folds: int = 5,
) -> dict[str, float]:
    """The mean over `folds` parts of consecutive images with their texts (COCO 1K: five)."""
    parts = _fold_sides(gallery, images, texts, DIRECTIONS, device, folds)
    return mean_of([Part(sides, []).metrics() for sides in parts])


def _fold_sides(
    gallery: Gallery,
    images: np.ndarray,
    texts: np.ndarray,
    directions: Sequence[Direction],
    device: str | torch.device,
    folds: int,
) -> list[list[Side]]:
    return [
        _sides(part, images, texts, directions, device, np.array(own_images), np.array(own_texts))
        for part, own_images, own_texts in gallery.folds(folds)
    ]


def _sides(
    part: Gallery,
    images: Float32[np.ndarray, "n d"],
    texts: Float32[np.ndarray, "t d"],
    directions: Sequence[Direction],
    device: str | torch.device,
    own_images: Int64[np.ndarray, " i"] | None = None,
    own_texts: Int64[np.ndarray, " j"] | None = None,
) -> list[Side]:
    """The directions of a part, ranked by cosine; its images and texts by their places, None: all."""
    if own_images is None or own_texts is None:
        own_images, own_texts = np.arange(len(images)), np.arange(len(texts))
    else:
        images, texts = images[own_images], texts[own_texts]
    sides = []
    for direction in directions:
        if direction == "i2t":
            asked = (images, texts, part.right_texts(), own_images, own_texts)
        else:
            asked = (texts, images, part.right_images(), own_texts, own_images)
        queries, answers, right, query_ids, answer_ids = asked
        ranks = _ranks(queries, answers, right, device)
        sides.append(Side(direction, queries, answers, right, query_ids, answer_ids, ranks))
    return sides


def _ranks(
    queries: np.ndarray, gallery: np.ndarray, right: RightAnswers, device: str | torch.device
) -> Int64[np.ndarray, " n"]:
    """`best_ranks`, the queries shared among the processes."""
    home = distributed.device()

    def block(start: int, stop: int) -> torch.Tensor:
        ranks = best_ranks(queries[start:stop], gallery, right.rows(start, stop), device=device)
        return torch.from_numpy(ranks).to(home)

    return spread(len(queries), QUERY_BLOCK, block)
