"""Losses against float64 numpy written from the paper's equations; gradients by central differences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.losses.contrastive import hardest_negative_hinge, info_nce, matching_accuracy
from learning.losses.temperature import Temperature, TemperatureConfig

Array = np.ndarray


def eq_5(queries: Array, keys: Array, temperature: float) -> float:
    """COOKIE, Eq. 5, term by term."""
    total = 0.0
    for i in range(len(queries)):
        positive = math.exp(float(queries[i] @ keys[i]) / temperature)
        negative = sum(
            math.exp(float(queries[i] @ keys[j]) / temperature) for j in range(len(keys)) if j != i
        )
        total += math.log(positive / (positive + negative))
    return -total / len(queries)


def eq_13(images: Array, texts: Array, margin: float) -> float:
    """COOKIE, Eq. 13, with the hardest negatives of the batch; the mean over its pairs."""
    total = 0.0
    for i in range(len(images)):
        right = float(images[i] @ texts[i])
        wrong_image = max(float(images[j] @ texts[i]) for j in range(len(images)) if j != i)
        wrong_text = max(float(images[i] @ texts[j]) for j in range(len(texts)) if j != i)
        total += max(margin + wrong_image - right, 0.0) + max(margin + wrong_text - right, 0.0)
    return total / len(images)


def unit_rows(n: int, d: int, seed: int) -> Array:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slopes(function: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    """The gradient by central differences."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_info_nce_equals_eq_5_in_value_and_gradient(temperature: float) -> None:
    a, b = unit_rows(5, 4, 1), unit_rows(5, 4, 2)
    q, k, tau = tensors(a, b, np.array(temperature))
    loss = info_nce(q, k, tau)
    loss.backward()
    assert loss.item() == pytest.approx(eq_5(a, b, temperature), abs=1e-12)
    assert q.grad is not None and k.grad is not None and tau.grad is not None
    np.testing.assert_allclose(q.grad, slopes(lambda x: eq_5(x, b, temperature), a), atol=1e-6)
    np.testing.assert_allclose(k.grad, slopes(lambda x: eq_5(a, x, temperature), b), atol=1e-6)
    by_tau = slopes(lambda x: eq_5(a, b, float(x)), np.array(temperature), 1e-7)
    np.testing.assert_allclose(tau.grad, by_tau, rtol=1e-5)


def test_info_nce_is_not_symmetric() -> None:
    """L_i2t and L_t2i differ: the sum of Eq. 6 and 7 is not twice one of them."""
    a, b = (torch.tensor(unit_rows(6, 3, seed)) for seed in (3, 4))
    assert info_nce(a, b, 0.1).item() != pytest.approx(info_nce(b, a, 0.1).item(), abs=1e-3)


def test_info_nce_of_equal_embeddings_is_the_logarithm_of_the_batch() -> None:
    same = torch.ones(8, 4, dtype=torch.float64) / 2
    assert info_nce(same, same, 0.07).item() == pytest.approx(math.log(8), abs=1e-12)


def test_info_nce_does_not_overflow_in_float32() -> None:
    """exp(1 / 0.005) is infinite in float32: the maximum must be taken out first."""
    q = torch.eye(4, requires_grad=True)
    loss = info_nce(q, torch.eye(4).roll(1, 0), 0.005)
    loss.backward()
    assert loss.item() == pytest.approx(200.0, rel=1e-5)
    assert q.grad is not None and bool(q.grad.isfinite().all())


@pytest.mark.parametrize("margin", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("seed", [5, 6, 7])
def test_hinge_equals_eq_13_in_value_and_gradient(margin: float, seed: int) -> None:
    a, b = unit_rows(6, 4, seed), unit_rows(6, 4, seed + 10)
    image, text = tensors(a, b)
    loss = hardest_negative_hinge(image, text, margin)
    loss.backward()
    assert loss.item() == pytest.approx(eq_13(a, b, margin), abs=1e-12)
    assert image.grad is not None and text.grad is not None
    np.testing.assert_allclose(image.grad, slopes(lambda x: eq_13(x, b, margin), a), atol=1e-6)
    np.testing.assert_allclose(text.grad, slopes(lambda x: eq_13(a, x, margin), b), atol=1e-6)


def test_hinge_is_zero_beyond_the_margin_and_takes_the_hardest_alone() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    assert hardest_negative_hinge(eye, eye, 0.2).item() == 0.0
    similar = torch.tensor([[1.0, 0.0, 0.0], [0.9, 1.0, 0.0], [0.85, 0.0, 1.0]], dtype=torch.float64)
    # image 1 to text 0: 0.9, image 2 to text 0: 0.85; text 0 counts its hardest image (0.9) alone
    loss = hardest_negative_hinge(similar, eye, 0.2)
    assert loss.item() == pytest.approx(((0.2 + 0.9 - 1) * 2 + (0.2 + 0.85 - 1)) / 3)


def test_one_pair_has_no_negatives() -> None:
    one = torch.ones(1, 4)
    for loss in (lambda: info_nce(one, one, 0.07), lambda: hardest_negative_hinge(one, one, 0.2)):
        with pytest.raises(ValueError, match="contrastive_batch must be 2 or more"):
            loss()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.floats(0.02, 2.0), st.integers(0, 1000))
def test_losses_hold_for_any_size(n: int, d: int, temperature: float, seed: int) -> None:
    a, b = unit_rows(n, d, seed), unit_rows(n, d, seed + 1)
    q, k = torch.tensor(a), torch.tensor(b)
    assert info_nce(q, k, temperature).item() == pytest.approx(eq_5(a, b, temperature), abs=1e-9)
    assert hardest_negative_hinge(q, k, 0.2).item() == pytest.approx(eq_13(a, b, 0.2), abs=1e-9)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert info_nce(q[order], k[order], temperature).item() == pytest.approx(
        eq_5(a, b, temperature), abs=1e-9
    )


def test_accuracy_counts_own_keys() -> None:
    keys = torch.eye(4)
    assert matching_accuracy(keys, keys).item() == 1.0
    assert matching_accuracy(keys[[0, 1, 3, 2]], keys).item() == 0.5


def test_a_fixed_temperature_is_the_given_one() -> None:
    temperature = Temperature(TemperatureConfig(initial=0.05)).double()
    assert temperature().item() == pytest.approx(0.05, rel=1e-6)
    assert temperature().ndim == 0
    assert not any(p.requires_grad for p in temperature.parameters())


@pytest.mark.parametrize(("start", "direction"), [(0.005, "lower"), (3.0, "higher")])
def test_a_learned_temperature_stays_within_its_bounds_and_can_come_back(
    start: float, direction: str
) -> None:
    temperature = Temperature(TemperatureConfig(learnable=True, min=0.01, max=1.0))
    with torch.no_grad():
        temperature.log.fill_(math.log(start))
    bound = 0.01 if direction == "lower" else 1.0
    outward = 1.0 if direction == "lower" else -1.0  # descent on outward · τ leads further out
    value = temperature()
    assert value.item() == pytest.approx(bound, rel=1e-6)
    (gradient,) = torch.autograd.grad(outward * value, temperature.log)
    assert gradient.item() == 0.0
    (gradient,) = torch.autograd.grad(-outward * temperature(), temperature.log)
    assert gradient.item() == pytest.approx(-outward * bound, rel=1e-6)


def test_a_temperature_outside_its_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"initial: 2\.0 is not between min, 0\.01, and max, 1\.0"):
        TemperatureConfig(initial=2.0)
