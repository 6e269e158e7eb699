"""How a contrastive loss is computed over ranks, as the recipe says: whole, own rows, or own rows in blocks.

All ways give the same loss and the same gradients, by the convention of learning/training/distributed.py.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from learning.losses.blockwise import hinge_rows, info_nce_rows_blockwise
from learning.losses.contrastive import (
    Ids,
    Queue,
    Rows,
    hardest_negative_hinge,
    info_nce,
    info_nce_rows,
    matching_accuracy,
)
from learning.training.distributed import gather, rank, sum_over_ranks, world_size


class ContrastConfig(BaseModel):
    """The recipe's `contrast` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    how: Literal["full", "local", "blockwise"] = Field(
        default="full",
        description="what a rank holds of the matrix of all queries by all keys: full: the whole; local: the "
        "rows of its own queries; blockwise: those, `block` columns at a time, made again in backward",
    )
    block: int = Field(default=1024, ge=1, description="keys at a time, for blockwise")


class Contrasted(NamedTuple):
    """A loss, and the share (0-1) of queries whose most similar key is their own; of all ranks' rows."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


class Contrast:
    """One step's embeddings, by view, against those of all ranks. Every rank gets the loss of all rows."""

    def __init__(
        self,
        config: ContrastConfig,
        own: Mapping[str, Float[Tensor, "b d"]],
        rows_by_rank: Sequence[int] | None = None,
    ):
        """`own`: this rank's rows; row i of every view is of one sample. `rows_by_rank` as in `gather`."""
        self.config, self.own, self.rows_by_rank = config, dict(own), rows_by_rank
        widths = [view.shape[1] for view in self.own.values()]
        joined = torch.cat(list(self.own.values()), dim=1)  # one collective for all views
        parts = gather(joined, rows_by_rank).split(widths, dim=1)
        self.every = dict(zip(self.own, parts, strict=True))
        self.each = [len(joined)] * world_size() if rows_by_rank is None else list(rows_by_rank)
        self.first, self.rows = sum(self.each[: rank()]), sum(self.each)

    def info_nce(
        self,
        queries: str,
        keys: str,
        temperature: Float[Tensor, ""],
        ids: Int64[Tensor, " b"] | None = None,
        queue: Queue | None = None,
    ) -> Contrasted:
        """InfoNCE of two views, the mean over all queries (COOKIE, Eq. 5).

        `ids` of this rank's samples: samples of one id are each other's positives (`info_nce_rows`). `queue`:
        further keys, the same on every rank.
        """
        whole = None if ids is None else gather(ids, self.rows_by_rank)
        if self.config.how == "full":
            query_nd, key_nd = self.every[queries], self.every[keys]
            if whole is None and queue is None:
                return Contrasted(
                    info_nce(query_nd, key_nd, temperature), matching_accuracy(query_nd, key_nd)
                )
            both = None if whole is None else Ids(whole, whole)
            rows = info_nce_rows(query_nd, key_nd, temperature, ids=both, queue=queue)
            return Contrasted(rows.losses_b.mean(), rows.hits_b.float().mean())
        own = None if ids is None or whole is None else Ids(ids, whole)
        pair = self.own[queries], self.every[keys]
        if self.config.how == "local":
            return self._mean(info_nce_rows(*pair, temperature, first=self.first, ids=own, queue=queue))
        block = self.config.block
        return self._mean(
            info_nce_rows_blockwise(*pair, temperature, first=self.first, ids=own, queue=queue, block=block)
        )

    def both_ways(
        self,
        images: str,
        texts: str,
        temperature: Float[Tensor, ""],
        ids: Int64[Tensor, " b"] | None = None,
    ) -> Contrasted:
        """InfoNCE of images to texts plus that of texts to images (COOKIE, Eq. 6, 7); their mean accuracy."""
        return _added(
            self.info_nce(images, texts, temperature, ids), self.info_nce(texts, images, temperature, ids)
        )

    def hinge(self, images: str, texts: str, margin: float) -> Contrasted:
        """The hinge on the hardest negatives of both directions (COOKIE, Eq. 13); their mean accuracy."""
        if self.config.how == "full":
            image_nd, text_nd = self.every[images], self.every[texts]
            accuracy = (matching_accuracy(image_nd, text_nd) + matching_accuracy(text_nd, image_nd)) / 2
            return Contrasted(hardest_negative_hinge(image_nd, text_nd, margin), accuracy)
        block = self.rows if self.config.how == "local" else self.config.block
        by_image, by_text = (
            self._mean(hinge_rows(self.own[a], self.every[b], margin, first=self.first, block=block))
            for a, b in ((images, texts), (texts, images))
        )
        return _added(by_image, by_text)

    def _mean(self, own: Rows) -> Contrasted:
        """The mean over all ranks' rows of what they have for their own."""
        sums = torch.stack([own.losses_b.sum(), own.hits_b.sum().to(own.losses_b.dtype)])
        loss, accuracy = sum_over_ranks(sums).div(self.rows).unbind()
        return Contrasted(loss, accuracy.detach())


def _added(one: Contrasted, other: Contrasted) -> Contrasted:
    return Contrasted(one.loss + other.loss, (one.accuracy + other.accuracy) / 2)
