"""Segments of an image or a text as inputs of a shared encoder: what each one is, and where (Eq. 3)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from learning.encoders.fusion import ACTIVATIONS, Activation, embedding_vectors


class SegmentEmbedding(nn.Module):
    """e = φ(ψ1(segment) + ψ2(position)): Semantic Sharing (Yang et al. 2021), Eq. 3. One a modality.

    `position_width`: numbers of a position; None: segments without one. `maskable`: has a [MASK] that stands
    in for a segment, before ψ1; its position stays.
    """

    # The paper is silent on φ: "another non-linear mapping" is an FC layer and the encoder's activation.
    def __init__(
        self,
        width: int,
        position_width: int | None,
        dimension: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        maskable: bool = False,
    ):
        super().__init__()
        self.segment_fc = nn.Linear(width, dimension)  # ψ1
        self.position_fc = None if position_width is None else nn.Linear(position_width, dimension)  # ψ2
        self.mixed_fc = nn.Linear(dimension, dimension)  # φ
        self.mask_vector = embedding_vectors(width) if maskable else None
        self.activation = ACTIVATIONS[activation]
        self.dropout = dropout

    def forward(
        self,
        segments_bnw: Float[Tensor, "b n w"],
        positions: Float[Tensor, "*b n p"] | None = None,
        masked_cn: Bool[Tensor, "c n"] | None = None,
    ) -> Float[Tensor, "c n d"]:
        """`positions`: of all samples, or of each. `masked_cn`: True where [MASK] stands in.

        c is b; or a multiple of it, where the samples are read several times, masked in as many ways.
        """
        dtype = self.segment_fc.weight.dtype
        e_bnd = self.segment_fc(F.dropout(segments_bnw.to(dtype), self.dropout, self.training))
        copies = [e_bnd]
        if masked_cn is not None:
            assert self.mask_vector is not None
            mask_d = self.segment_fc(self.mask_vector)
            copies = [
                torch.where(part_bn[..., None], mask_d, e_bnd) for part_bn in masked_cn.split(len(e_bnd))
            ]
        if self.position_fc is not None:
            assert positions is not None
            place = self.position_fc(positions.to(dtype))
            copies = [copy + place for copy in copies]
        return self.activation(self.mixed_fc(copies[0] if len(copies) == 1 else torch.cat(copies)))


def grid_side(tokens: int) -> tuple[int, int]:
    """The side of an image tower's square grid, and how many tokens ([CLS]: one, or none) stand before it.

    Raises ValueError where `tokens` are no square, with and without one before it.
    """
    for before in (0, 1):
        side = math.isqrt(tokens - before)
        if side and side * side == tokens - before:
            return side, before
    raise ValueError(
        f"model.vision: its {tokens} tokens are no square grid, with or without a [CLS] before it; choose a "
        "tower of square maps or patches, or set model.vision.grid"
    )
