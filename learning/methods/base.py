"""What a method is: a module that gives unweighted losses of a batch's views by name, and embeds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from learning.encoders.image_tower import ImageTower
from learning.training.contrast import ContrastConfig


@dataclass(frozen=True)
class MaskedTokens:
    """A text view: `share` (0-1) of a text's ordinary tokens, rounded, at least one, are [MASK]."""

    share: float


@dataclass(frozen=True)
class MaskedPatches:
    """An image view: the plain one, `share` (0-1) of its patches, rounded, in the mean colour: 0."""

    share: float
    patch_px: int  # side of a patch; divides image_px


@dataclass(frozen=True)
class LabelSet:
    """Labels of which a sample may have several: the `names` that are counted, in the order of the columns.

    `fields` of a record are read together: `classes`, a list, or the name of one of its labels.
    """

    fields: tuple[str, ...]
    names: tuple[str, ...]


ImageView = Literal["plain", "augmented", "randaugment"] | MaskedPatches
TextView = Literal["plain", "augmented"] | MaskedTokens


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


NO_CLASS = -1


@dataclass
class Regions:
    """The segments of pictures: what a detector, or a tower's grid, gave of each of r regions.

    `positions` are (a1/W, b1/H, a2/W, b2/H, area/(W·H)) of a box from (a1, b1), its top left, to (a2, b2), in
    a picture of W × H (Semantic Sharing, Sec. 3.2). `classes` number object classes; NO_CLASS: unknown.
    """

    features: Float[Tensor, "b r v"]
    positions: Float[Tensor, "b r 5"]
    classes: Int64[Tensor, "b r"]

    def __len__(self) -> int:
        return len(self.features)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Regions":
        return Regions(change(self.features), change(self.positions), change(self.classes))


@dataclass
class Batch:
    """One rank's part of a global batch. `images` and `texts` hold the views that the method asked for."""

    images: dict[str, Float[Tensor, "b 3 h w"]]
    texts: dict[str, Texts]
    keys: list[str]  # sample keys, for the ledger and for errors
    # What a frozen image tower gave for a view, which `images` then lacks (data.cache: tokens)
    tokens: dict[str, Float[Tensor, "b n v"]] = field(default_factory=dict)
    rows_by_rank: tuple[int, ...] | None = None  # of every rank's part; None: all have as many as this one
    # Samples of one id show the same: they are each other's positives. None: every row is its own.
    ids: Int64[Tensor, " b"] | None = None
    labels: dict[str, Int64[Tensor, " b"]] = field(default_factory=dict)  # those of `Views.labels`
    # 1 where a sample has a label, by the names of `Views.label_sets`
    label_sets: dict[str, Float[Tensor, "b c"]] = field(default_factory=dict)
    regions: Regions | None = None  # where `Views.regions` asks for them
    draw: int = 0  # seed of what a method draws over the rows of all ranks: the same on all of them

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Batch":
        """On the device; from pinned memory to a GPU without waiting for the copy."""
        return self._each(lambda x: x.to(device, non_blocking=True), lambda text: text.to(device))

    def rows(self, part: slice) -> "Batch":
        """Some of this rank's rows; `rows_by_rank` stays that of the whole."""
        made = self._each(lambda x: x[part], lambda text: text.rows(part))
        return replace(made, keys=self.keys[part])

    def pin_memory(self) -> "Batch":
        """In page-locked memory; needs a GPU. What is on a GPU already (a frozen tower's tokens) stays."""
        return self._each(lambda x: x if x.is_cuda else x.pin_memory(), lambda text: text.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor], change_text: Callable[[Texts], Texts]) -> "Batch":
        return replace(
            self,
            images={name: change(image) for name, image in self.images.items()},
            texts={name: change_text(text) for name, text in self.texts.items()},
            tokens={name: change(tokens) for name, tokens in self.tokens.items()},
            ids=None if self.ids is None else change(self.ids),
            labels={name: change(values) for name, values in self.labels.items()},
            label_sets={name: change(values) for name, values in self.label_sets.items()},
            regions=None if self.regions is None else self.regions.each(change),
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
    labels: tuple[str, ...] = ()  # of the samples, whole numbers: they come as Batch.labels
    label_sets: Mapping[str, LabelSet] = field(default_factory=dict)  # they come as Batch.label_sets
    regions: bool = False  # the regions of each picture: they come as Batch.regions


class Method(nn.Module, ABC):
    """One paper. `losses` are the names of the losses to compute (the keys of the recipe's weights)."""

    available_losses: ClassVar[tuple[str, ...]] = ()
    # beginnings of names of state that only training needs (a teacher, queues): made by `begin`, in
    # checkpoints, not in the model that is written out
    training_only: ClassVar[tuple[str, ...]] = ()
    # beginnings of names of parameters that the losses alone read (heads that are dropped after training):
    # made by `make_heads`, in checkpoints, and written beside the model, not into it
    training_heads: ClassVar[tuple[str, ...]] = ()
    contrast = ContrastConfig()  # how a loss is computed over ranks; an engine sets the recipe's

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
        """The views that `forward` reads, given the losses to compute."""

    @abstractmethod
    def forward(self, batch: Batch) -> Terms:
        """The unweighted losses of a batch, over the rows of all ranks; the keys equal `self.losses`."""

    @abstractmethod
    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-length image embeddings."""

    @abstractmethod
    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        """Unit-length text embeddings."""

    def frozen_image_tower(self) -> ImageTower | None:
        """Images (b, 3, h, w) → tokens (b, n, v), if it never learns: `forward` reads Batch.tokens."""
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

    def make_heads(self) -> None:
        """Makes the parameters of `training_heads`; `begin` calls it, and who wants them alone."""

    def begin(self) -> None:
        """Called once before training, the weights in place: makes the state that only training needs."""
        self.make_heads()

    def after_step(self) -> None:
        """Called once after each optimizer step that was not skipped."""


class ContrastiveMethod(Method):
    """A method whose losses read the embeddings of the views alone.

    A step is `encode`, row by row, and `terms`, over the rows of all ranks: the first may be done in parts.
    """

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


@runtime_checkable
class RanksPairs(Protocol):
    """A method that judges an image and a text together: for re-ranking and matching."""

    def image_tokens(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n v"]:
        """What `score_pairs` reads of images."""
        ...

    def text_tokens(self, texts: Texts) -> Float[Tensor, "b m t"]:
        """What `score_pairs` reads of texts, beside their mask."""
        ...

    def score_pairs(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
    ) -> Float[Tensor, " p"]:
        """The probability (0-1) that image i and text i match. No pair depends on another."""
        ...

    def attention(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
        layer: int,
    ) -> Float[Tensor, "p heads m n"]:
        """How text tokens attend to image tokens in a layer (from 1) of the text-image encoder."""
        ...


@runtime_checkable
class EmbedsRegions(Protocol):
    """A method that may read the regions of pictures in place of their pixels."""

    def embed_regions(self, regions: Regions) -> Float[Tensor, "b d"]:
        """Unit-length image embeddings."""
        ...


@runtime_checkable
class AttendsToCls(Protocol):
    """A method whose heads let tokens of one side attend to the other side's, [CLS] among them."""

    def cls_attention(self, batch: Batch) -> dict[str, Float[Tensor, "b h n"]]:
        """How each token attends to the other side's [CLS], in each attention head, by direction.

        `text_to_image` and `image_to_text`, where there is such a head; the batch has the views of `views()`
        and is no part of a larger one.
        """
        ...
