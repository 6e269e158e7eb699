"""Masked modelling: words and regions, with their cross-entropy; patches, and their L1."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from learning.losses.contrastive import widened


class Masked(NamedTuple):
    """The masked tokens of each text, or regions of each picture; those with fewer than k are filled up."""

    places_bk: Int64[Tensor, "b k"]
    asked_bk: Bool[Tensor, "b k"]  # False: filled up, not masked
    targets_bk: Int64[Tensor, "b k"]  # the ids, or object classes, that stood there


def masked_places(plain_bm: Int64[Tensor, "b m"], masked_bm: Int64[Tensor, "b m"], share: float) -> Masked:
    """Where a masked view of texts differs from the plain one, at most max(1, round(share · m)) places each.

    `share` as in `MaskedTokens`. Shapes depend on m alone, so that no kernel waits for a count. Raises
    ValueError when the views have not one shape.
    """
    if plain_bm.shape != masked_bm.shape:
        raise ValueError(
            f"the masked view of the texts is {tuple(masked_bm.shape)}, the plain one {tuple(plain_bm.shape)}"
        )
    most = max(1, round(share * plain_bm.shape[1]))
    differs = (plain_bm != masked_bm).long()
    places = differs.argsort(dim=1, descending=True, stable=True)[:, :most]
    return Masked(places, differs.gather(1, places).bool(), plain_bm.gather(1, places))


def masked_regions(
    classes_br: Int64[Tensor, "b r"], uniform_br: Float[Tensor, "b r"], share: float
) -> Masked:
    """The regions to mask: of those with a class, the lowest `uniform_br`; `share`, rounded, at least one.

    A class below 0 is none: such a region is never asked for, so it is not masked either. Shapes depend on r
    alone.
    """
    has_br = classes_br >= 0
    most = max(1, round(share * classes_br.shape[1]))
    count_b = has_br.sum(dim=1)
    asked_b = torch.where(count_b > 0, (share * count_b.double()).round().clamp(min=1), 0)
    places = uniform_br.masked_fill(~has_br, torch.inf).argsort(dim=1)[:, :most]
    asked = torch.arange(most, device=places.device) < asked_b[:, None]
    return Masked(places, asked, classes_br.gather(1, places).clamp(min=0))


def rows_at(tokens_bmd: Float[Tensor, "b m d"], places_bk: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens at some places of each row."""
    return tokens_bmd.gather(1, places_bk[:, :, None].expand(-1, -1, tokens_bmd.shape[2]))


def masked_token_rows(logits_bkv: Float[Tensor, "b k v"], masked: Masked) -> Float[Tensor, "b k"]:
    """The cross-entropy at each place; 0 where none is asked. Half precision is computed in fp32."""
    losses = F.cross_entropy(
        widened(logits_bkv).flatten(0, 1), masked.targets_bk.flatten(), reduction="none"
    ).view_as(masked.targets_bk)
    return torch.where(masked.asked_bk, losses, 0.0)


def patches_of(images_b3hw: Float[Tensor, "b 3 h w"], px: int) -> Float[Tensor, "b p c"]:
    """The pixels of each square patch of `px`, row by row: (b, p, 3 · px²), by channel, row and column."""
    side = images_b3hw.shape[-1] // px
    cut = images_b3hw.unflatten(3, (side, px)).unflatten(2, (side, px))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def masked_patch_rows(
    predicted_bkc: Float[Tensor, "b k c"], true_bkc: Float[Tensor, "b k c"]
) -> Float[Tensor, "b k"]:
    """‖y - z‖₁ of each masked patch (ConLIP, Eq. 6), the mean over its values. Half precision is widened."""
    # Differs from the paper: Eq. 6 is the sum; SimMIM, which it follows, divides by the number of masked
    # values, so that neither the image's size nor the share of the mask changes a weight beside other losses
    return (widened(predicted_bkc) - widened(true_bkc)).abs().mean(dim=2)
