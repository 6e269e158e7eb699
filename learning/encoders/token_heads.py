"""ConLIP's pre-training heads: masked tokens of one side, rebuilt by attending to the other's (Sec. 3.1)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from learning.encoders.cross import CrossEncoder
from learning.encoders.fusion import embedding_vectors, initialise_linear
from learning.encoders.heads import MaskedLanguageHead
from learning.losses.masked import rows_at


class HeadSizes(NamedTuple):
    """Of the transformer of a head."""

    layers: int
    width: int
    heads: int
    intermediate: int
    dropout: float
    shared: bool  # all layers have the same weights


class MaskToken(nn.Module):
    """The learned embedding that stands for a masked patch, before positions are added (SimMIM, Sec. 3.2)."""

    def __init__(self, width: int):
        super().__init__()
        self.token = embedding_vectors(width)

    def forward(
        self, patches_bpv: Float[Tensor, "b p v"], masked_bp: Bool[Tensor, "b p"]
    ) -> Float[Tensor, "b p v"]:
        return torch.where(masked_bp[:, :, None], self.token.to(patches_bpv.dtype), patches_bpv)


class TokenHead(nn.Module):
    """A transformer with cross-attention, and on its tokens at some places what predicts the input there."""

    def __init__(self, sizes: HeadSizes, predictor: nn.Module):
        super().__init__()
        self.sizes = sizes
        self.encoder = CrossEncoder(*sizes)
        self.predictor = predictor

    def forward(
        self,
        tokens_bnw: Float[Tensor, "b n w"],
        mask_bn: Int64[Tensor, "b n"] | None,
        other_bkw: Float[Tensor, "b k w"],
        other_mask_bk: Int64[Tensor, "b k"] | None,
        places_bj: Int64[Tensor, "b j"],
    ) -> Float[Tensor, "b j c"]:
        """The predictions at `places_bj` of the tokens. Masks: 1 = token, 0 = padding; None: no padding."""
        hidden = self.encoder(tokens_bnw, mask_bn, other_bkw, other_mask_bk)
        return self.predictor(rows_at(hidden, places_bj))

    def cls_attention(
        self,
        tokens_bnw: Float[Tensor, "b n w"],
        mask_bn: Int64[Tensor, "b n"] | None,
        other_bkw: Float[Tensor, "b k w"],
        other_mask_bk: Int64[Tensor, "b k"] | None,
    ) -> Float[Tensor, "b h n"]:
        """How each token attends to the other side's [CLS], which comes first, in each attention head; in the
        last layer."""
        return self.encoder.attention(tokens_bnw, mask_bn, other_bkw, other_mask_bk, self.sizes.layers)[
            :, :, :, 0
        ]


def word_head(sizes: HeadSizes, vocabulary_size: int) -> TokenHead:
    """Of MLM: logits over the vocabulary, by BERT's head."""
    return TokenHead(sizes, MaskedLanguageHead(sizes.width, vocabulary_size))


def pixel_head(sizes: HeadSizes, patch_px: int) -> TokenHead:
    """Of MIM: the values of a patch, (3 · patch_px²), by one linear layer (SimMIM, Sec. 3.3)."""
    predictor = nn.Linear(sizes.width, 3 * patch_px**2)
    initialise_linear(predictor)
    return TokenHead(sizes, predictor)
