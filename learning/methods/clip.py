"""The baseline: two towers, pooled, projected and contrasted (Radford et al. 2021)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from learning.encoders.image_tower import ImageTower
from learning.encoders.pooling import Pooling, make_pooling
from learning.encoders.text_towers import TextTower, make_text
from learning.encoders.towers import VisionTower, make_vision
from learning.losses.temperature import Temperature, TemperatureConfig
from learning.methods.base import Batch, ContrastiveMethod, MethodConfig, Terms, Texts, Views
from learning.training.contrast import Contrast


class Config(MethodConfig):
    """The recipe's `model` section for the baseline."""

    method: Literal["clip"] = "clip"
    vision: VisionTower
    text: TextTower
    dimension: int | None = Field(
        default=512, ge=1, description="of the common space; null: not projected, the towers are equally wide"
    )
    # Differs from the paper: CLIP pools by attention or [CLS] and [EOS]; here any tower is pooled by one
    # rule.
    pooling: Pooling = "mean"
    temperature: TemperatureConfig = TemperatureConfig(learnable=True)
    hinge_margin: float = Field(default=0.2, ge=0, description="α of COOKIE's Eq. 13")
    feature_dropout: float = Field(default=0.0, ge=0, lt=1, description="on the pooled features")
    ccl_view: Literal["plain", "augmented"] = "plain"
    ccl_text_view: Literal["plain", "augmented"] = "plain"


class Head(nn.Module):
    """Tokens to a unit-length vector: pooled, then projected without bias where there is a projection."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.pooling = make_pooling(config.pooling)
        self.projection: nn.Module = nn.Identity()
        if config.dimension is not None:
            self.projection = nn.Linear(width, config.dimension, bias=False)
        self.feature_dropout = config.feature_dropout

    def forward(
        self, tokens_bnw: Float[Tensor, "b n w"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        if isinstance(self.projection, nn.Linear):
            tokens_bnw = tokens_bnw.to(self.projection.weight.dtype)
        pooled = self.pooling(tokens_bnw, mask_bn)
        projected = self.projection(F.dropout(pooled, self.feature_dropout, self.training))
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class Clip(ContrastiveMethod):
    """Two towers. Losses: `ccl`, InfoNCE of both directions summed, and `hinge` (COOKIE, Eq. 13)."""

    available_losses = ("ccl", "hinge")

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self.vision = make_vision(config.vision)
        self.text = make_text(config.text, vocabulary_size)
        if config.dimension is None and self.vision.width != self.text.width:
            raise ValueError(
                f"model.dimension: null: nothing is projected, but the image tower is {self.vision.width} "
                f"wide and the text tower {self.text.width}; set model.dimension, or choose equal widths"
            )
        self.fusion = nn.ModuleDict(
            {"image": Head(config, self.vision.width), "text": Head(config, self.text.width)}
        )
        self.temperature = Temperature(config.temperature)
        if "ccl" not in losses:
            self.temperature.requires_grad_(False)

    def frozen_image_tower(self) -> ImageTower | None:
        return None if self.config.vision.trainable else self.vision

    def views(self) -> Views:
        return Views({"image": self.config.ccl_view}, {"text": self.config.ccl_text_view})

    def encode(self, batch: Batch) -> dict[str, Float[Tensor, "b d"]]:
        tokens = batch.tokens.get("image")
        image = self.fusion["image"](self.vision(batch.images["image"]) if tokens is None else tokens)
        return {"image": image, "text": self.embed_texts(batch.texts["text"])}

    def terms(
        self, embeddings: Mapping[str, Float[Tensor, "b d"]], rows_by_rank: Sequence[int] | None = None
    ) -> Terms:
        step = Contrast(self.contrast, embeddings, rows_by_rank)
        losses: dict[str, Tensor] = {}
        report: dict[str, Tensor] = {}
        if "ccl" in self.losses:
            temperature = self.temperature()
            report["temperature"] = temperature.detach()
            # Differs from the paper: the sum of the directions, not their mean, so that weights mean what
            # COOKIE's do
            losses["ccl"], report["ccl_accuracy"] = step.both_ways("image", "text", temperature)
        if "hinge" in self.losses:
            losses["hinge"], report["hinge_accuracy"] = step.hinge("image", "text", self.config.hinge_margin)
        return Terms(losses, report)

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.fusion["image"](self.vision(images))

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return self.fusion["text"](self.text(texts), texts.mask)


METHOD = Clip
