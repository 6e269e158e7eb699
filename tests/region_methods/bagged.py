"""A method of the tests alone: a bag of regions, averaged, against a bag of words; and a classifier on it.

Not a package: tests/region_case.py puts this folder on the path of `learning.methods`, as a plug-in would be.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from learning.losses.contrastive import info_nce
from learning.methods.base import (
    Batch,
    ContrastiveMethod,
    LabelSet,
    MethodConfig,
    Regions,
    Terms,
    Texts,
    Views,
)
from learning.training.distributed import gather


class Vision(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    tower: Literal["regions"] = "regions"
    count: int = 4
    width: int = 6
    image_px: int = 16
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class Text(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    max_length: int = 12


class Config(MethodConfig):
    method: Literal["bagged"] = "bagged"
    vision: Vision = Vision()
    text: Text = Text()
    dimension: int = 8
    labels: tuple[str, ...] = ("red", "blue")


class Bagged(ContrastiveMethod):
    available_losses = ("ccl",)

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self.vision = nn.Linear(config.vision.width + 5, config.dimension)
        self.text = nn.Embedding(vocabulary_size, config.dimension)
        self.temperature = nn.Parameter(torch.tensor([0.3]))

    def views(self) -> Views:
        sets = {"topic": LabelSet(("classes", "concept"), self.config.labels)}
        return Views({}, {"text": "plain"}, label_sets=sets, regions=True)

    def embed_regions(self, regions: Regions) -> Tensor:
        read = self.vision(torch.cat([regions.features, regions.positions], dim=-1)).tanh()
        return nn.functional.normalize(read.mean(1).float(), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def embed_texts(self, texts: Texts) -> Tensor:
        words = self.text(texts.ids) * texts.mask[..., None]
        return nn.functional.normalize(words.sum(1).float(), dim=-1)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.regions is not None
        return {"image": self.embed_regions(batch.regions), "text": self.embed_texts(batch.texts["text"])}

    def terms(self, embeddings: Mapping[str, Tensor], rows_by_rank: Sequence[int] | None = None) -> Terms:
        image, text = (gather(embeddings[side], rows_by_rank) for side in ("image", "text"))
        return Terms({"ccl": info_nce(image, text, self.temperature.float().squeeze(0))})


METHOD = Bagged
