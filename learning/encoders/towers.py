"""The kinds of image towers: the type of a recipe's `model.vision` section, and the tower that it names."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from learning.encoders.clip_vision import ClipVisionConfig, ClipVisionEncoder
from learning.encoders.image_tower import ImageTower
from learning.encoders.vision import VisionConfig, VisionEncoder

_CONFIGS: dict[str, type[BaseModel]] = {"timm": VisionConfig, "clip": ClipVisionConfig}


def _by_kind(values: Any) -> Any:
    """Parsed by the Config of its kind, so that an error is of that kind's fields alone."""
    if not isinstance(values, dict):
        return values
    kind = values.get("tower", "timm")
    if kind not in _CONFIGS:
        raise ValueError(f"tower: {kind!r} is not a kind of image tower; allowed: {', '.join(_CONFIGS)}")
    return _CONFIGS[kind].model_validate(values)


VisionTower = Annotated[VisionConfig | ClipVisionConfig, BeforeValidator(_by_kind)]


def make_vision(config: VisionTower) -> ImageTower:
    """The tower, its weights as the config says. Raises ValueError as VisionEncoder and ClipVisionEncoder."""
    return ClipVisionEncoder(config) if isinstance(config, ClipVisionConfig) else VisionEncoder(config)
