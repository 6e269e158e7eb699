"""Recalls, Rsum, R@M, chance levels and folds: known answers, identities and a simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.evaluation.metrics import chance_recall_at, chances, mean_of, recall_at, recalls
from learning.evaluation.retrieval import RightAnswers, best_ranks
from tests.test_retrieval import unit

I2T = np.array([1, 2, 5, 6, 10, 11, 100, 1])
T2I = np.array([3, 1, 1, 12])


def test_recalls_of_known_ranks() -> None:
    found = recalls(I2T, T2I)
    assert found["i2t_r@1"] == 25.0
    assert found["i2t_r@5"] == 50.0
    assert found["i2t_r@10"] == 75.0
    assert (found["t2i_r@1"], found["t2i_r@5"], found["t2i_r@10"]) == (50.0, 75.0, 75.0)
    assert found["i2t_median_rank"] == 5.5


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_rsum_is_the_sum_and_rm_the_mean_of_the_six_recalls(i2t: list[int], t2i: list[int]) -> None:
    found = recalls(np.array(i2t), np.array(t2i))
    six = [found[f"{way}_r@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert found["rsum"] == pytest.approx(sum(six))
    assert found["r@m"] * 6 == pytest.approx(found["rsum"])
    assert six[0] <= six[1] <= six[2]
    assert six[3] <= six[4] <= six[5]


@pytest.mark.parametrize("seed", range(4))
def test_recalls_of_a_score_matrix_are_a_count_of_the_first_k(seed: int) -> None:
    """By other means than ranks: whether a right answer is among the K largest scores of its row."""
    generator = np.random.default_rng(seed)
    queries, gallery = (unit(generator.normal(size=(rows, 6))) for rows in (23, 40))
    right = [set(generator.choice(40, generator.integers(1, 4), replace=False).tolist()) for _ in queries]
    ranks = best_ranks(queries, gallery, RightAnswers.of(right))
    found = recalls(t2i=ranks)
    scores = queries @ gallery.T
    for k in (1, 5, 10):
        first = [set(np.argpartition(-row, k)[:k].tolist()) for row in scores]
        hits = sum(bool(own & top) for own, top in zip(right, first, strict=True))
        assert found[f"t2i_r@{k}"] == pytest.approx(100 * hits / 23)


def test_no_queries_is_an_error_not_a_recall_of_zero() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        recall_at(np.array([], dtype=np.int64), 1)
    with pytest.raises(ValueError, match="at least one query"):
        chance_recall_at(np.array([], dtype=np.int64), 5, 1)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_chance_is_the_formula_with_binomials(gallery: int, k: int, data: st.DataObject) -> None:
    rights = data.draw(st.lists(st.integers(0, gallery), min_size=1, max_size=6))
    drawn = min(k, gallery)
    exact = np.mean([1 - math.comb(gallery - r, drawn) / math.comb(gallery, drawn) for r in rights])
    assert chance_recall_at(np.array(rights), gallery, k) == pytest.approx(100 * float(exact), abs=1e-9)


def test_chance_of_a_large_gallery_neither_overflows_nor_rounds_to_nothing() -> None:
    assert chance_recall_at(np.array([1]), 500_000, 10) == pytest.approx(100 * 10 / 500_000, rel=1e-9)


def test_chance_against_simulation() -> None:
    generator = np.random.default_rng(0)
    rights, gallery, k = np.array([1, 3, 7]), 20, 5
    hits = 0
    rounds = 20_000
    for _ in range(rounds):
        order = generator.permutation(gallery)
        hits += sum(int((order[:k] < r).any()) for r in rights)
    assert chance_recall_at(rights, gallery, k) == pytest.approx(100 * hits / (rounds * 3), abs=0.8)


def test_chances_of_both_directions() -> None:
    # 2 images, 10 texts, 5 texts an image
    found = chances({"i2t": (np.array([5, 5]), 10), "t2i": (np.ones(10, dtype=np.int64), 2)})
    assert found["chance_i2t_r@1"] == pytest.approx(50.0)
    assert found["chance_t2i_r@1"] == pytest.approx(50.0)
    assert found["chance_t2i_r@5"] == pytest.approx(100.0)
    six = [found[f"chance_{way}_r@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert found["chance_rsum"] == pytest.approx(sum(six))


def test_one_direction_has_the_mean_of_three_recalls_and_no_rsum() -> None:
    found = recalls(t2i=T2I)
    assert found == {
        "t2i_r@1": 50.0,
        "t2i_r@5": 75.0,
        "t2i_r@10": 75.0,
        "t2i_median_rank": 2.0,
        "r@m": 200 / 3,
    }
    by_chance = chances({"t2i": (np.ones(10, dtype=np.int64), 20)})
    assert by_chance == {
        "chance_t2i_r@1": pytest.approx(5.0),
        "chance_t2i_r@5": pytest.approx(25.0),
        "chance_t2i_r@10": pytest.approx(50.0),
        "chance_r@m": pytest.approx(80 / 3),
    }
    with pytest.raises(ValueError, match="ranks: none"):
        recalls()


def test_more_right_answers_than_the_gallery_is_an_error() -> None:
    with pytest.raises(ValueError, match="6 right answers in a gallery of 5"):
        chance_recall_at(np.array([6]), 5, 1)


def test_mean_over_folds() -> None:
    assert mean_of([{"r": 10.0}, {"r": 20.0}]) == {"r": 15.0}
    with pytest.raises(ValueError, match="different metrics"):
        mean_of([{"r": 1.0}, {"q": 1.0}])
