"""Regions of pictures without a detector: the cells of the last map of a timm classifier."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data_tools.pictures import EncodedPicture
from data_tools.regions.store import PictureRegions
from learning.encoders.vision import IMAGENET_MEAN, IMAGENET_STD
from learning.encoders.weights import load_by_name, load_by_order, read_weights
from learning.training.augment import ImageTransform

_TOLERANCE = 1e-4  # of the classifier on the mean of the cells against the model's own logits, relative


class GridConfig(BaseModel):
    """Which classifier, and how it sees pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(description="a timm model whose classifier reads the mean of its last map")
    weights: Path | None = Field(
        default=None, description="local .safetensors or .pth file, the classifier in it; null: random"
    )
    key_order: bool = Field(default=False, description="fit by the order of the tensors, not their names")
    image_px: int = Field(default=192, ge=16, description="side of the square that images become, pixels")
    mean: tuple[float, float, float] = Field(default=IMAGENET_MEAN, description="of the pixels (0-1)")
    std: tuple[float, float, float] = Field(default=IMAGENET_STD, description="of the pixels (0-1)")


class RegionGrid:
    """The cells of a picture's last map, row by row: features, boxes, and the classifier's class of each.

    A class is the largest logit of the model's own classifier on the cell's features; their mean over the
    cells are the picture's logits. Raises ValueError for a model of another build, and for weights that do
    not fit.
    """

    # Differs from the paper: a grid of one map in place of a detector's regions; for where there is none.
    class_names = None

    def __init__(self, config: GridConfig, device: torch.device, seed: int = 0):
        """`seed`: of weights where the config names none, the same on every rank."""
        self.transform = ImageTransform(config.image_px, config.mean, config.std)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _model(config).eval().requires_grad_(False).to(device)
        self.device = device
        side = config.image_px
        probe = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        cells = self._checked(config.name, probe)
        self.rows, self.columns, self.width = cells.shape[1:]
        self.regions = self.rows * self.columns
        self.class_count = int(self.model.get_classifier().out_features)

    @torch.inference_mode()
    def of(self, picture: EncodedPicture) -> PictureRegions:
        """The regions of a picture. Raises PictureError where it cannot be decoded."""
        cells = self.cells(self.transform.plain(picture)[None].to(self.device))[0].flatten(0, 1)
        classes = self.model.get_classifier()(cells).argmax(-1)
        return PictureRegions(cells.cpu().numpy(), self.positions(), classes.int().cpu().numpy())

    def cells(self, images: Float[Tensor, "b 3 p p"]) -> Float[Tensor, "b h w c"]:
        """The map that the model's classifier reads the mean of."""
        maps = self.model.forward_features(images)
        return maps if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else maps.movedim(1, -1)

    def positions(self) -> np.ndarray:
        """(r, 5): the cells' boxes in a picture of any size, as it was squeezed into the square."""
        top, left = np.divmod(np.arange(self.regions), self.columns)
        x, y = left / self.columns, top / self.rows
        box = [x, y, x + 1 / self.columns, y + 1 / self.rows, np.full(self.regions, 1 / self.regions)]
        return np.stack(box, axis=1).astype(np.float32)

    @torch.inference_mode()
    def _checked(self, name: str, probe: Tensor) -> Tensor:
        """The cells of `probe`, once it is seen that their mean gives the model's logits."""
        maps = self.model.forward_features(probe)
        classifier = self.model.get_classifier()
        problem = None
        if maps.ndim != 4:
            problem = f"it gives no map but {tuple(maps.shape)}"
        elif not isinstance(classifier, nn.Linear):
            problem = f"its classifier is {type(classifier).__name__}, no linear layer"
        elif self.cells(probe).shape[-1] != classifier.in_features:
            problem = "its classifier reads another map"
        else:
            logits = self.model(probe)
            off = (classifier(self.cells(probe)).mean((1, 2)) - logits).abs().max()
            if off > _TOLERANCE * logits.abs().max():
                problem = "its logits are not those of the mean of the map"
        if problem is not None:
            raise ValueError(
                f"source.name: {name}: {problem}; give a CNN such as tf_efficientnet_lite0 or resnet50"
            )
        return self.cells(probe)


def _model(config: GridConfig) -> Any:
    import timm  # seconds of imports, which a plan need not wait for

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(
            f"source.name: '{config.name}' is not a timm model; near it: {', '.join(near) or 'none'}"
        )
    try:
        model = timm.create_model(config.name, pretrained=False)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"source.name: timm cannot make {config.name}: {error}") from error
    if config.weights is not None:
        found = read_weights(config.weights, "source.weights")
        load = load_by_order if config.key_order else _by_name
        load(model, found, f"source.weights: {config.weights}")
    return model


def _by_name(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    load_by_name(model, found, (), where)
