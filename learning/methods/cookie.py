"""COOKIE (Wen et al.): two towers, TAV-TE and WS-TE on top, cross-modal and single-modal contrast."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from learning.encoders.fusion import (
    Activation,
    FullyConnected,
    TransformerEncoder,
    embedding_vectors,
)
from learning.encoders.image_tower import ImageTower
from learning.encoders.pooling import Pooling, make_pooling
from learning.encoders.text_towers import TextTower, make_text
from learning.encoders.towers import VisionTower, make_vision
from learning.losses.temperature import Temperature, TemperatureConfig
from learning.methods.base import (
    Batch,
    ContrastiveMethod,
    ImageView,
    MethodConfig,
    Terms,
    Texts,
    TextView,
    Views,
)
from learning.training.contrast import Contrast

Side = Literal["image", "text"]
CclView = Literal["plain", "augmented", "a"]
SIDES: dict[str, tuple[Side, ...]] = {
    "ccl": ("image", "text"),
    "hinge": ("image", "text"),
    "vcl": ("image",),
    "tcl": ("text",),
}


class Config(MethodConfig):
    """The recipe's `model` section for COOKIE. Defaults are the paper's (Sec. IV-A b) where it has any."""

    method: Literal["cookie"] = "cookie"
    vision: VisionTower
    text: TextTower
    dimension: int = Field(default=1024, ge=1, description="D, of the common space")
    heads: int = Field(default=8, ge=1, description="of TAV-TE and WS-TE")
    intermediate: int = Field(default=1024, ge=1, description="width of their FFN")
    tav_layers: int = Field(default=1, ge=0, description="of TAV-TE; 0: without it (Table IX)")
    ws_layers: int = Field(default=2, ge=0, description="of WS-TE (Table X)")
    sharing: Literal["shared", "unshared", "none", "fc"] = Field(
        default="shared", description="WS-TE for both sides, one a side, none, or shared FC layers (Table IX)"
    )
    pooling: Pooling = "max"
    temperature: TemperatureConfig = TemperatureConfig()
    hinge_margin: float = Field(default=0.2, ge=0, description="α of Eq. 13")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="in TAV-TE and WS-TE")
    activation: Activation = "relu"
    feature_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="on the towers' tokens, before Eq. 1 and 2"
    )
    token_norm: bool = Field(
        default=False, description="LayerNorm after the FC of Eq. 1 and 2; the paper has none"
    )
    ccl_view: CclView = Field(
        default="plain",
        description="image of CCL and hinge; a: VCL's first view serves for both, one encoding less",
    )
    ccl_text_view: CclView = Field(default="plain", description="text of CCL and hinge, likewise with TCL")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.dimension % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dimension, {self.dimension}")
        return self


class CommonSpace(nn.Module):
    """The towers' tokens to one vector a side (Eq. 1-4)."""

    def __init__(self, config: Config, vision_width: int, vision_tokens: int, text_width: int):
        super().__init__()
        d = config.dimension
        # The paper is silent on initialisation: FC layers even in ±1/√fan-in, their biases 0; normal of 0.02
        # for p, s_V and s_T. It is silent on p's order too: row by row over the map, or the ViT's own order.
        self.image_fc = nn.Linear(vision_width, d)  # W_V, b_V
        self.text_fc = nn.Linear(text_width, d)  # W_T, b_T
        nn.init.zeros_(self.image_fc.bias)
        nn.init.zeros_(self.text_fc.bias)
        self.position = embedding_vectors(vision_tokens, d)  # p
        self.image_vector = embedding_vectors(d)  # s_V
        self.text_vector = embedding_vectors(d)  # s_T
        self.image_norm = nn.LayerNorm(d) if config.token_norm else nn.Identity()
        self.text_norm = nn.LayerNorm(d) if config.token_norm else nn.Identity()
        self.tav = self._encoder(config, config.tav_layers)
        self.ws = self._top(config)
        # The paper is silent on whether GPO's weights are shared: one a side, as in GPO's own work [32].
        self.pooling = nn.ModuleDict(
            {"image": make_pooling(config.pooling), "text": make_pooling(config.pooling)}
        )
        self.feature_dropout = config.feature_dropout

    @classmethod
    def _top(cls, config: Config) -> nn.ModuleDict:
        """Table IX: one module for `both` sides, one a side, or nothing."""
        if config.sharing == "shared":
            return nn.ModuleDict({"both": cls._encoder(config, config.ws_layers)})
        if config.sharing == "unshared":
            return nn.ModuleDict({side: cls._encoder(config, config.ws_layers) for side in ("image", "text")})
        if config.sharing == "fc":
            layers = FullyConnected(config.ws_layers, config.dimension, config.activation)
            return nn.ModuleDict({"both": layers})
        return nn.ModuleDict()

    @staticmethod
    def _encoder(config: Config, layers: int) -> TransformerEncoder:
        return TransformerEncoder(
            layers, config.dimension, config.heads, config.intermediate, config.dropout, config.activation
        )

    def image(self, v_bnv: Float[Tensor, "b n v"]) -> Float[Tensor, "b d"]:
        """I, of unit length, from the backbone's tokens."""
        projected = self.image_norm(self.image_fc(self._dropped(v_bnv))) + self.position  # Eq. 1
        f_bnd = self.tav(projected) + self.image_vector  # Eq. 3
        return self._pooled("image", f_bnd, None)

    def text(self, t_bmt: Float[Tensor, "b m t"], mask_bm: Int64[Tensor, "b m"]) -> Float[Tensor, "b d"]:
        """T, of unit length, from BERT's last layer; [CLS] and [SEP] are tokens like the others."""
        f_bmd = self.text_norm(self.text_fc(self._dropped(t_bmt))) + self.text_vector  # Eq. 2
        return self._pooled("text", f_bmd, mask_bm)

    def _pooled(self, side: Side, f_bnd: Tensor, mask_bn: Tensor | None) -> Tensor:
        """Eq. 4, and the length of 1 that makes its products cosines."""
        name = side if side in self.ws else "both"
        if name in self.ws:
            f_bnd = self.ws[name](f_bnd, mask_bn)
        pooled = self.pooling[side](f_bnd, mask_bn)
        return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)

    def _dropped(self, features: Tensor) -> Tensor:
        return F.dropout(features.to(self.image_fc.weight.dtype), self.feature_dropout, self.training)

    def only(self, side: Side) -> list[nn.Module | nn.Parameter]:
        """What only one side uses."""
        own: list[nn.Module | nn.Parameter] = [self.pooling[side]]
        if side in self.ws:
            own.append(self.ws[side])
        if side == "image":
            return [*own, self.image_fc, self.position, self.image_vector, self.image_norm, self.tav]
        return [*own, self.text_fc, self.text_vector, self.text_norm]


class Cookie(ContrastiveMethod):
    """COOKIE. Losses: `ccl` = L_i2t + L_t2i (Eq. 6-7), `vcl` (Eq. 9), `tcl` (Eq. 11), `hinge` (Eq. 13).

    The recipe's weights sum them: all 1 is Eq. 12. What no chosen loss uses is frozen, so that every
    trainable parameter gets a gradient.
    """

    available_losses = ("ccl", "vcl", "tcl", "hinge")

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self.vision = make_vision(config.vision)
        self.text = make_text(config.text, vocabulary_size)
        self.fusion = CommonSpace(config, self.vision.width, self.vision.tokens, self.text.width)
        self.temperature = Temperature(config.temperature)
        towers: dict[Side, nn.Module] = {"image": self.vision, "text": self.text}
        for side, tower in towers.items():
            if not any(side in SIDES[loss] for loss in losses):
                for part in (tower, *self.fusion.only(side)):
                    part.requires_grad_(False)
        if not set(losses) - {"hinge"}:
            self.temperature.requires_grad_(False)

    def frozen_image_tower(self) -> ImageTower | None:
        return None if self.config.vision.trainable else self.vision

    def views(self) -> Views:
        crossed = "ccl" in self.losses or "hinge" in self.losses
        images: dict[str, ImageView] = {}
        texts: dict[str, TextView] = {}
        if crossed and not self._reused("image"):
            images["image"] = "plain" if self.config.ccl_view == "plain" else "augmented"
        if crossed and not self._reused("text"):
            texts["text"] = "plain" if self.config.ccl_text_view == "plain" else "augmented"
        if "vcl" in self.losses:
            images |= {"image_a": "augmented", "image_b": "augmented"}
        if "tcl" in self.losses:
            texts |= {"text_a": "augmented", "text_b": "augmented"}
        return Views(images, texts)

    def _reused(self, side: Side) -> bool:
        """Whether CCL and the hinge take the first augmented view (`a`), and no view of their own."""
        # Differs from the paper, where a recipe says so: there CCL has the raw image and text
        if side == "image":
            return self.config.ccl_view == "a" and "vcl" in self.losses
        return self.config.ccl_text_view == "a" and "tcl" in self.losses

    def encode(self, batch: Batch) -> dict[str, Float[Tensor, "b d"]]:
        return self._images(batch) | self._texts(batch.texts)

    def terms(
        self, embeddings: Mapping[str, Float[Tensor, "b d"]], rows_by_rank: Sequence[int] | None = None
    ) -> Terms:
        step = Contrast(self.contrast, embeddings, rows_by_rank)
        image = "image_a" if self._reused("image") else "image"
        text = "text_a" if self._reused("text") else "text"
        temperature = self.temperature()
        losses: dict[str, Tensor] = {}
        report: dict[str, Tensor] = {}
        if set(self.losses) & {"ccl", "vcl", "tcl"}:
            report["temperature"] = temperature.detach()
        if "ccl" in self.losses:  # Eq. 6, 7
            losses["ccl"], report["ccl_accuracy"] = step.both_ways(image, text, temperature)
        if "vcl" in self.losses:  # Eq. 8, 9
            losses["vcl"], report["vcl_accuracy"] = step.info_nce("image_a", "image_b", temperature)
        if "tcl" in self.losses:  # Eq. 10, 11
            losses["tcl"], report["tcl_accuracy"] = step.info_nce("text_a", "text_b", temperature)
        if "hinge" in self.losses:  # Eq. 13
            losses["hinge"], report["hinge_accuracy"] = step.hinge(image, text, self.config.hinge_margin)
        return Terms(losses, report)

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.fusion.image(self.vision(images))

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return self.fusion.text(self.text(texts), texts.mask)

    def _images(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of all views by one forward pass, but for those whose tokens are there already."""
        # The paper is silent on batch normalisation over views: the raw and the augmented images are one
        # batch, so with `local` and `global` statistics they are normalised together, as SimCLR [35] does
        # its views.
        names = list(self.views().images)
        if not names:
            return {}
        tokens = dict(batch.tokens)
        fresh = [name for name in names if name not in tokens]
        if fresh:
            made = self.vision(torch.cat([batch.images[name] for name in fresh]))
            tokens |= dict(zip(fresh, made.chunk(len(fresh)), strict=True))
        embedded = self.fusion.image(torch.cat([tokens[name].to(tokens[names[-1]].dtype) for name in names]))
        return dict(zip(names, embedded.chunk(len(names)), strict=True))

    def _texts(self, views: dict[str, Texts]) -> dict[str, Tensor]:
        """Embeddings of all views by one forward pass, padded to the longest of them."""
        names = list(self.views().texts)
        if not names:
            return {}
        longest = max(views[name].ids.shape[1] for name in names)
        ids, masks = [], []
        for name in names:
            missing = longest - views[name].ids.shape[1]
            ids.append(F.pad(views[name].ids, (0, missing)))  # what stands in padding is never read
            masks.append(F.pad(views[name].mask, (0, missing)))
        embedded = self.embed_texts(Texts(torch.cat(ids), torch.cat(masks)))
        return dict(zip(names, embedded.chunk(len(names)), strict=True))


METHOD = Cookie
