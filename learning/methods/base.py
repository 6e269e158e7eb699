"""What a method is: a module that embeds a batch's views, and gives unweighted losses of them by name."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from learning.encoders.vision import VisionEncoder
from learning.training.contrast import ContrastConfig

ImageView = Literal["plain", "augmented"]
TextView = Literal["plain", "augmented"]


class MethodConfig(BaseModel):
    """The recipe's `model` section. A method's own Config adds its fields and narrows `method`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str


@dataclass
class Texts:
    """Token ids and their mask (1 = token, 0 = padding), both (batch, length)."""

    ids: Int64[Tensor, "b m"]
    mask: Int64[Tensor, "b m"]

    def to(self, device: torch.device) -> "Texts":
        return Texts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def pin_memory(self) -> "Texts":
        return Texts(self.ids.pin_memory(), self.mask.pin_memory())

    def rows(self, part: slice) -> "Texts":
        return Texts(self.ids[part], self.mask[part])


@dataclass
class Batch:
    """One rank's part of a global batch. `images` and `texts` hold the views that the method asked for."""

    images: dict[str, Float[Tensor, "b 3 h w"]]
    texts: dict[str, Texts]
    keys: list[str]  # sample keys, for the ledger and for errors
    # What a frozen image tower gave for a view, which `images` then lacks (data.cache: tokens)
    tokens: dict[str, Float[Tensor, "b n v"]] = field(default_factory=dict)
    rows_by_rank: tuple[int, ...] | None = None  # of every rank's part; None: all have as many as this one

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Batch":
        """On the device; from pinned memory to a GPU without waiting for the copy."""
        return Batch(
            {name: image.to(device, non_blocking=True) for name, image in self.images.items()},
            {name: text.to(device) for name, text in self.texts.items()},
            self.keys,
            {name: tokens.to(device, non_blocking=True) for name, tokens in self.tokens.items()},
            self.rows_by_rank,
        )

    def rows(self, part: slice) -> "Batch":
        """Some of this rank's rows; `rows_by_rank` stays that of the whole."""
        return Batch(
            {name: image[part] for name, image in self.images.items()},
            {name: text.rows(part) for name, text in self.texts.items()},
            self.keys[part],
            {name: tokens[part] for name, tokens in self.tokens.items()},
            self.rows_by_rank,
        )

    def pin_memory(self) -> "Batch":
        """In page-locked memory; needs a GPU. What is on a GPU already (a frozen tower's tokens) stays."""
        return Batch(
            {name: image.pin_memory() for name, image in self.images.items()},
            {name: text.pin_memory() for name, text in self.texts.items()},
            self.keys,
            {name: t if t.is_cuda else t.pin_memory() for name, t in self.tokens.items()},
            self.rows_by_rank,
        )


@dataclass
class Terms:
    """Scalars of one step: `losses`, unweighted, are summed by the recipe's weights; `report` is shown."""

    losses: dict[str, Float[Tensor, ""]]
    report: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Views:
    """The views of a sample that a method wants, by name, and how each is made."""

    images: Mapping[str, ImageView]
    texts: Mapping[str, TextView]


class Method(nn.Module, ABC):
    """One paper. `losses` are the names of the losses to compute (the keys of the recipe's weights).

    A step is `encode`, row by row, and `terms`, over the rows of all ranks: the first may be done in parts.
    """

    available_losses: ClassVar[tuple[str, ...]] = ()
    contrast = ContrastConfig()  # how `terms` computes over ranks; an engine sets the recipe's

    def __init__(self, losses: tuple[str, ...]):
        super().__init__()
        unknown = [name for name in losses if name not in self.available_losses]
        if unknown:
            raise ValueError(
                f"losses: {', '.join(map(repr, unknown))} is not a loss of {type(self).__name__}; "
                f"allowed: {', '.join(self.available_losses)}"
            )
        self.losses = tuple(losses)

    @abstractmethod
    def views(self) -> Views:
        """The views that `encode` reads, given the losses to compute."""

    @abstractmethod
    def encode(self, batch: Batch) -> dict[str, Float[Tensor, "b d"]]:
        """Unit-length embeddings of the views. No row depends on another, but by batch normalisation."""

    @abstractmethod
    def terms(
        self, embeddings: Mapping[str, Float[Tensor, "b d"]], rows_by_rank: Sequence[int] | None = None
    ) -> Terms:
        """Unweighted losses of what `encode` gave; the keys equal `self.losses`.

        Embeddings are gathered over ranks with gradient; `rows_by_rank` as in `Batch`.
        """

    def forward(self, batch: Batch) -> Terms:
        """The losses of a batch: `terms` of `encode`."""
        return self.terms(self.encode(batch), batch.rows_by_rank)

    @abstractmethod
    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-length image embeddings."""

    @abstractmethod
    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        """Unit-length text embeddings."""

    def frozen_image_tower(self) -> VisionEncoder | None:
        """Images (b, 3, h, w) → tokens (b, n, v), if it never learns: `encode` reads Batch.tokens."""
        return None

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part (`vision`, `text`, `fusion`, …): for plans and learning rates."""
        grouped: dict[str, list[nn.Parameter]] = {}
        for name, child in self.named_children():
            grouped[name] = [p for p in child.parameters() if p.requires_grad]
        own = [p for p in self.parameters(recurse=False) if p.requires_grad]
        if own:
            grouped["other"] = own
        return {name: parameters for name, parameters in grouped.items() if parameters}

    def after_step(self) -> None:
        """Called once after each optimizer step that was not skipped."""
