"""Masked views: tokens that become [MASK], and patches of a picture that lose their pixels or embeddings.

Which ones, the given generator or seed alone decides. How many is exact, so that every step masks the same
share.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from learning.methods.base import MaskedPatches, MaskedTokens, Views
from learning.training.hard_negatives import uniform_numbers


def mask_tokens(
    ids: Int64[Tensor, " m"],
    share: float,
    generator: torch.Generator,
    mask_id: int,
    special_ids: Sequence[int],
) -> Int64[Tensor, " m"]:
    """One unpadded text, `share` of its ordinary tokens, rounded, at least one, replaced by [MASK].

    The special tokens ([CLS], [SEP], [UNK] …) stay; a text of nothing else stays as it is. R2D2, Sec. 3.2:
    always [MASK], never a random token or the token itself.
    """
    ordinary = torch.isin(ids, torch.tensor(list(special_ids)), invert=True).nonzero()[:, 0]
    if len(ordinary) == 0:
        return ids
    order = torch.randperm(len(ordinary), generator=generator)
    chosen = ordinary[order[: max(1, round(share * len(ordinary)))]]
    return ids.index_fill(0, chosen, mask_id)


def mask_patches(
    image: Float32[Tensor, "3 p p"], share: float, patch_px: int, generator: torch.Generator
) -> Float32[Tensor, "3 p p"]:
    """A normalised picture, `share` of its square patches, rounded, in the mean colour: 0.

    `patch_px` is a patch's side and divides the picture's (`check_masks`).
    """
    rows = image.shape[1] // patch_px
    chosen = torch.randperm(rows**2, generator=generator)[: round(share * rows**2)]
    masked = torch.zeros(rows**2, dtype=torch.bool).index_fill_(0, chosen, True)
    patches = image.reshape(3, rows, patch_px, rows, patch_px)
    return patches.masked_fill(masked.view(1, rows, 1, rows, 1), 0.0).view_as(image)


def drawn_patches(
    seed: int, rows: int, side: int, unit: int, share: float, device: torch.device
) -> Int64[Tensor, "rows k"]:
    """The places, ascending, of the masked patches in each of `rows` images of `side` × `side` patches.

    Squares of `unit` × `unit` patches are masked together; `share` of them, rounded, at least one, in each
    image (SimMIM, Xie et al. 2022, Sec. 3.2). Raises ValueError when `unit` does not divide `side`.
    """
    if side % unit:
        raise ValueError(f"{side} patches a side are no whole number of units of {unit}")
    cells = (side // unit) ** 2
    order = uniform_numbers(seed, rows * cells, 1, device).view(rows, cells).argsort(dim=1)
    chosen = order[:, : max(1, round(share * cells))]
    by_cell = torch.arange(side**2, device=device).view(side // unit, unit, side // unit, unit)
    by_cell = by_cell.transpose(1, 2).reshape(cells, unit**2)
    return by_cell[chosen].flatten(1).sort(dim=1).values


def check_masks(views: Views, image_px: int) -> None:
    """ValueError for a masked view that cannot be made of pictures of `image_px`; it names the field."""
    for name, how in (*views.images.items(), *views.texts.items()):
        if isinstance(how, MaskedTokens | MaskedPatches) and not 0 <= how.share <= 1:
            raise ValueError(f"view '{name}': share: {how.share} is no share; give one from 0 to 1")
        if isinstance(how, MaskedPatches) and (how.patch_px < 1 or image_px % how.patch_px):
            raise ValueError(
                f"view '{name}': patch_px: {how.patch_px} does not divide model.vision.image_px: {image_px}; "
                "give another of the two"
            )
