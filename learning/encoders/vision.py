"""The vision tower: any timm backbone by name, giving its tokens unpooled (COOKIE, Sec. III-A a)."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from learning.encoders.batch_norm import make_global
from learning.encoders.image_tower import ImageTower, PatchGrid
from learning.encoders.weights import load_by_name, load_by_order, read_weights

BatchNorm = Literal["local", "global", "frozen"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VitSizes(BaseModel):
    """Other sizes of a timm ViT than those of its name, for one from scratch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_px: int = Field(ge=1, description="side of a patch, pixels; divides image_px")
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> "VitSizes":
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width, {self.width}")
        return self

    def options(self) -> dict[str, int]:
        """By timm's names."""
        return {
            "patch_size": self.patch_px,
            "depth": self.layers,
            "embed_dim": self.width,
            "num_heads": self.heads,
        }


class VisionConfig(BaseModel):
    """The recipe's `model.vision` section, of a timm backbone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not written out: a model that was saved before there were kinds has none, and means this one.
    tower: Literal["timm"] = Field(default="timm", exclude=True)
    name: str = Field(description="a timm model: resnet101, resnext101_32x8d, vit_base_patch16_224, …")
    weights: Path | None = Field(
        default=None, description="local .safetensors or .pth file; null: from scratch"
    )
    key_order: bool = Field(default=False, description="fit by the order of the tensors, not their names")
    image_px: int = Field(default=512, ge=16, description="side of the square that images become, pixels")
    mean: tuple[float, float, float] = Field(
        default=IMAGENET_MEAN, description="of the pixels (0-1), by channel"
    )
    std: tuple[float, float, float] = Field(
        default=IMAGENET_STD, description="of the pixels (0-1), by channel"
    )
    batch_norm: BatchNorm = Field(
        default="local",
        description="statistics of a rank's batch, of the global one, or the stored ones for ever",
    )
    output_stride: Literal[8, 16, 32] | None = Field(
        default=None, description="pixels a token, for CNNs that timm can dilate; null: the model's own"
    )
    trainable: bool = Field(
        default=True, description="false: the backbone keeps its weights and its statistics"
    )
    frozen: tuple[str, ...] = Field(
        default=(), description="timm's names of parts that keep both, say conv_stem; the rest learns"
    )
    levels: tuple[int, ...] = Field(
        default=(),
        description="timm's feature indices of earlier maps of a CNN that stand beside the last map in each "
        "token, finer ones folded into channels, each normalised over its channels (hypercolumns)",
    )
    grid: int | None = Field(
        default=None, ge=1, description="tokens a side: a CNN's maps are averaged to it; null: the map's own"
    )
    vit: VitSizes | None = Field(
        default=None, description="other sizes of a ViT, from scratch; null: those of its name"
    )


class VisionEncoder(ImageTower):
    """(b, 3, h, w) images to (b, n, `width`) tokens, n = `tokens`, of a timm backbone without its classifier.

    A CNN's map is read row by row; a ViT gives its patches, and the tokens before them ([CLS]) first.
    Raises ValueError for a name that timm has not (with near ones), for weights that do not fit, and for
    levels or a grid that the model cannot give.
    """

    config: VisionConfig

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.backbone = _create(config)
        self.tokens, self.width = self._shape()
        if config.weights is not None:
            self._load(config.weights)
        if config.batch_norm == "global":
            make_global(self.backbone)
        if not config.trainable:
            self.backbone.requires_grad_(False)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def _encode(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # the faster layout for CNNs
        return _tokens(self.backbone, images, self.config)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """As torch's; but a frozen backbone stays in evaluation mode, and so do frozen statistics."""
        super().train(mode)
        if self.config.batch_norm == "frozen":
            # scale and shift still learn
            for part in self.backbone.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        for part in self._frozen_parts():
            part.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """The modules that timm calls blocks: a ViT's layers, a ResNet's bottlenecks."""
        matcher = self._matcher()
        named = (matcher.get("blocks") or ()) if isinstance(matcher, dict) else ()
        patterns = (
            [named] if isinstance(named, str) else [pattern for pattern, order in named if order is None]
        )
        found = [
            module
            for name, module in self.backbone.named_modules()
            if any(re.fullmatch(pattern, name) for pattern in patterns)
        ]
        if not found:
            raise ValueError(
                f"model.vision.name: timm tells no blocks of {self.config.name}; leave "
                "activation_checkpointing and compile off, or choose another backbone"
            )
        return found

    def depths(self) -> dict[str, int]:
        """As timm groups them: 0 the stem, then the blocks; what follows the last block is with it."""
        from timm.models import group_parameters

        layers = group_parameters(self.backbone, self._matcher(), reverse=True)
        return {f"backbone.{name}": layer for name, layer in layers.items()}

    def patch_grid(self) -> PatchGrid:
        """Raises ValueError for a backbone that keeps no token for each of its patches."""
        backbone: Any = self.backbone
        side, rest = divmod(self.config.image_px, self._patch_px() or self.config.image_px + 1)
        before = getattr(backbone, "num_prefix_tokens", None)
        if before is None or rest or self.tokens != before + side**2:
            raise ValueError(
                f"model.vision.name: {self.config.name} keeps no token for each of its patches; choose a "
                "ViT, say vit_base_patch16_224"
            )
        return PatchGrid(
            before, getattr(backbone, "cls_token", None) is not None, side, self.config.image_px // side
        )

    def _patch_px(self) -> int | None:
        """Side of a patch of a ViT with square ones, pixels."""
        sides = getattr(getattr(self.backbone, "patch_embed", None), "patch_size", None)
        return sides[0] if isinstance(sides, tuple) and sides[0] == sides[-1] else None

    def _patch_embedding(self) -> nn.Module:
        backbone: Any = self.backbone
        return backbone.patch_embed

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With a ViT's table of positions interpolated to this tower's patches, as timm does it."""
        return dict(state) | self._resized(state, "backbone.")

    def _resized(self, state: Mapping[str, Tensor], before: str) -> dict[str, Tensor]:
        """The table of positions in `state`, under its name behind `before`, for this `image_px`; or nothing.

        Bicubic, those of [CLS] and registers kept. What is no such table is left to the check of shapes.
        """
        backbone: Any = self.backbone
        name, own = f"{before}pos_embed", getattr(backbone, "pos_embed", None)
        table = state.get(name)
        if own is None or table is None or table.ndim != 3 or own.ndim != 3 or table.shape == own.shape:
            return {}
        kept = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        old, new = (round(max(each.shape[1] - kept, 0) ** 0.5) for each in (table, own))
        if table.shape[1] != kept + old**2 or own.shape[1] != kept + new**2 or not old:
            return {}
        from timm.layers import resample_abs_pos_embed

        return {name: resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=kept)}

    def _matcher(self) -> Any:
        backbone: Any = self.backbone
        if not hasattr(backbone, "group_matcher"):
            raise ValueError(
                f"model.vision.name: timm tells no layers of {self.config.name}; leave "
                "optimizer.layer_decay, activation_checkpointing and compile off, or choose another backbone"
            )
        return backbone.group_matcher(coarse=False)

    def _frozen_parts(self) -> list[nn.Module]:
        modules = dict(self.backbone.named_modules())
        unknown = [name for name in self.config.frozen if name not in modules or not name]
        if unknown:
            tops = ", ".join(name for name, _ in self.backbone.named_children())
            raise ValueError(
                f"model.vision.frozen: {self.config.name} has no part '{unknown[0]}'; "
                f"it has {tops}, and parts of them"
            )
        return [modules[name] for name in self.config.frozen]

    def _shape(self) -> tuple[int, int]:
        """Tokens and their width, found without computing: the backbone runs on the meta device."""
        side = self.config.image_px
        images = torch.empty(1, 3, side, side, device="meta")
        training = self.backbone.training
        self.backbone.eval()
        whole = _Whole(self.backbone, self.config)
        state = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        with torch.no_grad():
            there = {name: value.to("meta") for name, value in state.items()}
            tokens = torch.func.functional_call(whole, there, (images,))
        self.backbone.train(training)
        return tokens.shape[1], tokens.shape[2]

    def _load(self, path: Path) -> None:
        field = "model.vision.weights"
        found = read_weights(path, field)
        if self.config.key_order:
            load_by_order(self.backbone, found, f"{field}: {path}")
            return
        found |= self._resized(found, "")
        preset: dict[str, Any] = getattr(self.backbone, "pretrained_cfg", None) or {}
        named = preset.get("classifier") or ()
        heads = (named,) if isinstance(named, str) else tuple(named)
        load_by_name(self.backbone, found, [f"{head}." for head in heads], f"{field}: {path}")


class _Whole(nn.Module):
    """A backbone and what makes tokens of its maps, as one module that can be called with other weights."""

    def __init__(self, backbone: nn.Module, config: VisionConfig):
        super().__init__()
        self.backbone, self.config = backbone, config

    def forward(self, images: Tensor) -> Tensor:
        return _tokens(self.backbone, images, self.config)


def _tokens(backbone: Any, images: Tensor, config: VisionConfig) -> Tensor:
    """(b, n, v): the backbone's last map, and its `levels` beside it, as tokens."""
    if not config.levels and config.grid is None:
        features = backbone(images)
        if features.ndim == 3:
            return features
        if getattr(backbone, "output_fmt", "NCHW") != "NHWC":
            features = features.permute(0, 2, 3, 1)
        return features.flatten(1, 2)
    last, maps = _maps(backbone, images, config)
    columns = torch.cat([last, *(_folded(each, last.shape[-1]) for each in maps)], dim=1)
    if config.grid is not None:
        columns = F.adaptive_avg_pool2d(columns, config.grid)
    return columns.flatten(2).transpose(1, 2)


def _maps(backbone: Any, images: Tensor, config: VisionConfig) -> tuple[Tensor, list[Tensor]]:
    """The last map and those of `levels`, (b, c, h, w) each. Raises ValueError for a model without them."""
    try:
        if config.levels:
            last, maps = backbone.forward_intermediates(images, indices=list(config.levels))
        else:
            last, maps = backbone(images), []
    except (AttributeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"model.vision.levels: {config.name} does not give the maps {list(config.levels)}: {error}"
        ) from error
    if last.ndim != 4 or getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        raise ValueError(f"model.vision.levels and grid are for CNNs; {config.name} has no map (b, c, h, w)")
    return last, maps


def _folded(maps: Tensor, side: int) -> Tensor:
    """An earlier map on the last one's grid, finer cells as channels, normalised over its channels."""
    finer, rest = divmod(maps.shape[-1], side)
    if rest == 0 and maps.shape[-2] == maps.shape[-1]:
        maps = F.pixel_unshuffle(maps, finer)
    else:
        maps = F.adaptive_avg_pool2d(maps, side)
    return F.layer_norm(maps.movedim(1, -1), maps.shape[1:2]).movedim(-1, 1)


def _create(config: VisionConfig) -> nn.Module:
    import timm  # seconds of imports, which a plan or a submission that reads the config need not wait for

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(
            f"model.vision.name: '{config.name}' is not a timm model; near it: {', '.join(near) or 'none'}"
        )
    preset = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "", "pretrained": False}
    if preset is not None and preset.fixed_input_size:
        options["img_size"] = config.image_px
    if config.vit is not None:
        options |= config.vit.options()
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    try:
        return timm.create_model(config.name, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"model.vision: timm cannot make {config.name} with {options}: {error}; "
            "mind image_px, output_stride and vit"
        ) from error
