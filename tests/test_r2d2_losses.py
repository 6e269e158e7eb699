"""R2D2's losses and its draw of hard negatives as pure functions, against the plain reference."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from learning.losses.contrastive import Queue
from learning.losses.distillation import feature_guided_rows, target_guided_rows
from learning.losses.masked import Masked, masked_places, masked_token_rows
from learning.losses.matching import match_probability, matching_rows
from learning.training.hard_negatives import draw_negatives
from tests import r2d2_reference as reference
from tests.r2d2_reference import Stored

DOUBLE = torch.float64
HALVES = (torch.float16, torch.bfloat16)
# Samples 0 and 3 show the same, and so do places 1, 2 and 5 of the queue
IDS, QUEUE_IDS = [7, 8, 9, 7], [1, 7, 7, 8, 2, 7]
WEIGHTS = [0.5, 0.25, 0.9, 0.97, 0.99, 1.0]


def unit_rows(count: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, d, generator=generator, dtype=DOUBLE), dim=1)


def same(query_ids: Sequence[int], key_ids: Sequence[int]) -> Tensor:
    return torch.tensor(query_ids)[:, None] == torch.tensor(key_ids, dtype=torch.int64)


def stored(places: int = 6) -> Stored:
    """The first `places` of a queue that holds positives of some queries."""
    return Stored(list(unit_rows(6, 5, 3))[:places], QUEUE_IDS[:places], WEIGHTS[:places])


def as_queue(kept: Stored) -> Queue:
    features = torch.stack(kept.features) if kept.features else torch.zeros(0, 5, dtype=DOUBLE)
    return Queue(features, None, torch.tensor(kept.weights, dtype=DOUBLE))


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-11)


def gradients(rows: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum with another weight for each row: no two rows can be exchanged."""
    weights = torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)
    return torch.autograd.grad(rows @ weights, list(inputs), retain_graph=True)


# ------------------------------------------------------------------------------- target-guided distillation


def guided(
    queries: Tensor, keys: Tensor, teacher: Tensor, temperature: Tensor, alpha: float, kept: Stored | None
) -> Tensor:
    positive = same(IDS, IDS)
    if kept is None:
        return target_guided_rows(queries, keys, teacher, temperature, alpha, positive)
    return target_guided_rows(
        queries,
        keys,
        teacher,
        temperature,
        alpha,
        positive,
        queue=as_queue(kept),
        positive_bm=same(IDS, kept.ids),
    )


@pytest.mark.parametrize("places", [None, 0, 3, 6])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 50.0])
def test_target_guided_rows_are_eq_4_and_5(places: int | None, alpha: float, temperature: float) -> None:
    """Values, and gradients in queries, keys and τ; none reaches the teacher."""
    tau = torch.tensor(temperature, dtype=DOUBLE, requires_grad=True)
    queries, keys, teacher = (unit_rows(4, 5, seed).requires_grad_() for seed in (0, 1, 2))
    kept = None if places is None else stored(places)
    ours = guided(queries, keys, teacher, tau, alpha, kept)
    theirs = reference.target_guided_rows(queries, keys, teacher, tau, alpha, IDS, kept or Stored())
    assert ours.shape == (4,)
    close([ours], [theirs])
    inputs = (queries, keys, tau)
    close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-7)
    (reached,) = torch.autograd.grad(ours.sum(), [teacher], allow_unused=True)
    assert reached is None or not reached.any()


def test_target_guided_gradients_are_slopes() -> None:
    tau = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    queries, keys = (unit_rows(4, 5, seed).requires_grad_() for seed in (0, 1))
    teacher = unit_rows(4, 5, 2)
    kept = stored()

    def hard(queries: Tensor, keys: Tensor, tau: Tensor) -> Tensor:
        return guided(queries, keys, teacher, tau, 0.0, kept)

    assert torch.autograd.gradcheck(hard, (queries, keys, tau))


def test_soft_targets_hold_keys_and_temperature_fast() -> None:
    """With α = 1 the loss is that of a target that knows nothing of what the student changes."""
    queries, keys, teacher = (unit_rows(4, 5, seed) for seed in (0, 1, 2))
    keys.requires_grad_()
    target = torch.softmax(teacher @ keys.detach().T / 0.1, dim=1)
    fixed = -(target * torch.log_softmax(queries @ keys.T / 0.1, dim=1)).sum(1)
    ours = target_guided_rows(queries, keys, teacher, 0.1, 1.0, same(IDS, IDS))
    close([ours, *gradients(ours, [keys])], [fixed, *gradients(fixed, [keys])])


def test_weights_scale_terms_and_do_not_enter_the_soft_max() -> None:
    """A queue entry that weighs nothing is a negative all the same."""
    queries, keys, teacher = (unit_rows(4, 5, seed) for seed in (0, 1, 2))
    kept = stored(3)
    kept.weights = [1e-12] * 3
    positive = same(IDS, [1, 1, 1])
    nothing = Queue(torch.stack(kept.features), None, torch.tensor(kept.weights, dtype=DOUBLE))
    ours = target_guided_rows(
        queries, keys, teacher, 0.1, 0.0, same(IDS, IDS), queue=nothing, positive_bm=positive
    )
    logits = queries @ torch.cat([keys, nothing.keys_md]).T / 0.1
    y = same(IDS, IDS) / same(IDS, IDS).sum(1, keepdim=True)
    expected = -(y * logits.log_softmax(1)[:, :4]).sum(1)
    close([ours], [expected])


@pytest.mark.parametrize("dtype", HALVES)
def test_target_guided_rows_of_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    queries, keys, teacher = (unit_rows(4, 5, seed).to(dtype) for seed in (0, 1, 2))
    kept = stored(4)
    wide = Queue(torch.stack(kept.features).float(), None, torch.tensor(kept.weights))
    arguments = (0.01, 0.4, same(IDS, IDS))
    both = {"queue": wide, "positive_bm": same(IDS, kept.ids)}
    ours = target_guided_rows(queries, keys, teacher, *arguments, **both)
    expected = target_guided_rows(queries.float(), keys.float(), teacher.float(), *arguments, **both)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


def test_target_guided_rows_without_teacher_and_queue_are_gcpr() -> None:
    queries, keys = unit_rows(4, 5, 0), unit_rows(4, 5, 1)
    tau = torch.tensor(0.07, dtype=DOUBLE)
    ours = target_guided_rows(queries, keys, unit_rows(4, 5, 2), tau, 0.0, same(IDS, IDS))
    close([ours], [reference.contrastive_rows(queries, keys, tau, IDS)])


# ------------------------------------------------------------------------------ feature-guided distillation


@pytest.mark.parametrize(("tau_s", "tau_t"), [(0.1, 0.04), (1.0, 1.0), (0.001, 0.0005), (30.0, 50.0)])
def test_feature_guided_rows_are_eq_6_and_7(tau_s: float, tau_t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(4, 6, generator=generator, dtype=DOUBLE).requires_grad_() for _ in range(2)
    )
    centre = torch.randn(6, generator=generator, dtype=DOUBLE)
    ours = feature_guided_rows(student, teacher, centre, tau_s, tau_t)
    theirs = reference.feature_guided_rows(student, teacher, centre, tau_s, tau_t)
    assert ours.shape == (4,)
    close([ours, *gradients(ours, [student])], [theirs, *gradients(theirs, [student])])
    (reached,) = torch.autograd.grad(ours.sum(), [teacher], allow_unused=True)
    assert reached is None or not reached.any()


def test_the_centre_is_of_the_teacher_alone_and_is_subtracted() -> None:
    """P_s has no μ; and what the teacher has everywhere is no target."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 6, generator=generator, dtype=DOUBLE)
    student = torch.randn(3, 6, generator=generator, dtype=DOUBLE)
    same_everywhere = teacher[:1].expand(3, 6)
    rows = feature_guided_rows(student, same_everywhere, teacher[0], 0.1, 0.04)
    even = -(torch.log_softmax(student / 0.1, dim=1) / 6).sum(1)  # P_t is even
    close([rows], [even])


def test_feature_guided_gradients_are_slopes() -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(3, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    teacher, centre = (torch.randn(*s, generator=generator, dtype=DOUBLE) for s in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(lambda x: feature_guided_rows(x, teacher, centre, 0.5, 0.2), (student,))


@pytest.mark.parametrize("dtype", HALVES)
def test_feature_guided_rows_of_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    """The centre is wider than the features: it must not be rounded to theirs before it is taken off."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = ((3 * torch.randn(4, 6, generator=generator)).to(dtype) for _ in range(2))
    centre = torch.randn(6, generator=generator)
    ours = feature_guided_rows(student, teacher, centre, 0.1, 0.04)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, feature_guided_rows(student.float(), teacher.float(), centre, 0.1, 0.04))


# ----------------------------------------------------------------------------------------- matching, masked


def test_matching_rows_are_the_cross_entropy_of_eq_3() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(6, 2, generator=generator, dtype=DOUBLE)).requires_grad_()
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    ours = matching_rows(logits, labels)
    theirs = torch.stack(
        [reference.cross_entropy(row, int(label)) for row, label in zip(logits, labels, strict=True)]
    )
    close([ours, *gradients(ours, [logits])], [theirs, *gradients(theirs, [logits])])
    assert torch.autograd.gradcheck(lambda x: matching_rows(x, labels), (logits,))


def test_matching_takes_logits_and_class_1_is_a_match() -> None:
    """A head that is sure costs nothing: of probabilities soft-maxed once more it would cost 0.31."""
    sure = torch.tensor([[-40.0, 40.0], [40.0, -40.0]], dtype=DOUBLE)
    assert matching_rows(sure, torch.tensor([1, 0])).tolist() == [0.0, 0.0]
    assert matching_rows(sure, torch.tensor([0, 1])).tolist() == pytest.approx([80.0, 80.0])
    logits = torch.tensor([[0.3, 1.1], [2.0, -1.0]], dtype=DOUBLE)
    expected = [1 / (1 + math.exp(0.3 - 1.1)), 1 / (1 + math.exp(2.0 + 1.0))]
    assert match_probability(logits).tolist() == pytest.approx(expected, abs=1e-15)


def test_masked_places_are_where_the_views_differ() -> None:
    """[MASK] is 4. A text may have fewer masked tokens than others; what is filled up is not asked for."""
    plain = torch.tensor(
        [
            [2, 9, 8, 7, 6, 5, 9, 3],
            [2, 9, 8, 3, 0, 0, 0, 0],
            [2, 4, 8, 7, 5, 6, 3, 0],
            [2, 3, 0, 0, 0, 0, 0, 0],
        ]
    )
    changed = plain.clone()
    changed[0, [1, 5]], changed[1, 2], changed[2, 3] = 4, 4, 4
    masked = masked_places(plain, changed, 0.25)
    assert masked.asked_bk.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    assert masked.places_bk[masked.asked_bk].tolist() == [1, 5, 2, 3]
    assert masked.targets_bk[masked.asked_bk].tolist() == [9, 5, 8, 7]
    assert masked_places(plain, changed, 0.01).places_bk.shape == (4, 1)
    with pytest.raises(ValueError, match=r"\(4, 7\), the plain one \(4, 8\)"):
        masked_places(plain, changed[:, :7], 0.25)


def test_masked_token_rows_are_the_cross_entropy_over_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 3, 11, generator=generator, dtype=DOUBLE)).requires_grad_()
    targets = torch.tensor([[10, 0, 4], [7, 1, 1]])
    asked = torch.tensor([[True, True, True], [True, False, False]])
    ours = masked_token_rows(logits, Masked(torch.zeros_like(targets), asked, targets))
    assert ours[1, 1:].tolist() == [0.0, 0.0]
    theirs = torch.stack(
        [
            reference.cross_entropy(row, int(target))
            for row, target in zip(logits[asked], targets[asked], strict=True)
        ]
    )
    close(
        [ours[asked], *gradients(ours[asked], [logits])],
        [theirs, *gradients(theirs, [logits])],
    )
    (filled,) = torch.autograd.grad(ours.sum(), [logits])
    assert not filled[~asked].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(5, 2, generator=generator)).to(dtype)
    labels = torch.tensor([1, 0, 0, 1, 1])
    masked = Masked(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool), labels[None])
    for rows in (
        matching_rows(logits, labels) - matching_rows(logits.float(), labels),
        masked_token_rows(logits[None], masked) - masked_token_rows(logits[None].float(), masked),
        match_probability(logits) - match_probability(logits.float()),
    ):
        assert rows.dtype == torch.float32
        assert not rows.any()


# ------------------------------------------------------------------------------------------ hard negatives


def drawn(similarity: Tensor, of_same_id: Tensor, uniform: Sequence[float]) -> list[int]:
    return draw_negatives(similarity, of_same_id, torch.tensor(list(uniform), dtype=DOUBLE)).tolist()


@pytest.mark.parametrize("scale", [1.0, 14.0, 1000.0])
@pytest.mark.parametrize("make", [Tensor.double, Tensor.float])
def test_negatives_are_drawn_by_the_inverse_of_the_cumulated_soft_max(
    scale: float, make: Callable[[Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys = 200, 9
    similarity = make(scale * torch.randn(rows, keys, generator=generator, dtype=DOUBLE))
    of_same_id = torch.rand(rows, keys, generator=generator) < 0.3
    of_same_id[0], of_same_id[1, 1:] = True, True
    of_same_id[1, 0] = False
    uniform = torch.rand(rows, generator=generator)
    found = draw_negatives(similarity, of_same_id, uniform)
    assert found.dtype == torch.int64
    expected = [
        reference.draw_negative(row.tolist(), mask.tolist(), float(u))
        for row, mask, u in zip(similarity, of_same_id, uniform, strict=True)
    ]
    assert found.tolist() == expected
    assert expected[:2] == [-1, 0]
    assert len(set(expected)) > 5


def test_the_ends_of_the_unit_interval_draw_an_allowed_key() -> None:
    """u = 0 is no way to a key of the same id, and rounding leaves no u without a key."""
    keys = 1000
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(2, keys, generator=generator)
    of_same_id = torch.zeros(2, keys, dtype=torch.bool)
    of_same_id[:, :3], of_same_id[:, -2:] = True, True
    low, high = draw_negatives(similarity, of_same_id, torch.tensor([0.0, 1 - 2**-24])).tolist()
    assert low == 3
    assert 3 <= high < keys - 2
    alone = torch.tensor([[False, True, True]]).expand(3, 3)
    assert drawn(torch.tensor([[0.0, 300.0, 300.0]]).expand(3, 3), alone, (0.0, 0.5, 1 - 2**-24)) == [0, 0, 0]


def test_negatives_come_as_often_as_the_soft_max_says() -> None:
    similarity = torch.tensor([[0.0, 1.0, 2.0, 9.0]], dtype=DOUBLE)
    of_same_id = torch.tensor([[False, False, False, True]])
    count = 20_000
    uniform = (torch.arange(count, dtype=DOUBLE) + 0.5) / count
    found = draw_negatives(similarity.expand(count, 4), of_same_id.expand(count, 4), uniform)
    share = torch.bincount(found, minlength=4) / count
    expected = torch.cat([torch.softmax(similarity[0, :3], dim=0), torch.zeros(1, dtype=DOUBLE)])
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=2 / count)


def test_drawing_takes_no_gradient_and_no_random_number() -> None:
    similarity = torch.randn(3, 4, requires_grad=True)
    before = torch.random.get_rng_state()
    found = draw_negatives(similarity, torch.eye(3, 4, dtype=torch.bool), torch.tensor([0.1, 0.5, 0.9]))
    assert not found.requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", HALVES)
def test_negatives_of_half_precision_are_drawn_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = (3 * torch.randn(300, 64, generator=generator)).to(dtype)
    of_same_id = torch.zeros(300, 64, dtype=torch.bool)
    uniform = torch.rand(300, generator=generator)
    wide = draw_negatives(similarity.float(), of_same_id, uniform)
    assert torch.equal(draw_negatives(similarity, of_same_id, uniform), wide)
