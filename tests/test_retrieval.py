"""Ranks of right answers against a brute force in float64, with ties, several right answers, odd blocks."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from learning.evaluation import retrieval
from learning.evaluation.retrieval import RightAnswers, best_ranks, top_answers


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute_force(scores: np.ndarray, right: list[set[int]]) -> list[int]:
    """The rank of the best right answer after sorting all: higher score first, of equals a wrong one."""
    ranks = []
    for row, own in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j in own))
        ranks.append(1 + next(place for place, j in enumerate(order) if j in own))
    return ranks


def tied_case(seed: int, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
    """Random queries; a gallery with many equal rows (so equal scores), one to four right answers a query."""
    generator = np.random.default_rng(seed)
    distinct = unit(generator.normal(size=(max(2, m // 3), d)))
    gallery = distinct[generator.integers(0, len(distinct), m)]
    queries = unit(generator.normal(size=(n, d)))
    right = [
        set(generator.choice(m, size=min(m, int(generator.integers(1, 5))), replace=False)) for _ in range(n)
    ]
    return queries, gallery, right


def test_known_answers() -> None:
    gallery = np.eye(4, dtype=np.float32)
    queries = unit(np.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 3, 2, 1]]))
    right = RightAnswers.of([{0}, {0}, {3, 1}])
    assert best_ranks(queries, gallery, right).tolist() == [1, 4, 2]


def test_a_tie_with_a_wrong_answer_counts_against_the_model_and_one_with_a_right_answer_does_not() -> None:
    same = unit(np.ones((5, 8)))
    assert best_ranks(same[:1], same, RightAnswers.of([{0}])).tolist() == [5]
    assert best_ranks(same[:1], same, RightAnswers.of([{4}])).tolist() == [5]  # whatever the position
    assert best_ranks(same[:1], same, RightAnswers.of([{0, 1, 2, 3, 4}])).tolist() == [1]
    assert best_ranks(same[:1], same, RightAnswers.of([{1, 3}])).tolist() == [4]


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_with_ties_and_several_right_answers(seed: int) -> None:
    queries, gallery, right = tied_case(seed, n=37, m=53, d=16)
    # equal gallery rows give bitwise equal sums here: einsum adds each pair in the same order
    scores = np.einsum("nd,md->nm", queries.astype(np.float64), gallery.astype(np.float64), optimize=False)
    assert best_ranks(queries, gallery, RightAnswers.of(right)).tolist() == brute_force(scores, right)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 60), st.integers(1, 45), st.integers(1, 70))
def test_block_sizes_never_change_a_rank(
    seed: int, n: int, m: int, query_block: int, gallery_block: int
) -> None:
    queries, gallery, right = tied_case(seed, n, m, d=33)
    rows = RightAnswers.of(right)
    whole = best_ranks(queries, gallery, rows, query_block=n, gallery_block=m)
    parts = best_ranks(queries, gallery, rows, query_block=query_block, gallery_block=gallery_block)
    assert parts.tolist() == whole.tolist()


def test_scores_are_exact_in_any_shape_of_product() -> None:
    """The reason for the fixed point: float32 products of equal rows differ with the block's shape."""
    generator = np.random.default_rng(5)
    queries, gallery = unit(generator.normal(size=(64, 777))), unit(generator.normal(size=(512, 777)))
    a, b = (retrieval.fixed_point(x, "cpu") for x in (queries, gallery))
    whole = a @ b.T
    exact = [
        [sum(int(x) * int(y) for x, y in zip(a[i], b[j], strict=True)) for j in range(4)] for i in range(4)
    ]
    assert whole[:4, :4].to(torch.int64).tolist() == exact
    assert whole.abs().max() < 2**53
    for shape in (1, 3, 17, 100):
        assert torch.equal(torch.cat([a @ part.T for part in b.split(shape)], dim=1), whole)
        assert torch.equal(torch.cat([part @ b.T for part in a.split(shape)]), whole)
    assert torch.equal((a[:, None] * b[:64]).sum(-1), whole[:, :64])


def test_the_rounding_is_that_of_float32() -> None:
    generator = np.random.default_rng(6)
    queries, gallery = unit(generator.normal(size=(50, 1024))), unit(generator.normal(size=(50, 1024)))
    scores = (retrieval.fixed_point(queries, "cpu") @ retrieval.fixed_point(gallery, "cpu").T) / 2.0**52
    assert np.abs(scores.numpy() - queries.astype(np.float64) @ gallery.astype(np.float64).T).max() < 2.0**-24


def test_embeddings_are_left_as_they_were() -> None:
    queries, gallery, right = tied_case(1, 5, 9, 4)
    before = queries.copy(), gallery.copy()
    best_ranks(queries, gallery, RightAnswers.of(right))
    assert np.array_equal(queries, before[0])
    assert np.array_equal(gallery, before[1])


@pytest.mark.parametrize("seed", range(6))
def test_top_answers_agree_with_the_ranks(seed: int) -> None:
    queries, gallery, right = tied_case(seed, n=20, m=31, d=8)
    rows = RightAnswers.of(right)
    positions, cosines = top_answers(queries, gallery, rows, k=31)
    firsts = [
        1 + next(p for p, a in enumerate(row) if a in own) for row, own in zip(positions, right, strict=True)
    ]
    assert firsts == best_ranks(queries, gallery, rows).tolist()
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert np.allclose(cosines[0], gallery[positions[0]] @ queries[0], atol=1e-6)
    assert top_answers(queries, gallery, rows, k=100)[0].shape == (20, 31)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes; tracemalloc does not see them."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


def test_memory_is_a_few_blocks_not_the_full_matrix() -> None:
    n, m, d, block = 3000, 4000, 16, 128
    generator = np.random.default_rng(0)
    queries, gallery = unit(generator.normal(size=(n, d))), unit(generator.normal(size=(m, d)))
    right = RightAnswers.of([{i % m} for i in range(n)])
    with LargestTensor() as watched:
        best_ranks(queries, gallery, right, query_block=block, gallery_block=block)
    # one block of scores in float64; the full matrix has 12 M
    assert watched.largest == block * block * 8
    tracemalloc.start()
    best_ranks(queries, gallery, right, query_block=block, gallery_block=block)
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numpy_peak < 1_000_000


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, g: (q * 2, g, [{0}] * 3), "queries: row 0 has length 2"),
        (
            lambda q, g: (q, g * np.array([[1], [np.nan], [1], [1]], np.float32), [{0}] * 3),
            "gallery: row 1 has .*nan",
        ),
        (lambda q, g: (q, g, [{0}, set(), {1}]), "query 1 has no right answer"),
        (lambda q, g: (q, g, [{0}, {4}, {1}]), "outside the gallery of 4"),
        (lambda q, g: (q, g, [{0}]), "1 rows for 3 queries"),
        (lambda q, g: (q.astype(np.float64), g, [{0}] * 3), "float64"),
    ],
)
def test_bad_input_is_named(spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(0)
    queries, gallery, rows = spoil(unit(generator.normal(size=(3, 8))), unit(generator.normal(size=(4, 8))))
    with pytest.raises(ValueError, match=message):
        best_ranks(queries, gallery, RightAnswers.of(rows))


def test_right_answers_by_rows() -> None:
    right = RightAnswers.of([[3, 1, 3], {0}, []])
    assert right.of_query(0).tolist() == [1, 3]
    assert right.counts.tolist() == [2, 1, 0]
    assert right.rows(1, 3).counts.tolist() == [1, 0]
    assert right.rows(1, 3).of_query(0).tolist() == [0]
