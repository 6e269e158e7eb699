"""ConLIP (Luo et al.): momentum contrast of [CLS], and masked modelling that has to read [CLS]."""

from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from learning.encoders.image_tower import ImageTower
from learning.encoders.momentum import FeatureQueue, Momentum
from learning.encoders.text import TextConfig, TextEncoder
from learning.encoders.token_heads import HeadSizes, MaskToken, TokenHead, pixel_head, word_head
from learning.encoders.towers import VisionTower, make_vision
from learning.losses.contrastive import decoupled_rows, queued_info_nce_rows
from learning.losses.masked import (
    masked_patch_rows,
    masked_places,
    masked_token_rows,
    patches_of,
    rows_at,
)
from learning.losses.temperature import Temperature, TemperatureConfig
from learning.methods.base import (
    Batch,
    MaskedTokens,
    Method,
    MethodConfig,
    Terms,
    Texts,
    TextView,
    Views,
)
from learning.training.distributed import gather, rank, sum_over_ranks, world_size
from learning.training.masking import drawn_patches
from learning.training.randomness import stable_hash

INSTANCE = ("dcl", "info_nce")
TOKEN = ("mlm", "mim")
SIDES = ("image", "text")


class Config(MethodConfig):
    """The recipe's `model` section for ConLIP. Defaults are the paper's (Table 6) where it has any."""

    method: Literal["conlip"] = "conlip"
    vision: VisionTower
    text: TextConfig
    dimension: int | None = Field(
        default=None,
        ge=1,
        description="of the instance vectors and width of the heads: both sides' tokens are projected to it; "
        "null: not projected, the towers are equally wide (the paper's 768)",
    )
    temperature: TemperatureConfig = TemperatureConfig(initial=0.05)
    image_view: Literal["plain", "augmented", "randaugment"] = "plain"
    momentum: float = Field(default=0.99, ge=0, lt=1, description="m of Eq. 8")
    queue: int = Field(default=12_288, ge=1, description="features of each side that are kept")
    positive: Literal["momentum", "online"] = Field(
        default="momentum",
        description="what a query's positive is a feature of: the momentum encoder, as its negatives, or the "
        "encoder that learns",
    )
    conditioned: bool = Field(
        default=True,
        description="of the other side's complete input the token losses see [CLS] alone (ConMLM, ConMIM); "
        "false: all its tokens (vanilla MLM, MIM)",
    )
    text_mask_share: float = Field(default=0.15, gt=0, le=1, description="of a text's ordinary tokens")
    image_mask_share: float = Field(default=0.5, gt=0, le=1, description="of the masked units of an image")
    # The paper is silent on the units: SimMIM's, two patches of ViT-B/16 a side
    image_mask_px: int = Field(default=32, ge=1, description="side of what is masked together, pixels")
    head_layers: int = Field(default=1, ge=1, description="of each of the two heads")
    head_shared: bool = Field(default=False, description="the layers of a head have the same weights")
    # The paper is silent on the size of a layer: BERT's
    head_heads: int = Field(default=12, ge=1)
    head_intermediate: int = Field(default=3072, ge=1, description="width of the heads' FFN")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="in the heads")


class Side(NamedTuple):
    """One side's tokens, [CLS] first, with their mask; None: no padding."""

    tokens: Float[Tensor, "b n w"]
    mask: Int64[Tensor, "b n"] | None


class Asked(NamedTuple):
    """What a head gets: tokens with masked ones among them, and what they may attend to."""

    tokens: Side
    other: Side


class ConLIP(Method):
    """Losses: `dcl` (Eq. 10-12) or `info_nce` (Eq. 9 both ways), `mlm` (Eq. 5) and `mim` (Eq. 6).

    With the weights 1, mlm + mim is Eq. 7 and dcl + mlm + mim is Eq. 4.
    """

    available_losses = ("dcl", "info_nce", "mlm", "mim")
    training_only = ("teacher.", "queues.")
    training_heads = ("heads.",)

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config, self.vocabulary_size = config, vocabulary_size
        self._check_losses()
        self.vision = make_vision(config.vision)
        self.text = TextEncoder(config.text, vocabulary_size)
        self._check_towers()
        if config.dimension is not None:
            self.image_projection = nn.Linear(self.vision.width, config.dimension)
            self.text_projection = nn.Linear(self.text.width, config.dimension)
        self.temperature = Temperature(config.temperature)
        if not set(losses) & set(INSTANCE):
            self.temperature.requires_grad_(False)
        self._taught: _Taught | None = None  # by this step's forward; it counts once the step is applied

    @property
    def width(self) -> int:
        """Of the instance vectors and of the heads."""
        return self.config.dimension or self.text.width

    def frozen_image_tower(self) -> ImageTower | None:
        return None if self.config.vision.trainable else self.vision

    def views(self) -> Views:
        texts: dict[str, TextView] = {"text": "plain"}
        if self.masks_texts:
            texts["text_masked"] = MaskedTokens(self.config.text_mask_share)
        return Views({"image": self.config.image_view}, texts)

    def make_heads(self) -> None:
        """As `Method` says: the heads of the token losses, all of their weights random (Sec. 4.1)."""
        config = self.config
        made: dict[str, nn.Module] = {}
        sizes = HeadSizes(
            config.head_layers,
            self.width,
            config.head_heads,
            config.head_intermediate,
            config.dropout,
            config.head_shared,
        )
        if "mlm" in self.losses:
            made["mlm"] = word_head(sizes, self.vocabulary_size)
        if "mim" in self.losses:
            made["mim"] = pixel_head(sizes, self.vision.patch_grid().px)
        if self.masks_images:
            made["mask_token"] = MaskToken(self.vision.width)
        if made:
            self.heads = nn.ModuleDict(made)

    def begin(self) -> None:
        """Heads; momentum encoders that begin as the encoders are now; empty queues."""
        self.make_heads()
        if set(self.losses) & set(INSTANCE):
            self.teacher = Momentum(self.config.momentum, **self._followed())
            self.queues = nn.ModuleDict({side: FeatureQueue(self.config.queue, self.width) for side in SIDES})

    def forward(self, batch: Batch) -> Terms:
        step = _Step(self, batch)
        terms = Terms({})
        self._taught = None
        for name in self.losses:
            if name in INSTANCE:
                self._instance(name, step, terms)
        if "mlm" in self.losses:
            self._masked_language(step, terms)
        if "mim" in self.losses:
            self._masked_image(step, terms)
        return terms

    def after_step(self) -> None:
        """The momentum encoders follow (Eq. 8); what they gave of this step's batch stays in the queues."""
        taught, self._taught = self._taught, None
        if taught is None:
            return
        self.teacher.follow(**self._followed())
        for side in SIDES:
            self.queues[side].push(taught.features[side], taught.ids)  # type: ignore[operator]

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return _unit(self.image_side(self.vision(images))[:, 0])

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return _unit(self.text_side(self.text(texts))[:, 0])

    def image_side(self, tokens: Float[Tensor, "b n v"]) -> Float[Tensor, "b n w"]:
        """An image tower's [CLS] and patches, registers left out; projected where there is a projection."""
        before = self.vision.patch_grid().before
        if before > 1:
            tokens = torch.cat([tokens[:, :1], tokens[:, before:]], dim=1)
        return self.image_projection(tokens) if self.config.dimension is not None else tokens

    def text_side(self, tokens: Float[Tensor, "b m t"]) -> Float[Tensor, "b m w"]:
        """A text tower's tokens, projected where there is a projection."""
        return self.text_projection(tokens) if self.config.dimension is not None else tokens

    def cls_attention(self, batch: Batch) -> dict[str, Float[Tensor, "b h n"]]:
        """As `AttendsToCls` says; of the heads that there are."""
        step, found = _Step(self, batch, alone=True), {}
        for loss, way in (("mlm", "text_to_image"), ("mim", "image_to_text")):
            if loss in self.losses:
                asked = step.asked(loss)
                head: TokenHead = self.heads[loss]  # type: ignore[assignment]
                found[way] = head.cls_attention(*asked.tokens, *asked.other)
        return found

    def _instance(self, name: str, step: "_Step", terms: Terms) -> None:
        """Both directions of Eq. 10, 11 (`dcl`) or of Eq. 9 (`info_nce`), summed as in Eq. 12.

        A key gets no gradient, but for a positive of the encoder that learns.
        """
        # Differs from the paper: as printed, Eq. 9-11 have h of the encoders that learn in the positive. Then
        # both may run from the queue, all features alike, and DCL falls without bound (seen on the demo).
        # Sec. 3.3 follows MoCo, whose positive is a key as the negatives are.
        rows = decoupled_rows if name == "dcl" else queued_info_nce_rows
        temperature = self.temperature()
        terms.report["temperature"] = temperature.detach()
        own = {"image": _unit(step.image.tokens[:, 0]), "text": _unit(step.text.tokens[:, 0])}
        taught = self._taught = step.ask_teacher()
        total, hits = temperature.new_zeros(()), temperature.new_zeros(())
        for query, key in (("text", "image"), ("image", "text")):
            # The paper is silent on when features enter the queue: before the loss reads it, in the place of
            # the oldest, so that there are negatives from the first step on, and as many as the queue is
            # long. Those of the query's own sample, or of what shows the same, are no negatives.
            queue = self.queues[key].pushed(taught.features[key], taught.ids)  # type: ignore[operator]
            positive = taught.features[key][step.own_rows]
            if self.config.positive == "online":
                positive = own[key]
            found = rows(own[query], positive, temperature, queue, step.ids)
            total, hits = total + found.losses_b.sum(), hits + found.hits_b.sum()
        loss, hits = sum_over_ranks(torch.stack([total, hits])).div(step.rows).unbind()
        terms.losses[name] = loss
        terms.report[f"{name}_accuracy"] = hits.detach() / 2

    def _masked_language(self, step: "_Step", terms: Terms) -> None:
        """Eq. 5: the mean over the masked tokens of all ranks."""
        # Differs from the paper: Eq. 5 is the sum over a sample, without its sign
        plain, hidden = step.batch.texts["text"], step.batch.texts["text_masked"]
        masked = masked_places(plain.ids, hidden.ids, self.config.text_mask_share)
        asked = step.asked("mlm")
        logits = self.heads["mlm"](*asked.tokens, *asked.other, masked.places_bk)
        losses = masked_token_rows(logits, masked)
        right = (logits.argmax(dim=2) == masked.targets_bk) & masked.asked_bk
        sums = torch.stack([losses.sum(), *(x.sum().to(losses.dtype) for x in (right, masked.asked_bk))])
        loss, hits, count = sum_over_ranks(sums).unbind()
        count = count.detach().clamp(min=1)  # texts of no ordinary token have none
        terms.losses["mlm"] = loss / count
        terms.report["mlm_accuracy"] = (hits / count).detach()

    def _masked_image(self, step: "_Step", terms: Terms) -> None:
        """Eq. 6: the mean over the masked patches of all ranks."""
        asked, places = step.asked("mim"), step.masked_patches
        predicted = self.heads["mim"](*asked.tokens, *asked.other, 1 + places)  # behind [CLS]
        pixels = patches_of(step.batch.images["image"], self.vision.patch_grid().px)
        losses = masked_patch_rows(predicted, rows_at(pixels, places))
        terms.losses["mim"] = sum_over_ranks(losses.sum()) / (step.rows * places.shape[1])

    def _followed(self) -> dict[str, nn.Module]:
        """The modules that have momentum copies: a frozen image tower is its own."""
        modules: dict[str, nn.Module] = {"text": self.text}
        if self.config.vision.trainable:
            modules["vision"] = self.vision
        if self.config.dimension is not None:
            modules |= {"image_projection": self.image_projection, "text_projection": self.text_projection}
        return modules

    @property
    def masks_texts(self) -> bool:
        """Whether a loss reads the masked text."""
        return "mlm" in self.losses or ("mim" in self.losses and self.config.conditioned)

    @property
    def masks_images(self) -> bool:
        """Whether a loss reads the masked image."""
        return "mim" in self.losses or ("mlm" in self.losses and self.config.conditioned)

    def _check_losses(self) -> None:
        if set(INSTANCE) <= set(self.losses):
            raise ValueError(
                "losses: dcl is info_nce without the positive in its denominator; give one of the two"
            )

    def _check_towers(self) -> None:
        """Raises ValueError for towers that the method, or one of its losses, cannot read."""
        config, widths = self.config, (self.vision.width, self.text.width)
        grid = self.vision.patch_grid()
        if not grid.has_cls:
            raise ValueError("model.vision.name: its first token is no [CLS]; choose a ViT that has one")
        if config.dimension is None and widths[0] != widths[1]:
            raise ValueError(
                f"model.dimension: null: nothing is projected, but the image tower is {widths[0]} wide and "
                f"the text tower {widths[1]}; set model.dimension, or choose equal widths"
            )
        if set(self.losses) & set(TOKEN) and self.width % config.head_heads:
            raise ValueError(f"model.head_heads: {config.head_heads} does not divide {self.width}, the width")
        if not self.masks_images:
            return
        loss = "mim" if "mim" in self.losses else "mlm with model.conditioned: true"
        if not config.vision.trainable:
            raise ValueError(
                f"losses: {loss} masks patches within the image tower, which must learn what that means; "
                "set model.vision.trainable: true, or leave the loss out"
            )
        px = config.vision.image_px
        if config.image_mask_px % grid.px or px % config.image_mask_px:
            raise ValueError(
                f"model.image_mask_px: {config.image_mask_px} must be a multiple of a patch's {grid.px} px "
                f"and divide model.vision.image_px: {px}"
            )


class _Taught(NamedTuple):
    """Unit features by the momentum encoders, of all ranks' rows, by side; and the rows' ids."""

    features: dict[str, Float[Tensor, "n d"]]
    ids: Int64[Tensor, " n"]


class _Step:
    """One batch through the towers, each view once and only where a loss asks for it."""

    def __init__(self, method: ConLIP, batch: Batch, alone: bool = False):
        """`alone`: the rows are all that there are, whatever other ranks have."""
        self.method, self.batch = method, batch
        each = [len(batch)] * world_size() if batch.rows_by_rank is None else list(batch.rows_by_rank)
        first, self.rows = (0, len(batch)) if alone else (sum(each[: rank()]), sum(each))
        self.own_rows = slice(first, first + len(batch))

    def asked(self, loss: str) -> Asked:
        """What the head of `mlm` or `mim` gets (Fig. 3)."""
        if loss == "mlm":
            own, complete, hidden = self.masked_text, self.image, lambda: self.masked_image
        else:
            own, complete, hidden = self.masked_image, self.text, lambda: self.masked_text
        if not self.method.config.conditioned:
            return Asked(own, complete)
        tokens = torch.cat([complete.tokens[:, :1], hidden().tokens[:, 1:]], dim=1)
        return Asked(own, Side(tokens, complete.mask))

    @cached_property
    def image(self) -> Side:
        return Side(self.method.image_side(self._image_tokens), None)

    @cached_property
    def _image_tokens(self) -> Float[Tensor, "b n v"]:
        """The image tower's of the complete image."""
        tokens = self.batch.tokens.get("image")
        return self.method.vision(self.batch.images["image"]) if tokens is None else tokens

    @cached_property
    def masked_image(self) -> Side:
        """Eq. 3: the tower has the mask token in place of the masked patches."""
        images, places = self.batch.images["image"], self.masked_patches
        mask_token = self.method.heads["mask_token"]

        def hide(patches: Tensor) -> Tensor:
            masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
            return mask_token(patches, masked.scatter(1, places, True))

        return Side(self.method.image_side(self.method.vision(images, hide)), None)

    @property
    def text(self) -> Side:
        return self._texts[0]

    @property
    def masked_text(self) -> Side:
        return self._texts[-1]

    @cached_property
    def _texts(self) -> tuple[Side, ...]:
        """The text, and the masked one where a loss reads it, by one forward."""
        text, method = self.batch.texts["text"], self.method
        if not method.masks_texts:
            return (Side(method.text_side(method.text(text)), text.mask),)
        hidden = self.batch.texts["text_masked"]
        both = Texts(torch.cat([text.ids, hidden.ids]), torch.cat([text.mask, hidden.mask]))
        tokens = method.text_side(method.text(both)).chunk(2)
        return Side(tokens[0], text.mask), Side(tokens[1], hidden.mask)

    @cached_property
    def masked_patches(self) -> Int64[Tensor, "b k"]:
        """Places of the masked patches of each image, drawn over all ranks' rows."""
        config, grid = self.method.config, self.method.vision.patch_grid()
        seed = stable_hash(self.batch.draw, "patches")
        unit = config.image_mask_px // grid.px
        device = self.batch.images["image"].device
        places = drawn_patches(seed, self.rows, grid.side, unit, config.image_mask_share, device)
        return places[self.own_rows]

    @cached_property
    def ids(self) -> Int64[Tensor, " b"]:
        """What each sample shows."""
        if self.batch.ids is not None:
            return self.batch.ids
        hashes = [stable_hash(key) for key in self.batch.keys]
        return torch.tensor(hashes, device=self.batch.texts["text"].ids.device)

    def ask_teacher(self) -> _Taught:
        """What the momentum encoders make of the complete inputs, without gradient."""
        method, batch = self.method, self.batch
        teacher: Any = method.teacher
        tokens = self._image_tokens.detach()  # not within no_grad: they are kept for the losses
        with teacher.computing(tokens.dtype, tokens.device):
            if method.config.vision.trainable:
                tokens = teacher.vision(batch.images["image"])
            image, text = tokens[:, 0], teacher.text(batch.texts["text"])[:, 0]
            if method.config.dimension is not None:
                image, text = teacher.image_projection(image), teacher.text_projection(text)
            both = torch.cat([_unit(image), _unit(text)], dim=1)
        images, texts = gather(both, batch.rows_by_rank).chunk(2, dim=1)
        return _Taught({"image": images, "text": texts}, gather(self.ids, batch.rows_by_rank))


def _unit(feature: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1)


METHOD = ConLIP
