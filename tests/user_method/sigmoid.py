"""A method as a user would add one: two towers and a sigmoid loss of each pair (SigLIP, Zhai et al. 2023)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from learning.encoders.text import TextConfig, TextEncoder
from learning.encoders.towers import VisionTower, make_vision
from learning.methods.base import Batch, Method, MethodConfig, Terms, Texts, Views
from learning.training.distributed import gather, rank, sum_over_ranks, world_size


class Config(MethodConfig):
    """The recipe's `model` section."""

    method: Literal["sigmoid"] = "sigmoid"
    vision: VisionTower
    text: TextConfig
    dimension: int = Field(default=512, ge=1, description="of the common space")


class Sigmoid(Method):
    """Loss `sigmoid` (Algorithm 1): each pair is a right one or not, on its own; the mean over images."""

    available_losses = ("sigmoid",)

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self.vision = make_vision(config.vision)
        self.text = TextEncoder(config.text, vocabulary_size)
        self.image_projection = nn.Linear(self.vision.width, config.dimension)
        self.text_projection = nn.Linear(self.text.width, config.dimension)
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def views(self) -> Views:
        return Views({"image": "plain"}, {"text": "plain"})

    def forward(self, batch: Batch) -> Terms:
        images = self.embed_images(batch.images["image"])
        texts = gather(self.embed_texts(batch.texts["text"]), batch.rows_by_rank)
        each = batch.rows_by_rank or (len(batch),) * world_size()
        first = sum(each[: rank()])
        is_pair = torch.arange(len(images))[:, None] + first == torch.arange(len(texts))
        sign = is_pair.to(images.device, images.dtype) * 2 - 1
        logits = self.log_scale.exp() * images @ texts.T + self.bias
        total = sum_over_ranks(-F.logsigmoid(sign * logits).sum())
        return Terms({"sigmoid": total / len(texts)}, {"bias": self.bias.detach().squeeze(0)})

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return F.normalize(self.image_projection(self.vision(images).mean(dim=1)), dim=-1)

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return F.normalize(self.text_projection(self.text(texts)[:, 0]), dim=-1)


METHOD = Sigmoid
