"""Masked tokens and patches: how many, which ones, and what else stays as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.methods.base import ImageView, MaskedPatches, MaskedTokens, TextView, Views
from learning.training.masking import check_masks, mask_patches, mask_tokens

SPECIAL = (0, 1, 2, 3, 9)
MASK = 9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    ids=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=200, deadline=None)
def test_the_exact_share_of_the_ordinary_tokens_is_masked(ids: list[int], share: float, seed: int) -> None:
    plain = torch.tensor(ids)
    kept = plain.clone()
    masked = mask_tokens(plain, share, generator(seed), MASK, SPECIAL)
    assert torch.equal(plain, kept)
    assert masked.shape == plain.shape
    changed = masked != plain
    ordinary = sum(number not in SPECIAL for number in ids)
    assert int(changed.sum()) == (max(1, round(share * ordinary)) if ordinary else 0)
    assert (masked[changed] == MASK).all()
    assert not any(number in SPECIAL for number in plain[changed].tolist())


def test_masked_tokens_are_drawn_evenly_by_the_generator_alone() -> None:
    plain = torch.tensor([2, *range(10, 30), 3])
    counts = torch.zeros(len(plain))
    for seed in range(2000):
        torch.manual_seed(seed % 7)  # the process's own state plays no part
        masked = mask_tokens(plain, 0.15, generator(seed), MASK, SPECIAL)
        assert torch.equal(masked, mask_tokens(plain, 0.15, generator(seed), MASK, SPECIAL))
        counts += masked == MASK
    assert counts[0] == counts[-1] == 0
    assert counts.sum() == 3 * 2000
    assert ((counts[1:-1] > 240) & (counts[1:-1] < 360)).all()  # 300 expected, deviation 16


def patches_of(image: Tensor, patch_px: int) -> Tensor:
    """(patches, values), row by row."""
    return (
        image.unfold(1, patch_px, patch_px)
        .unfold(2, patch_px, patch_px)
        .permute(1, 2, 0, 3, 4)
        .flatten(2)
        .flatten(0, 1)
    )


@pytest.mark.parametrize(
    ("share", "side", "patch_px", "count"),
    [(0.15, 224, 16, 29), (0.5, 16, 4, 8), (0.0, 16, 4, 0), (1.0, 16, 8, 4), (0.15, 16, 16, 0)],
)
def test_whole_patches_are_zero_and_all_else_is_the_plain_picture(
    share: float, side: int, patch_px: int, count: int
) -> None:
    plain = torch.rand(3, side, side, generator=generator()) + 0.1  # nowhere 0
    kept = plain.clone()
    masked = mask_patches(plain, share, patch_px, generator(3))
    assert torch.equal(plain, kept)
    gone = (patches_of(masked, patch_px) == 0).all(dim=1)
    assert int(gone.sum()) == count
    assert torch.equal(patches_of(masked, patch_px)[~gone], patches_of(plain, patch_px)[~gone])
    assert torch.equal(masked, mask_patches(plain, share, patch_px, generator(3)))


def test_patches_are_drawn_evenly() -> None:
    plain = torch.ones(3, 8, 8)
    counts = sum(
        (patches_of(mask_patches(plain, 0.25, 2, generator(seed)), 2) == 0).all(dim=1).int()
        for seed in range(1200)
    )
    assert isinstance(counts, Tensor)
    assert counts.sum() == 4 * 1200
    assert ((counts > 240) & (counts < 360)).all(), counts


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (MaskedPatches(0.5, 5), "plain", r"view 'i': patch_px: 5 does not divide model.vision.image_px: 16"),
        (MaskedPatches(0.5, 0), "plain", "view 'i': patch_px: 0"),
        (MaskedPatches(1.5, 4), "plain", r"view 'i': share: 1.5 is no share"),
        ("plain", MaskedTokens(-0.1), r"view 't': share: -0.1"),
        ("plain", MaskedTokens(float("nan")), "view 't': share: nan"),
    ],
)
def test_masks_that_cannot_be_are_refused(image: ImageView, text: TextView, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_masks(Views({"i": image}, {"t": text}), 16)
    check_masks(Views({"i": MaskedPatches(0.5, 4)}, {"t": MaskedTokens(0.15)}), 16)
