"""The learning rate by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from learning.training.schedule import ScheduleConfig, factor


def values(total: int, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [factor(step, total, config) for step in range(total)]


def test_step_falls_to_a_tenth_after_half_of_all_steps() -> None:
    # COOKIE, both stages: after half of the epochs, not one step earlier or later
    assert values(10, name="step") == [1.0] * 5 + [0.1] * 5
    assert values(5, name="step") == [1.0, 1.0, 1.0, 0.1, 0.1]
    assert values(4, name="step", decay_at=0.75, decay=0.5) == [1.0, 1.0, 1.0, 0.5]


def test_warmup_starts_above_zero_and_ends_at_one() -> None:
    assert values(5, name="constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values(40, warmup=0.1)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]  # a share of all steps
    assert values(3, warmup=0) == [1.0, 1.0, 1.0]


def test_warmup_may_start_above_zero() -> None:
    # R2D2's released fine-tuning: 500 steps from 1e-6 to 1e-5
    rates = [1e-5 * value for value in values(2000, name="cosine", warmup=500, warmup_from=0.1)]
    assert rates[0] == pytest.approx(1e-6 + 9e-6 / 500)
    assert rates[249] == pytest.approx(5.5e-6)
    assert rates[499:501] == pytest.approx([1e-5, 1e-5])
    assert rates[1250] == pytest.approx(5e-6)
    assert values(5, warmup=4, warmup_from=0.5) == [0.625, 0.75, 0.875, 1.0, 1.0]
    assert values(3, warmup_from=0.5) == [1.0, 1.0, 1.0]  # there is no warm-up


@given(warmup=st.integers(1, 10**6), step=st.integers(0, 10**6))
def test_warmup_from_zero_is_the_plain_warmup_bit_for_bit(warmup: int, step: int) -> None:
    step = min(step, warmup - 1)
    assert factor(step, 10**7, ScheduleConfig(warmup=warmup)) == (step + 1) / warmup


def test_linear_and_cosine_end_one_step_before_the_floor() -> None:
    assert values(4, name="linear") == [1.0, 0.75, 0.5, 0.25]
    assert values(6, name="linear", warmup=2, floor=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    cosine = values(4, name="cosine")
    assert cosine == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert factor(4, 4, ScheduleConfig(name="cosine")) == pytest.approx(0.0)
    assert factor(99, 4, ScheduleConfig(name="cosine", floor=0.1)) == pytest.approx(0.1)


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"warmup: 1\.5 is no number of steps"):
        ScheduleConfig(warmup=1.5)
    for share in (-0.1, 1.0):
        with pytest.raises(ValidationError, match="warmup_from"):
            ScheduleConfig(warmup_from=share)
    with pytest.raises(ValidationError, match="step"):
        ScheduleConfig.model_validate({"name": "stpe"})
