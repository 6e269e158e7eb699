"""NDCG, MAP and recalls by labels: against scikit-learn, every order of small galleries, known answers."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from learning.evaluation.label_metrics import Gain, LabelJudged, judge_labels, label_metrics
from learning.evaluation.label_sets import LabelRows
from tests.test_retrieval import LargestTensor, brute_force, unit

Labels = list[set[int]]
NAMES = 6


def case(seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray, Labels, Labels]:
    """Random embeddings, the gallery with many equal rows (so equal scores); up to four labels a row."""
    generator = np.random.default_rng(seed)
    distinct = unit(generator.normal(size=(max(2, m // 2), 8)))
    gallery = distinct[generator.integers(0, len(distinct), m)]
    labels = [set(generator.integers(0, NAMES, generator.integers(0, 5)).tolist()) for _ in range(n + m)]
    return unit(generator.normal(size=(n, 8))), gallery, labels[:n], labels[n:]


def judged(
    queries: np.ndarray,
    gallery: np.ndarray,
    asked: Sequence[set[int]],
    answers: Sequence[set[int]],
    names: int = NAMES,
    **options: object,
) -> LabelJudged:
    columns = judge_labels(
        queries, gallery, LabelRows.of(asked, names), LabelRows.of(answers, names), **options
    )
    return LabelJudged.of(columns, len(gallery))


def exact_scores(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    # equal gallery rows give bitwise equal sums here: einsum adds each pair in the same order
    return np.einsum("nd,md->nm", queries.astype(np.float64), gallery.astype(np.float64), optimize=False)


def shared_counts(asked: Labels, answers: Labels) -> np.ndarray:
    return np.array([[len(own & other) for other in answers] for own in asked])


def dcg_of(gains: Sequence[float], cut: int) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:cut], start=1))


def precision_of(right: Sequence[bool], cut: int) -> float:
    """AP@k of an order without ties."""
    hits = [sum(right[: rank + 1]) / (rank + 1) for rank in range(min(cut, len(right))) if right[rank]]
    return sum(hits) / min(cut, sum(right))


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("cut", [None, 1, 3, 10, 40])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_with_ties(seed: int, cut: int | None, gain: Gain) -> None:
    queries, gallery, asked, answers = case(seed, n=17, m=31)
    found = judged(queries, gallery, asked, answers, gain=gain, cut=cut)
    scores, shared = exact_scores(queries, gallery), shared_counts(asked, answers)
    assert max(len(row) - len(set(row)) for row in scores) > 5  # there are ties
    gains = shared if gain == "linear" else 2**shared - 1
    for row in range(len(queries)):
        assert found.rights[row] == (shared[row] > 0).sum()
        if shared[row].any():
            expected = ndcg_score([gains[row]], [scores[row]], k=cut)
            assert found.ndcg[row] == pytest.approx(expected, abs=1e-12)
            if cut is None:
                expected = average_precision_score(shared[row] > 0, scores[row])
                assert found.precision[row] == pytest.approx(expected, abs=1e-12)
        else:
            assert (found.ndcg[row], found.precision[row], found.counted[row]) == (0, 0, False)
    counted = [row for row in range(len(queries)) if shared[row].any()]
    right = [set(np.flatnonzero(shared[row])) for row in counted]
    assert found.ranks[counted].tolist() == brute_force(scores[counted], right)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25), st.integers(1, 30))
def test_precision_at_a_cut_without_ties(seed: int, m: int, cut: int) -> None:
    queries, _, asked, answers = case(seed, n=5, m=m)
    gallery = unit(np.random.default_rng(seed).normal(size=(m, 8)))
    found = judged(queries, gallery, asked, answers, cut=cut)
    scores, shared = exact_scores(queries, gallery), shared_counts(asked, answers)
    for row in np.flatnonzero(shared.any(axis=1)):
        right = (shared[row] > 0)[np.argsort(-scores[row])].tolist()
        assert found.precision[row] == pytest.approx(precision_of(right, cut), abs=1e-12)


def test_known_answers() -> None:
    gallery = np.eye(4, dtype=np.float32)
    queries = unit(np.array([[4.0, 3, 2, 1]]))
    # in the order of the scores the answers share 1, 0, 2 and 1 labels
    found = judged(queries, gallery, [{0, 1}], [{0}, {2}, {0, 1}, {1, 3}])
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert found.ndcg[0] == pytest.approx((1 + 2 / 2 + 1 / math.log2(5)) / ideal)
    assert found.precision[0] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert (found.ranks[0], found.rights[0]) == (1, 3)
    exponential = judged(queries, gallery, [{0, 1}], [{0}, {2}, {0, 1}, {1, 3}], gain="exponential")
    assert exponential.ndcg[0] == pytest.approx(
        (1 + 3 / 2 + 1 / math.log2(5)) / (3 + 1 / math.log2(3) + 1 / 2)
    )
    first_two = judged(queries, gallery, [{0, 1}], [{0}, {2}, {0, 1}, {1, 3}], cut=2)
    assert first_two.ndcg[0] == pytest.approx(1 / (2 + 1 / math.log2(3)))
    assert first_two.precision[0] == pytest.approx(1 / 2)


def test_all_equal_scores_are_worth_what_a_random_order_is() -> None:
    same = unit(np.ones((6, 8)))
    answers: Labels = [{0}, {0, 1}, set(), {2}, {2}, {1}]
    for cut in (None, 1, 4):
        found = judged(same[:1], same, [{0, 1}], answers, cut=cut)
        assert found.ndcg[0] == pytest.approx(found.chance_ndcg[0])
        # half of the answers are right; every threshold takes in all six
        assert found.precision[0] == pytest.approx(0.5 * (cut or 6) * 3 / 6 / min(cut or 6, 3))
    assert found.ranks[0] == 4


def test_the_best_order_is_worth_1_whatever_the_cut() -> None:
    gallery = np.eye(5, dtype=np.float32)
    queries = unit(np.array([[5.0, 4, 3, 2, 1]]))
    for cut, gain in itertools.product((None, 1, 2, 5, 9), ("linear", "exponential")):
        found = judged(queries, gallery, [{0, 1, 2}], [{0, 1, 2}, {0, 2}, {1}, {2}, {4}], cut=cut, gain=gain)
        assert found.ndcg[0] == pytest.approx(1.0)
        assert found.precision[0] == pytest.approx(1.0)


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("cut", [None, 2])
def test_chance_is_the_mean_over_every_order(cut: int | None, gain: Gain) -> None:
    answers: Labels = [{0}, {0, 1}, {5}, set(), {1, 2}, {2, 3}]
    asked: Labels = [{0, 1}, {3}, {0, 1, 2, 3, 5}]
    gallery = np.eye(len(answers), dtype=np.float32)
    found = judged(gallery[:3], gallery, asked, answers, cut=cut, gain=gain)
    places = cut or len(answers)
    for row, shared in enumerate(shared_counts(asked, answers)):
        gains = (shared if gain == "linear" else 2**shared - 1).tolist()
        best = dcg_of(sorted(gains, reverse=True), places)
        orders = list(itertools.permutations(range(len(answers))))
        ndcg = [dcg_of([gains[i] for i in order], places) / best for order in orders]
        precision = [precision_of([gains[i] > 0 for i in order], places) for order in orders]
        assert found.chance_ndcg[row] == pytest.approx(float(np.mean(ndcg)))
        assert found.chance_precision[row] == pytest.approx(float(np.mean(precision)))


def test_a_gallery_of_one() -> None:
    one = np.eye(2, dtype=np.float32)[:1]
    found = judged(one, one, [{0}], [{0, 1}])
    assert (found.ndcg[0], found.precision[0], found.chance_ndcg[0], found.chance_precision[0]) == (
        1,
        1,
        1,
        1,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 50), st.integers(1, 35), st.integers(1, 60))
def test_neither_blocks_nor_the_order_of_the_gallery_change_a_bit(
    seed: int, n: int, m: int, query_block: int, gallery_block: int
) -> None:
    queries, gallery, asked, answers = case(seed, n, m)
    own, given_ = LabelRows.of(asked, NAMES), LabelRows.of(answers, NAMES)
    whole = judge_labels(queries, gallery, own, given_, cut=m // 2 or None)
    blocks = {"query_block": query_block, "gallery_block": gallery_block}
    parts = judge_labels(queries, gallery, own, given_, cut=m // 2 or None, **blocks)
    assert np.array_equal(parts, whole)
    order = np.random.default_rng(seed).permutation(m)
    shuffled = LabelRows.of([answers[i] for i in order], NAMES)
    assert np.array_equal(judge_labels(queries, gallery[order], own, shuffled, cut=m // 2 or None), whole)


def test_memory_is_a_few_blocks() -> None:
    n, m, names, block = 48, 400, 90, 16
    generator = np.random.default_rng(0)
    queries, gallery = unit(generator.normal(size=(n, 8))), unit(generator.normal(size=(m, 8)))
    asked, answers = (
        LabelRows.of([{int(x) for x in generator.integers(0, names, 3)} for _ in range(rows)], names)
        for rows in (n, m)
    )
    with LargestTensor() as watched:
        judge_labels(queries, gallery, asked, answers, query_block=block, gallery_block=70)
    assert watched.largest == block * (m + 1) * 8


def test_metrics_are_means_over_the_queries_that_can_be_answered() -> None:
    gallery = np.eye(4, dtype=np.float32)
    answers: Labels = [{0}, {0, 1}, {2}, set()]
    asked: Labels = [{0}, {1}, {3}, set()]  # the third shares no label, the fourth has none
    i2t = judged(gallery, gallery, asked, answers)
    t2i = judged(gallery, gallery, answers, asked)
    found = label_metrics({"i2t": i2t, "t2i": t2i})
    assert (found["i2t_left_out"], found["t2i_left_out"]) == (2, 2)
    assert found["i2t_ndcg"] == pytest.approx(100 * (i2t.ndcg[0] + i2t.ndcg[1]) / 2)
    assert found["t2i_map"] == pytest.approx(100 * (t2i.precision[0] + t2i.precision[1]) / 2)
    for name in ("ndcg", "map", "chance_ndcg", "chance_map"):
        before, _, metric = name.rpartition("_")
        sides = [found[f"{before}_{way}_{metric}".lstrip("_")] for way in ("i2t", "t2i")]
        assert found[name] == pytest.approx(sum(sides) / 2)
    assert (found["i2t_r@1"], found["t2i_r@5"]) == (100.0, 100.0)
    assert found["chance_i2t_r@1"] == pytest.approx(100 * (2 / 4 + 1 / 4) / 2)
    one_way = label_metrics({"t2i": t2i}, cut=3)
    assert one_way["ndcg@3"] == one_way["t2i_ndcg@3"] == pytest.approx(found["t2i_ndcg"])
    assert not [name for name in one_way if "i2t" in name or ("ndcg" in name and "@3" not in name)]


def test_recalls_by_labels_against_a_count_of_the_first_k() -> None:
    queries, _, asked, answers = case(3, n=40, m=30)
    gallery = unit(np.random.default_rng(3).normal(size=(30, 8)))
    found = label_metrics({"i2t": judged(queries, gallery, asked, answers)})
    order = np.argsort(-exact_scores(queries, gallery), axis=1)
    counted = [i for i in range(40) if any(asked[i] & other for other in answers)]
    assert 0 < len(counted) < 40
    for k in (1, 5, 10):
        hits = [any(asked[i] & answers[j] for j in order[i, :k]) for i in counted]
        assert found[f"i2t_r@{k}"] == pytest.approx(100 * np.mean(hits))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": 2 * np.eye(3, dtype=np.float32)}, "queries: row 0 has length 2"),
        ({"gallery": np.full((3, 3), np.nan, np.float32)}, "gallery: row 0 has length nan"),
        ({"asked": [{0}]}, "asked: labels of 1 rows for 3 embeddings"),
        ({"answers": [{0}] * 4}, "answers: labels of 4 rows for 3"),
        ({"gallery": np.zeros((0, 3), np.float32), "answers": []}, "gallery: empty"),
        (
            {"answers": [set(range(60))] * 3, "gain": "exponential"},
            "gain: exponential: an answer has 60 labels",
        ),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], message: str) -> None:
    rows = np.eye(3, dtype=np.float32)
    values = {"queries": rows, "gallery": rows, "asked": [{0}] * 3, "answers": [{0}] * 3, "names": 60}
    with pytest.raises(ValueError, match=message):
        judged(**(values | changed))  # type: ignore[arg-type]


def test_a_label_outside_the_names_is_an_error() -> None:
    with pytest.raises(ValueError, match="labels: 0 … 7; there are 7"):
        LabelRows.of([{0, 7}], 7)


def test_no_query_with_an_answer_is_an_error() -> None:
    rows = np.eye(3, dtype=np.float32)
    nothing = judged(rows, rows, [{0}] * 3, [{1}] * 3)
    with pytest.raises(ValueError, match="no query of t2i shares a label with any answer"):
        label_metrics({"t2i": nothing})
