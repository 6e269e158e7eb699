"""The vision tower of CLIP (Radford et al. 2021): transformers' ViT, [CLS] and patches, all normalised."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from learning.encoders.image_tower import ImageTower, PatchGrid
from learning.encoders.local_model import check_sizes, read_config, resolve_sizes, weights_file
from learning.encoders.weights import load_by_name, read_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PRESETS: dict[str, dict[str, int]] = {
    "clip_vit_b16": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072, "patch_px": 16},
    "clip_vit_b32": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072, "patch_px": 32},
    "clip_vit_l14": {"layers": 24, "width": 1024, "heads": 16, "intermediate": 4096, "patch_px": 14},
}
# The recipe's fields; transformers' names of them, and what a config.json that lacks them means.
_SIZES: dict[str, tuple[str, int | str]] = {
    "layers": ("num_hidden_layers", 12),
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "intermediate": ("intermediate_size", 3072),
    "patch_px": ("patch_size", 32),
    "hidden_act": ("hidden_act", "quick_gelu"),
}
_FIXED = {"num_channels": 3, "layer_norm_eps": 1e-5}
_SECTION = "model.vision"
_POSITIONS = "embeddings.position_embedding.weight"
# Of a whole CLIP's file; and what old versions of transformers wrote beside the weights.
_NOT_VISION = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "embeddings.position_ids",
)


class ClipVisionConfig(BaseModel):
    """The recipe's `model.vision` section with `tower: clip`. Sizes come from a preset or from the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: Literal["clip"]
    name: str | None = Field(
        default=None, description="a preset: clip_vit_b16, clip_vit_b32, clip_vit_l14; null: the sizes below"
    )
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    patch_px: int = Field(ge=1, description="side of a patch, pixels")
    hidden_act: Literal["quick_gelu", "gelu"] = Field(
        default="quick_gelu", description="OpenAI's weights have quick_gelu; others say theirs in config.json"
    )
    weights: Path | None = Field(
        default=None,
        description="local HF directory of a whole CLIP or of its vision tower; null: from scratch",
    )
    image_px: int = Field(
        default=224,
        ge=1,
        description="side of the square that images become, pixels; for another than the weights', their "
        "table of positions is interpolated",
    )
    mean: tuple[float, float, float] = Field(default=CLIP_MEAN, description="of the pixels (0-1), by channel")
    std: tuple[float, float, float] = Field(default=CLIP_STD, description="of the pixels (0-1), by channel")
    trainable: bool = Field(default=False, description="false: the tower keeps its weights")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        return resolve_sizes(values, PRESETS, read_sizes, "CLIP")

    @model_validator(mode="after")
    def _check(self) -> "ClipVisionConfig":
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width, {self.width}")
        if self.image_px % self.patch_px:
            below = self.image_px // self.patch_px * self.patch_px
            near = " or ".join(str(px) for px in (below, below + self.patch_px) if px)
            raise ValueError(
                f"image_px: {self.image_px} is no whole number of patches of {self.patch_px} px; say {near}"
            )
        return self


class ClipVisionEncoder(ImageTower):
    """(b, 3, h, w) images to (b, n, `width`) tokens, n = `tokens`: [CLS], then the patches row by row.

    Raises ValueError for weights that do not fit.
    """

    config: ClipVisionConfig

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.config = config
        self.width = config.width
        self.tokens = 1 + (config.image_px // config.patch_px) ** 2
        # Not with this module, as timm in learning/encoders/vision.py
        from transformers import CLIPVisionConfig, CLIPVisionModel

        clip = CLIPVisionConfig(
            image_size=config.image_px,
            **{theirs: getattr(config, ours) for ours, (theirs, _) in _SIZES.items()},
        )
        clip._attn_implementation = "sdpa"
        self.backbone = CLIPVisionModel(clip)
        if config.weights is not None:
            self._load(config.weights)
        if not config.trainable:
            self.backbone.requires_grad_(False)
        self.train(self.training)

    def _encode(self, images: Tensor) -> Tensor:
        clip: Any = self.backbone
        hidden = clip.pre_layrnorm(clip.embeddings(images))
        hidden = clip.encoder(inputs_embeds=hidden).last_hidden_state
        # Differs from CLIP, which reads [CLS] alone and so normalises no other token. Here cross encoders
        # and pooling read all of them, and the residual stream as it is has a few channels that drown the
        # rest; so the patches go through the same layer norm.
        return clip.post_layernorm(hidden)

    def blocks(self) -> list[nn.Module]:
        backbone: Any = self.backbone
        return list(backbone.encoder.layers)

    def depths(self) -> dict[str, int]:
        """0: the embeddings and the norm after them; then the layers, the last norm with the last of them."""
        inside = "backbone.encoder.layers."
        found = {}
        for name, _ in self.named_parameters():
            if name.startswith(inside):
                found[name] = 1 + int(name.removeprefix(inside).split(".")[0])
            else:
                found[name] = self.config.layers if name.startswith("backbone.post_layernorm.") else 0
        return found

    def patch_grid(self) -> PatchGrid:
        px = self.config.patch_px
        return PatchGrid(1, True, self.config.image_px // px, px)

    def _patch_embedding(self) -> nn.Module:
        backbone: Any = self.backbone
        return backbone.embeddings.patch_embedding

    def _changed(self, found: Tensor, hide: Callable[[Tensor], Tensor]) -> Tensor:
        """Of a convolution's output, (b, v, side, side)."""
        return hide(found.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(found.shape)

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the table of positions interpolated to this tower's patches."""
        name = f"backbone.{_POSITIONS}"
        changed = {name: resized_positions(state[name], self.tokens)} if name in state else {}
        return {**state, **changed}

    def _load(self, directory: Path) -> None:
        check_sizes(self.config, directory, read_sizes(directory), _SECTION)
        path = weights_file(directory, _SECTION)
        where = f"{_SECTION}.weights: {path}"
        found = read_weights(path, f"{_SECTION}.weights")
        found = {name.removeprefix("vision_model."): value for name, value in found.items()}
        if _POSITIONS in found:
            try:
                found[_POSITIONS] = resized_positions(found[_POSITIONS], self.tokens)
            except ValueError as error:
                raise ValueError(f"{where}: {_POSITIONS}: {error}") from error
        load_by_name(self.backbone, found, _NOT_VISION, where)


def resized_positions(table: Tensor, rows: int) -> Tensor:
    """(1 + s², c) positions, [CLS]'s first, as (rows, c): those of the s × s patches bicubic, [CLS]'s kept.

    As transformers' own `interpolate_pos_encoding` does it, but once and for all. Raises ValueError for a
    table that is not one of [CLS] and a square of patches.
    """
    old, new = (round(max(count - 1, 0) ** 0.5) for count in (len(table), rows))
    if table.ndim != 2 or len(table) != 1 + old**2 or not old:
        raise ValueError(
            f"has the shape {tuple(table.shape)}, which is not [CLS] and a square of patches; give CLIP's own"
        )
    if old == new:
        return table
    grid_1chw = table[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = F.interpolate(grid_1chw, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized[0].flatten(1).T.to(table.dtype)])


def read_sizes(directory: Path) -> dict[str, int | str]:
    """The sizes in a local CLIP's config.json, by the recipe's names; ValueError names file and key."""
    content = read_config(directory, _SECTION)
    place = f"{_SECTION}: {directory / 'config.json'}"
    kind = content.get("model_type")
    if kind == "clip":
        content = content.get("vision_config") or {}
    elif kind != "clip_vision_model":
        raise ValueError(
            f"{place}: model_type is {kind!r}; only 'clip' and 'clip_vision_model' are read; for others, "
            "leave `tower: clip` out and name a timm model"
        )
    if not isinstance(content, dict):
        raise ValueError(f"{place}: vision_config: must be an object, is {content!r}")
    for key, needed in _FIXED.items():
        if content.get(key, needed) != needed:
            raise ValueError(f"{place}: {key} is {content[key]!r}; only {needed!r} is supported")
    found: dict[str, int | str] = {}
    for ours, (theirs, default) in _SIZES.items():
        value = content.get(theirs, default)
        if type(value) is not type(default):
            raise ValueError(f"{place}: {theirs} is {value!r}; it must be like {default!r}")
        found[ours] = value
    if found["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ValueError(f"{place}: hidden_act is {found['hidden_act']!r}; only quick_gelu and gelu are read")
    return found
