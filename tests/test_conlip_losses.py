"""ConLIP's losses and masks alone, against the reference: Eq. 6, 9-11, and which patches are masked."""

import pytest
import torch
from torch import Tensor

from learning.encoders.momentum import FeatureQueue
from learning.losses.contrastive import Queue, decoupled_rows, queued_info_nce_rows
from learning.losses.masked import masked_patch_rows, patches_of
from learning.training.masking import drawn_patches
from tests import conlip_reference as reference
from tests.conlip_reference import Stored

CPU = torch.device("cpu")
LOSSES = {
    "dcl": (decoupled_rows, reference.dcl_row),
    "info_nce": (queued_info_nce_rows, reference.info_nce_row),
}
IDS = [3, 1, 4, 1]
QUEUE_IDS = [1, 5, 9, 2, 3, 5]


def unit_rows(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_rows_against_a_queue_are_the_papers(name: str, tau: float) -> None:
    """Values and gradients, of τ too; an empty slot, and keys of the query's id, do not count."""
    ours, theirs = LOSSES[name]
    inputs = [unit_rows(4, 1), unit_rows(4, 2), torch.tensor(tau, dtype=torch.float64)]
    one, other = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
    keys = unit_rows(6, 3).requires_grad_()
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
    found = ours(*one, Queue(keys, torch.tensor(QUEUE_IDS), weights), torch.tensor(IDS))
    filled = Stored([keys[j] for j in range(6) if j != 2], [QUEUE_IDS[j] for j in range(6) if j != 2])
    rows = [theirs(q, p, filled, n, other[2]) for q, p, n in zip(other[0], other[1], IDS, strict=True)]
    torch.testing.assert_close(found.losses_b, torch.stack(rows), rtol=1e-10, atol=1e-12)
    for loss in (found.losses_b, torch.stack(rows)):
        (loss * torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64)).sum().backward()
    for a, b in zip(one, other, strict=True):
        assert a.grad is not None
        # lengths are one: the cosine of Eq. 2 has no gradient along a vector, a product has
        radial = 0 if a.ndim == 0 else (a.grad * a).sum(1, keepdim=True) * a
        torch.testing.assert_close((a.grad - radial).detach(), b.grad, rtol=1e-8, atol=1e-10)
    assert keys.grad is None  # momentum features are no one's to train


def test_the_positive_couples_with_the_negatives_in_info_nce_alone() -> None:
    """Yeh et al. 2021: with one sure positive InfoNCE's gradient vanishes, DCL's does not."""
    positive = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    queue = Queue(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    sizes = []
    for ours, _ in LOSSES.values():
        query = positive.clone().requires_grad_()
        ours(query, positive, 0.05, queue).losses_b.sum().backward()
        assert query.grad is not None
        sizes.append(float(query.grad.norm()))
    assert sizes[0] > 20
    assert sizes[1] < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_a_query_without_negatives_has_no_loss(name: str) -> None:
    query = unit_rows(2, 1).requires_grad_()
    queue = Queue(unit_rows(3, 2), torch.tensor([7, 7, 7]))
    rows = LOSSES[name][0](query, unit_rows(2, 3), 0.05, queue, torch.tensor([7, 8]))
    assert float(rows.losses_b[0].detach()) == 0
    assert rows.hits_b[0]
    rows.losses_b.sum().backward()
    assert query.grad is not None
    assert query.grad[0].norm() == 0
    assert query.grad[1].norm() > 0


def test_hits_are_positives_above_all_negatives() -> None:
    queries = torch.eye(2, dtype=torch.float64)
    queue = Queue(torch.tensor([[0.0, 1.0], [0.6, 0.8]], dtype=torch.float64))
    positives = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    assert decoupled_rows(queries, positives, 0.1, queue).hits_b.tolist() == [True, False]


def test_half_precision_is_widened() -> None:
    rows = decoupled_rows(
        unit_rows(3, 1).bfloat16(), unit_rows(3, 2).bfloat16(), 0.05, Queue(unit_rows(9, 3))
    )
    assert rows.losses_b.dtype == torch.float32
    assert masked_patch_rows(torch.ones(1, 1, 3).half(), torch.zeros(1, 1, 3).half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("positives", "queue", "ids", "message"),
    [
        (3, Queue(unit_rows(6, 1)), None, r"one shape are needed: \(4, 7\), \(3, 7\)"),
        (4, Queue(unit_rows(6, 1)[:, :5]), None, r"queue: \(m, 7\) keys are needed"),
        (4, Queue(unit_rows(6, 1), weights_m=torch.ones(5)), None, "weights_m: 5 values for 6 keys"),
        (4, Queue(unit_rows(6, 1), torch.arange(6)), None, "ids: give those of the queries and"),
        (4, Queue(unit_rows(6, 1), torch.arange(6)), torch.arange(3), "ids: 3 of 4 queries"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    positives: int, queue: Queue, ids: Tensor | None, message: str
) -> None:
    for ours, _ in LOSSES.values():
        with pytest.raises(ValueError, match=message):
            ours(unit_rows(4, 1), unit_rows(positives, 2), 0.05, queue, ids)


def test_what_would_be_pushed_is_what_is_pushed() -> None:
    """Round the ring's end, and of more rows than fit the last."""
    queue = FeatureQueue(5, 7, decay=0.9).double()
    for start, count in ((0, 3), (3, 4), (7, 8)):
        features, ids = unit_rows(count, start), torch.arange(start, start + count)
        before = {name: value.clone() for name, value in queue.state_dict().items()}
        told = queue.pushed(features, ids)
        assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())
        queue.push(features, ids)
        content = queue.content()
        assert torch.equal(told.keys_md, content.keys_md)
        assert told.ids_m is not None
        assert told.weights_m is not None
        assert content.ids_m is not None
        assert content.weights_m is not None
        assert torch.equal(told.ids_m, content.ids_m)
        assert torch.equal(told.weights_m, content.weights_m)


def test_patches_and_their_l1_are_the_references() -> None:
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    patches = patches_of(images, 4)
    assert patches.shape == (2, 9, 48)
    for row in range(2):
        for place in range(9):
            assert torch.equal(patches[row, place], reference.patch(images[row], place, 4).flatten())
    predicted = torch.randn_like(patches).requires_grad_()
    found = masked_patch_rows(predicted, patches)
    expected = torch.stack(
        [
            torch.stack([reference.l1(*pair) for pair in zip(*rows, strict=True)])
            for rows in zip(predicted, patches, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert predicted.grad is not None
    torch.testing.assert_close(predicted.grad, (predicted - patches).sign() / 48)


@pytest.mark.parametrize(
    ("side", "unit", "share", "masked"),
    [(14, 2, 0.5, 4 * 24), (8, 2, 0.5, 32), (4, 1, 0.01, 1), (4, 4, 0.5, 16)],
)
def test_an_exact_share_of_units_is_masked(side: int, unit: int, share: float, masked: int) -> None:
    """224 px: 24 of 49 units of 32 px. At least one; whole units; others in each row; the same by seed."""
    places = drawn_patches(5, 6, side, unit, share, CPU)
    assert places.shape == (6, masked)
    assert [set(row) for row in places.tolist()] == reference.masked_patches(5, 6, side, unit, share)
    assert all(row == sorted(set(row)) for row in places.tolist())
    if unit < side:
        assert len({tuple(row) for row in places.tolist()}) > 1
        assert not torch.equal(places, drawn_patches(6, 6, side, unit, share, CPU))


def test_units_must_fill_the_grid() -> None:
    with pytest.raises(ValueError, match="7 patches a side are no whole number of units of 2"):
        drawn_patches(1, 1, 7, 2, 0.5, CPU)
