"""The image tower that there is none of: regions of pictures, with their features, come with the batch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from learning.encoders.vision import IMAGENET_MEAN, IMAGENET_STD


class RegionsConfig(BaseModel):
    """The recipe's `model.vision` section where a stage of kind `regions` has what a tower would give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: Literal["regions"] = "regions"
    count: int = Field(default=36, ge=1, description="regions of each picture")
    width: int = Field(default=1024, ge=1, description="of a region's features")
    classes: int = Field(
        default=1600, ge=1, description="object classes that regions may have: 0 … classes - 1"
    )

    # Pictures are only shown, never read: how they would be prepared is the same in every recipe.
    @property
    def image_px(self) -> int:
        return 224

    @property
    def mean(self) -> tuple[float, float, float]:
        return IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, float, float]:
        return IMAGENET_STD

    @property
    def trainable(self) -> bool:
        return False
