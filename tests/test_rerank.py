"""Re-ranking: known orders, brute force with ties, full cross-encoding, folds, one process against several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.evaluation.metrics import recalls
from learning.evaluation.pairs import PairScorer
from learning.evaluation.rerank import RerankConfig, Reranked, Side, rerank
from learning.evaluation.retrieval import RightAnswers, best_ranks, cosines, first_by_cosine
from learning.evaluation.validate import Outcome, evaluate_gallery
from tests import pair_case, tiny_model
from tests.distributed_harness import run_distributed
from tests.test_retrieval import tied_case, unit

CPU = torch.device("cpu")
IMAGES = 23


@pytest.fixture(autouse=True)
def plugged() -> Iterator[None]:
    pair_case.plug_in()
    yield
    pair_case.plug_out()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_corpus(tmp_path_factory.mktemp("corpus"), IMAGES)


def side(queries: np.ndarray, answers: np.ndarray, right: list[set[int]], direction: Any = "i2t") -> Side:
    rows = RightAnswers.of(right)
    own = np.arange(len(queries)), np.arange(len(answers))
    return Side(direction, queries, answers, rows, *own, best_ranks(queries, answers, rows))


def reranked(one: Side, match: np.ndarray, top_k: int, score: Any = "match+cosine") -> Reranked:
    """`match`: (images, texts)."""
    return rerank([one], RerankConfig(top_k=top_k, score=score), lambda i, t: match[i, t])[0]


# ------------------------------------------------------------------------------------------- known orders


def test_known_answers() -> None:
    gallery = np.eye(4, dtype=np.float32)
    queries = unit(np.array([[4.0, 3, 2, 1]] * 5))  # by cosine: 0, 1, 2, 3
    right = [{2}, {1}, {3}, {0, 2}, {2}]
    match = np.array(
        [
            [0.1, 0.2, 0.9, 1.0],  # 2 comes first: 3 is no candidate, however well it matches
            [0.9, 0.5, 0.5, 0.0],  # 1 and 2 tie, and 0 is above
            [0.0, 0.0, 0.0, 1.0],  # no right candidate: the rank by cosine stays
            [0.3, 0.3, 0.2, 0.0],  # the best right one, 0, ties with 1
            [0.5, 0.5, 0.5, 0.0],  # all tie
        ],
        dtype=np.float32,
    )
    made = reranked(side(queries, gallery, right), match, 3, "match")
    assert made.ranks.tolist() == [1, 3, 4, 2, 3]
    assert made.ceiling == 80.0
    # equal scores: the wrong ones first, else by cosine
    assert made.candidates.tolist() == [[2, 1, 0], [0, 2, 1], [0, 1, 2], [1, 0, 2], [0, 1, 2]]
    assert np.array_equal(made.match[0], np.float32([0.9, 0.2, 0.1]))
    assert np.allclose(made.cosines[0], np.array([2, 3, 4]) / 30**0.5, atol=1e-7)


def test_the_score_is_the_sum_of_match_and_cosine_or_match_alone() -> None:
    queries = unit(np.array([[1.0, 0.0]]))
    gallery = unit(np.array([[4.0, 3.0], [3.0, 4.0]]))  # cosines 0.8 and 0.6
    match = np.array([[0.5, 0.6]], dtype=np.float32)
    one = side(queries, gallery, [{1}])
    assert reranked(one, match, 2).ranks.tolist() == [2]  # 1.3 against 1.2
    assert reranked(one, match, 2, "match").ranks.tolist() == [1]


def test_a_tie_at_the_border_of_the_candidates_never_ranks_above_it() -> None:
    """Five equal cosines, two candidates: the first two by position; the right one may be behind them."""
    same = unit(np.ones((5, 8)))
    match = np.ones((1, 5), dtype=np.float32)
    for position in range(5):
        made = reranked(side(same[:1], same, [{position}]), match, 2)
        assert sorted(made.candidates[0].tolist()) == [0, 1]
        assert made.ranks.tolist() == ([2] if position < 2 else [5])
        assert made.ceiling == (100.0 if position < 2 else 0.0)


def test_each_pair_of_the_two_directions_is_asked_once_in_the_order_of_the_images() -> None:
    generator = np.random.default_rng(2)
    images, texts = unit(generator.normal(size=(6, 4))), unit(generator.normal(size=(9, 4)))
    sides = [
        side(images, texts, [{0}] * 6),
        side(texts, images, [{0}] * 9, "t2i"),
    ]
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    match = generator.random((6, 9)).astype(np.float32)

    def judged(i: np.ndarray, t: np.ndarray) -> np.ndarray:
        asked.append((i, t))
        return match[i, t]

    made = rerank(sides, RerankConfig(top_k=3, score="match"), judged)
    assert len(asked) == 1
    pairs = list(zip(*(ids.tolist() for ids in asked[0]), strict=True))
    assert pairs == sorted(set(pairs))
    wanted = {(q, int(t)) for q in range(6) for t in made[0].candidates[q]}
    wanted |= {(int(i), q) for q in range(9) for i in made[1].candidates[q]}
    assert set(pairs) == wanted
    for query in range(9):
        assert np.array_equal(made[1].match[query], match[made[1].candidates[query], query])


# ----------------------------------------------------------------------------------------------- brute force


def slow_ranks(
    exact: np.ndarray, match: np.ndarray, right: list[set[int]], k: int, score: str
) -> tuple[list[int], list[bool]]:
    """Sort, cut, sort again, count: a query at a time, in plain Python."""
    ranks, found = [], []
    for row, own_match, own in zip(exact.tolist(), match.astype(np.float64).tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        candidates, rest = order[:k], order[k:]
        points = {j: own_match[j] + (row[j] if score == "match+cosine" else 0.0) for j in candidates}
        candidates.sort(key=lambda j: (-points[j], j in own))
        rest.sort(key=lambda j: (-row[j], j in own))
        ranks.append(1 + next(place for place, j in enumerate([*candidates, *rest]) if j in own))
        found.append(any(j in own for j in candidates))
    return ranks, found


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 34),
    st.sampled_from(["match+cosine", "match"]),
    st.sampled_from([1, 3, 1000]),
)
def test_equals_sorting_with_ties_and_several_right_answers(
    seed: int, n: int, m: int, k: int, score: str, query_block: int
) -> None:
    queries, gallery, right = tied_case(seed, n, m, d=5)
    # few distinct probabilities, so that many tie
    match = (np.random.default_rng(seed).integers(0, 3, (n, m)) / 4).astype(np.float32)
    one = side(queries, gallery, right)
    config = RerankConfig(top_k=k, score=score)  # type: ignore[arg-type]
    made = rerank([one], config, lambda i, t: match[i, t], query_block=query_block)[0]
    exact = np.stack([cosines(np.repeat(queries[q : q + 1], m, axis=0), gallery) for q in range(n)])
    ranks, found = slow_ranks(exact, match, right, k, score)
    assert made.ceiling == pytest.approx(100 * np.mean(found))
    for query in range(n):
        # behind the candidates the rank by cosine counts against the model those that tie at the border too
        expected = ranks[query] if found[query] else int(one.ranks[query])
        assert made.ranks[query] == expected
        assert found[query] == (made.ranks[query] <= min(k, m))
    whole = rerank([one], RerankConfig(top_k=m, score=score), lambda i, t: match[i, t])[0]  # type: ignore[arg-type]
    assert whole.ranks.tolist() == slow_ranks(exact, match, right, m, score)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 50), st.integers(1, 60), st.integers(1, 60))
def test_candidates_are_those_of_a_sort_for_any_block(seed: int, n: int, m: int, k: int, block: int) -> None:
    queries, gallery, _ = tied_case(seed, n, m, d=7)
    positions, found = first_by_cosine(queries, gallery, min(k, m), gallery_block=block)
    for query in range(n):
        exact = cosines(np.repeat(queries[query : query + 1], m, axis=0), gallery)
        order = sorted(range(m), key=lambda j: (-exact[j], j))[: min(k, m)]
        assert positions[query].tolist() == order
        assert np.array_equal(found[query].numpy(), exact[order])


# ------------------------------------------------------------------------------------------- with a model


def evaluated(corpus: Path, **changed: Any) -> Outcome:
    options = {"batch": 4, "device": CPU, "max_length": 12} | changed
    texts, relevance = options.pop("texts", ["title"]), options.pop("relevance", "concept")
    top_k, pairs_batch = options.pop("top_k", 5), options.pop("pairs_batch", 7)
    return evaluate_gallery(
        options.pop("method", None) or pair_case.method(),
        tiny_model.tokenizer(),
        tiny_model.transform(),
        tiny_model.open_corpus(corpus),
        texts,
        relevance,
        rerank_by=RerankConfig(top_k=top_k, batch=pairs_batch, score=options.pop("score", "match+cosine")),
        **options,
    )


def all_pairs(corpus: Path, texts: list[str]) -> np.ndarray:
    """The match probabilities of all images with all texts, each pair on its own: (images, texts)."""
    index, method, tokenizer = tiny_model.open_corpus(corpus), pair_case.method(), tiny_model.tokenizer()
    found = np.empty((len(index), len(texts)))
    scorer = PairScorer(method, tokenizer, tiny_model.transform(), index, 1, CPU, 12, 10_000)
    for i in range(len(index)):
        everyone = np.full(len(texts), i), np.arange(len(texts))
        found[i] = scorer(*everyone, texts)
    return found


@pytest.mark.parametrize("score", ["match+cosine", "match"])
def test_as_many_candidates_as_the_gallery_is_full_cross_encoding(corpus: Path, score: str) -> None:
    outcome = evaluated(corpus, top_k=1000, score=score)
    gallery = outcome.gallery
    match = all_pairs(corpus, gallery.texts)
    cosine = outcome.images.astype(np.float64) @ outcome.texts.T.astype(np.float64)
    points = match + cosine if score == "match+cosine" else match
    gaps = np.diff(np.sort(points, axis=1), axis=1)
    assert gaps.min() > 1e-5  # no near tie that another batch's rounding could turn
    ranks = {}
    for direction, scores, right in (
        ("i2t", points, gallery.right_texts()),
        ("t2i", points.T, gallery.right_images()),
    ):
        best = [scores[q, right.of_query(q)].max() for q in range(len(right))]
        ranks[direction] = np.array([1 + np.count_nonzero(row > b) for row, b in zip(scores, best)])
        wrong_before = [
            1 + sum(scores[q, a] > best[q] for a in range(scores.shape[1]) if a not in right.of_query(q))
            for q in range(len(right))
        ]
        assert ranks[direction].tolist() == wrong_before
    assert outcome.i2t_ranks.tolist() == ranks["i2t"].tolist()
    assert outcome.t2i_ranks.tolist() == ranks["t2i"].tolist()
    assert recalls(**ranks).items() <= outcome.metrics.items()
    assert outcome.metrics["ceiling_i2t"] == outcome.metrics["ceiling_t2i"] == 100.0


def test_metrics_of_both_stages_stand_side_by_side(corpus: Path) -> None:
    outcome = evaluated(corpus, top_k=3)
    plain = evaluate_gallery(
        pair_case.method(),
        tiny_model.tokenizer(),
        tiny_model.transform(),
        tiny_model.open_corpus(corpus),
        ["title"],
        "concept",
        batch=4,
        device=CPU,
        max_length=12,
    )
    first = recalls(i2t=plain.i2t_ranks, t2i=plain.t2i_ranks)
    assert {f"cosine_{name}": value for name, value in first.items()}.items() <= outcome.metrics.items()
    extra = {f"cosine_{name}" for name in first} | {"ceiling_i2t", "ceiling_t2i"}
    assert set(outcome.metrics) == set(plain.metrics) | extra
    ranks = outcome.i2t_ranks
    assert outcome.metrics["ceiling_i2t"] == pytest.approx(100 * np.mean(ranks <= 3))
    assert (ranks[ranks > 3] == plain.i2t_ranks[ranks > 3]).all()


def test_one_direction_alone(corpus: Path) -> None:
    both, one = evaluated(corpus), evaluated(corpus, directions=["t2i"])
    assert not [name for name in one.metrics if "i2t" in name or "rsum" in name]
    for name in [name for name in one.metrics if "t2i" in name]:
        assert one.metrics[name] == both.metrics[name]
    assert one.metrics["r@m"] == pytest.approx(np.mean([one.metrics[f"t2i_r@{k}"] for k in (1, 5, 10)]))


def test_folds_have_candidates_of_their_own(corpus: Path) -> None:
    outcome = evaluated(corpus, texts=["captions"], relevance=None, folds=5, top_k=4)
    match = all_pairs(corpus, outcome.gallery.texts).astype(np.float32)
    ceilings, ranks_at_1 = [], []
    for part, own_images, own_texts in outcome.gallery.folds(5):
        images, texts = outcome.images[own_images], outcome.texts[own_texts]
        rights = [part.right_texts().of_query(q).tolist() for q in range(len(images))]
        exact = np.stack([cosines(np.repeat(images[q : q + 1], len(texts), 0), texts) for q in range(len(images))])
        ranks, found = slow_ranks(
            exact, match[np.ix_(own_images, own_texts)], [set(r) for r in rights], 4, "match+cosine"
        )
        ceilings.append(100 * np.mean(found))
        ranks_at_1.append(100 * np.mean([rank == 1 for rank in ranks]))
    assert outcome.metrics["ceiling_i2t"] == pytest.approx(np.mean(ceilings))
    assert outcome.metrics["i2t_r@1"] == pytest.approx(np.mean(ranks_at_1))


def test_progress_counts_images_texts_and_pairs(corpus: Path) -> None:
    told: list[int] = []
    outcome = evaluated(corpus, top_k=1000, advance=told.append)
    assert sum(told) == IMAGES + len(outcome.texts) + IMAGES * len(outcome.texts)


def test_a_block_encodes_each_picture_and_each_text_once(corpus: Path) -> None:
    method = pair_case.method()
    seen: list[tuple[int, int]] = []
    image_tokens, text_tokens = method.image_tokens, method.text_tokens
    method.image_tokens = lambda images: (seen.append((len(images), 0)), image_tokens(images))[1]  # type: ignore[method-assign]
    method.text_tokens = lambda texts: (seen.append((0, len(texts.ids))), text_tokens(texts))[1]  # type: ignore[method-assign]
    index = tiny_model.open_corpus(corpus)
    scorer = PairScorer(method, tiny_model.tokenizer(), tiny_model.transform(), index, 6, CPU, 12, 10_000)
    found = scorer(np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 2, 0, 1, 2, 0, 2]), ["a", "red", "b"])
    assert found.dtype == np.float32
    assert found.shape == (8,)
    assert seen == [(2, 0), (0, 3), (1, 0), (0, 2)]


def test_a_score_that_is_no_probability_is_an_error_with_the_pair(corpus: Path) -> None:
    method = pair_case.method()
    score_pairs = method.score_pairs
    method.score_pairs = lambda *of: score_pairs(*of) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"sample test0000: with the text 'red thing 0' the match .* is nan"):
        evaluated(corpus, method=method)
    method.score_pairs = lambda *of: score_pairs(*of) + 1  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        evaluated(corpus, method=method)


def test_a_method_that_judges_no_pairs_is_an_error(corpus: Path) -> None:
    with pytest.raises(ValueError, match="Clip embeds pictures and texts apart and cannot judge a pair"):
        evaluated(corpus, method=tiny_model.method())


def _rerank_in(rank: int, world: int, corpus: str) -> list[Any]:
    """What re-ranking gives, to the last bit, and the number of calls of the pair scorer."""
    pair_case.plug_in()
    calls: list[int] = []
    method = pair_case.method()
    score_pairs = method.score_pairs
    method.score_pairs = lambda *of: (calls.append(len(of[0])), score_pairs(*of))[1]  # type: ignore[method-assign]
    values: list[Any] = []
    for options in ({}, {"texts": ["captions"], "relevance": None, "folds": 3}, {"pairs_batch": 4096}):
        outcome = evaluated(Path(corpus), method=method, **options)
        values += [json.dumps(outcome.metrics), outcome.i2t_ranks.tolist(), outcome.t2i_ranks.tolist()]
        for made in outcome.whole.reranked:
            values += [made.match.tobytes().hex(), made.candidates.tobytes().hex()]
    return [*values, len(calls)]


@pytest.mark.slow
def test_processes_share_the_pairs_and_change_nothing(corpus: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _rerank_in(0, 1, str(corpus))
    finally:
        torch.set_num_threads(threads)
    several = run_distributed(_rerank_in, 2, str(corpus))
    for result in several:
        assert result[:-1] == one[:-1]
    calls = [result[-1] for result in several]
    assert calls[0] == calls[1]  # a process that has nothing left keeps in step
    assert calls[0] < one[-1]
