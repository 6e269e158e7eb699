"""Two cross encoders that judge whether an image and a text match (R2D2, Sec. 3.1 and Eq. 3)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.encoders.cross import CrossEncoder
from learning.losses.matching import match_probability

ImageCls = Literal["first", "mean"]


def with_cls(tokens_bnv: Float[Tensor, "b n v"], how: ImageCls) -> Float[Tensor, "b n1 v"]:
    """Image tokens that begin with [CLS]: the tower's own first one, or the mean of all, put before them."""
    if how == "first":
        return tokens_bnv
    return torch.cat([tokens_bnv.mean(dim=1, keepdim=True), tokens_bnv], dim=1)


class Fused(NamedTuple):
    """What the cross encoders read of some samples, [CLS] first."""

    tokens: Float[Tensor, "p n w"]
    mask: Int64[Tensor, "p n"] | None  # None: no padding

    def rows(self, part: slice) -> "Fused":
        return Fused(self.tokens[part], None if self.mask is None else self.mask[part])


class Judged(NamedTuple):
    """What the cross encoders give for some pairs."""

    by_image: Float[Tensor, "p 2"]  # logits from the image's [CLS] after the image-text encoder
    by_text: Float[Tensor, "p 2"]  # and from the text's after the text-image one
    text_tokens: Float[Tensor, "q m w"]  # of the text-image encoder, where they were asked for

    def probability(self) -> Float[Tensor, " p"]:
        """The mean of both encoders' probabilities (0-1) of a match."""
        return (match_probability(self.by_image) + match_probability(self.by_text)) / 2


class Ranking(nn.Module):
    """Fine-grained ranking: both sides' tokens, projected to one width, through both cross encoders.

    `image_text` has the image's tokens as its queries and the text's as its keys, `text_image` the other way
    round: Fig. 1 feeds text features into the image-text encoder and image features into the text-image one.
    """

    def __init__(self, layers: int, width: int, heads: int, intermediate: int, dropout: float):
        super().__init__()
        self.image_text = CrossEncoder(layers, width, heads, intermediate, dropout)
        self.text_image = CrossEncoder(layers, width, heads, intermediate, dropout)
        self.match_head = nn.Linear(width, 2)  # g of Eq. 3: one for both

    def forward(self, images: Fused, texts: Fused, tokens_of: int | None = None) -> Judged:
        """Row i of both is a pair. Every pair is judged alone.

        `tokens_of`: of so many pairs, from the first on, all tokens of the text-image encoder are wanted; of
        the others, and with None of all, the last layer computes [CLS] alone.
        """
        by_image = self.image_text(*images, *texts, first=1)[:, 0]
        if tokens_of is None:
            by_text = tokens = self.text_image(*texts, *images, first=1)
        else:
            whole, rest = slice(tokens_of), slice(tokens_of, None)
            tokens = self.text_image(*texts.rows(whole), *images.rows(whole))
            others = self.text_image(*texts.rows(rest), *images.rows(rest), first=1)
            by_text = torch.cat([tokens[:, :1], others])
        return Judged(self.match_head(by_image), self.match_head(by_text[:, 0]), tokens)

    def attention(self, images: Fused, texts: Fused, layer: int) -> Float[Tensor, "p heads m n"]:
        """From text tokens to the image's, [CLS] left out, in a layer (from 1) of the text-image encoder."""
        return self.text_image.attention(*texts, *images, layer)[..., 1:]

    def read_by(self, losses: tuple[str, ...]) -> None:
        """Freeze what no loss of `fgr`, `match` and `mlm` reaches."""
        judges = "fgr" in losses or "match" in losses
        for part in (self.image_text, self.match_head):
            part.requires_grad_(judges)
        self.text_image.requires_grad_(judges or "mlm" in losses)
