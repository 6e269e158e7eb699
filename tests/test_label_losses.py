"""The losses of samples with several labels as pure functions, against the plain reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from learning.losses.labels import label_rows, pairwise_likelihood_rows, same_class, triplet_rows
from learning.losses.masked import masked_regions
from tests import semantic_reference as reference

DOUBLE = torch.float64
# Samples 0 and 3 share a label, 3 and 4 another; 2 has none; 1 is alone
LABELS = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]], dtype=DOUBLE)


def rows(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=DOUBLE).requires_grad_()


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["logistic", "literal"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_label_rows_are_eq_4(how: str, scale: float) -> None:
    logits = rows(5, 4, 0)
    ours = label_rows(scale * logits, LABELS, how)  # type: ignore[arg-type]
    each = [
        reference.label_loss(scale * row, y.tolist(), how == "literal")
        for row, y in zip(logits, LABELS, strict=True)
    ]
    weights = torch.arange(1.0, 6.0, dtype=DOUBLE)  # no two rows can be exchanged
    found, expected = (torch.autograd.grad(r @ weights, [logits])[0] for r in (ours, torch.stack(each)))
    close([ours, found], [torch.stack(each), expected])


def test_the_literal_loss_has_a_floor_and_the_logistic_one_has_none() -> None:
    """Why the default is not Eq. 4 as it is printed: a soft-max over several labels cannot be sure of all."""
    y = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=DOUBLE)
    sure = torch.tensor([[90.0, 90.0, -90.0, -90.0]], dtype=DOUBLE)
    assert float(label_rows(sure, y, "literal")) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(label_rows(sure, torch.zeros_like(y), "literal")) == pytest.approx(math.log(2))
    assert float(label_rows(sure, y)) < 1e-30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = (3 * rows(5, 4, 1)).detach().to(dtype)
    assert torch.equal(label_rows(logits, LABELS), label_rows(logits.float(), LABELS))


def test_same_class_is_a_shared_label_and_a_sample_with_itself() -> None:
    expected = torch.eye(5, dtype=torch.bool)
    for i, j in ((0, 3), (3, 4)):
        expected[i, j] = expected[j, i] = True
    assert torch.equal(same_class(LABELS, LABELS, 0), expected)
    assert torch.equal(same_class(LABELS[2:4], LABELS, 2), expected[2:4])


def test_parts_of_the_rows_make_eq_1_and_the_triplet_loss() -> None:
    """Value and gradients of both sides, from rows 0-1 and 2-4 as two ranks have them."""
    x, y = rows(5, 3, 2), rows(5, 3, 3)
    unit = [F.normalize(each, dim=1) for each in (x, y)]
    parts = (slice(0, 2), slice(2, 5))

    def total(loss: str, one: int, other: int) -> Tensor:
        found = torch.zeros((), dtype=DOUBLE)
        for part in parts:
            same = same_class(LABELS[part], LABELS, part.start)
            if loss == "consistency":
                found = found + pairwise_likelihood_rows(unit[one][part], unit[other], same).sum()
            else:
                found = found + triplet_rows(unit[one][part], unit[other], same, 0.2, part.start).sum()
        return found

    labels = LABELS.tolist()
    ours = [
        (total("consistency", 0, 1) + total("consistency", 0, 0) + total("consistency", 1, 1)) / 25,
        (total("triplet", 0, 1) + total("triplet", 1, 0)) / 5,
    ]
    theirs = [reference.consistency(x, y, labels), reference.triplet(x, y, labels, 0.2)]
    close(ours, theirs)
    for one, other in zip(ours, theirs, strict=True):
        close(*(list(torch.autograd.grad(loss, [x, y], retain_graph=True)) for loss in (one, other)))


def test_a_row_that_shares_a_class_with_all_has_no_triplet() -> None:
    x = F.normalize(rows(3, 3, 4), dim=1)
    same = torch.tensor([[True] * 3, [False, True, False], [True] * 3])
    losses = triplet_rows(x, x.detach().flip(0), same, 5.0, 0)
    assert losses[0] == losses[2] == 0
    assert losses[1] > 0
    losses.sum().backward()


def test_masked_regions_are_an_exact_share_of_those_with_a_class() -> None:
    classes = torch.tensor([[3, 1, -1, 0, 2, 1, 4, -1, 2, 0], [-1] * 10, [-1] * 9 + [5], list(range(10))])
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, 10, generator=generator, dtype=DOUBLE)
    for share in (0.15, 0.3, 0.9):
        found = masked_regions(classes, uniform, share)
        for row in range(4):
            places = found.places_bk[row][found.asked_bk[row]].tolist()
            own = classes[row].tolist()
            assert places == reference.to_mask(own, uniform[row].tolist(), share)
            assert found.targets_bk[row][found.asked_bk[row]].tolist() == [own[place] for place in places]
    assert int(masked_regions(classes, uniform, 0.3).targets_bk.min()) >= 0  # a loss may index with them
