"""The kinds of image towers: the type of a recipe's `model.vision` section, and the tower that it names."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from learning.encoders.clip_vision import ClipVisionConfig, ClipVisionEncoder
from learning.encoders.image_tower import ImageTower
from learning.encoders.regions import RegionsConfig
from learning.encoders.vision import VisionConfig, VisionEncoder

_PIXELS: dict[str, type[BaseModel]] = {"timm": VisionConfig, "clip": ClipVisionConfig}


def _by_kind(configs: Mapping[str, type[BaseModel]]) -> Callable[[Any], Any]:
    """Parses by the Config of its kind, so that an error is of that kind's fields alone."""

    def parsed(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("tower", "timm")
        if kind == "regions" and kind not in configs:
            raise ValueError(
                "tower: regions are not read by this method, which computes from pixels; "
                f"allowed: {', '.join(configs)}"
            )
        if kind not in configs:
            raise ValueError(f"tower: {kind!r} is not a kind of image tower; allowed: {', '.join(configs)}")
        return configs[kind].model_validate(values)

    return parsed


VisionTower = Annotated[VisionConfig | ClipVisionConfig, BeforeValidator(_by_kind(_PIXELS))]
# for a method that reads segments, whoever made them
VisionOrRegions = Annotated[
    VisionConfig | ClipVisionConfig | RegionsConfig,
    BeforeValidator(_by_kind(_PIXELS | {"regions": RegionsConfig})),
]


def make_vision(config: VisionTower) -> ImageTower:
    """The tower, its weights as the config says. Raises ValueError as VisionEncoder and ClipVisionEncoder."""
    return ClipVisionEncoder(config) if isinstance(config, ClipVisionConfig) else VisionEncoder(config)
