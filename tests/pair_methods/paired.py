"""A method of the tests alone: the CLIP baseline with a small pair scorer of fixed weights beside it.

Not a package: tests/pair_case.py puts this folder on the path of `learning.methods`, as a plug-in would be.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.methods import clip
from learning.methods.base import Texts


class Config(clip.Config):
    method: Literal["paired"] = "paired"
    scorer_width: int = 8


class Paired(clip.Clip):
    """Each token of a text looks at the picture's tokens; the mean of what they agree on is the logit."""

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(config, losses, vocabulary_size)
        with torch.random.fork_rng(devices=[]):  # as good as drawn by training: the same for any seed
            torch.manual_seed(11)
            self.of_image = nn.Linear(self.vision.width, config.scorer_width).requires_grad_(False)
            self.of_text = nn.Linear(self.text.width, config.scorer_width).requires_grad_(False)

    def image_tokens(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n v"]:
        return self.vision(images)

    def text_tokens(self, texts: Texts) -> Float[Tensor, "b m t"]:
        return self.text(texts)

    def score_pairs(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
    ) -> Float[Tensor, " p"]:
        keys, asked = self.of_image(image_tokens), self.of_text(text_tokens)
        seen = (asked @ keys.mT).softmax(-1) @ keys
        agreed = (asked * seen).sum(-1) * text_mask
        return torch.sigmoid(agreed.sum(-1) / text_mask.sum(-1))

    def attention(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
        layer: int,
    ) -> Float[Tensor, "p heads m n"]:
        return (self.of_text(text_tokens) @ self.of_image(image_tokens).mT).softmax(-1)[:, None]


METHOD = Paired
