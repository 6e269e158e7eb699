"""Matching: AUC against an O(n²) count, labels that cannot be used, each sample once over any processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.shards import CorpusError
from learning.evaluation.embed import embed_images, embed_texts
from learning.evaluation.matching import Matched, area_under_curve, evaluate_matching
from learning.evaluation.pairs import PairScorer
from tests import pair_case, tiny_model
from tests.distributed_harness import run_distributed

CPU = torch.device("cpu")
LABELS = ["1", "0", "1", "1", "0", "0", "1", "0", "0", "1", "1"]  # 11: batches of 4 leave a short block


@pytest.fixture(autouse=True)
def plugged() -> Iterator[None]:
    pair_case.plug_in()
    yield
    pair_case.plug_out()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_case.write_matching_corpus(tmp_path_factory.mktemp("corpus"), LABELS)


def matched(corpus: Path, **changed: Any) -> Matched:
    options = {"batch": 4, "device": CPU, "max_length": 12, "label": "match", "texts": ["captions"]} | changed
    return evaluate_matching(
        options.pop("method", None) or pair_case.method(),
        tiny_model.tokenizer(),
        tiny_model.transform(),
        tiny_model.open_corpus(corpus),
        options.pop("texts"),
        **options,
    )


def counted_auc(scores: list[float], labels: list[bool]) -> float:
    """The share of (match, no match) in order, a tie half a one: every pair looked at."""
    above = [s for s, match in zip(scores, labels, strict=True) if match]
    below = [s for s, match in zip(scores, labels, strict=True) if not match]
    points = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
    return 100 * points / (len(above) * len(below))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_the_count_of_all_pairs(rows: list[tuple[int, bool]]) -> None:
    rows = [*rows, (3, True), (3, False)]
    scores, labels = [score / 7 for score, _ in rows], [label for _, label in rows]
    found = area_under_curve(np.array(scores), np.array(labels))
    assert found["auc"] == pytest.approx(counted_auc(scores, labels))
    assert (found["positives"], found["negatives"]) == (sum(labels), len(labels) - sum(labels))


def test_known_auc() -> None:
    labels = np.array([True, True, False, False])
    assert area_under_curve(np.array([0.9, 0.8, 0.2, 0.1]), labels)["auc"] == 100.0
    assert area_under_curve(np.array([0.9, 0.1, 0.2, 0.1]), labels)["auc"] == 62.5
    assert area_under_curve(np.zeros(4), labels)["auc"] == 50.0


def test_each_picture_is_judged_with_its_own_first_text(corpus: Path) -> None:
    outcome = matched(corpus)
    assert outcome.by == "pairs"
    assert outcome.texts == [f"red thing {number}" for number in range(11)]
    assert outcome.is_match.tolist() == [label == "1" for label in LABELS]
    index = tiny_model.open_corpus(corpus)
    scorer = PairScorer(
        pair_case.method(), tiny_model.tokenizer(), tiny_model.transform(), index, 1, CPU, 12, 10_000
    )
    alone = scorer(np.arange(11), np.arange(11), outcome.texts)
    assert np.allclose(outcome.scores, alone, atol=1e-6)
    assert len(set(np.round(alone, 5))) == 11
    assert outcome.metrics["auc"] == pytest.approx(counted_auc(alone.tolist(), outcome.is_match.tolist()))
    assert (outcome.metrics["positives"], outcome.metrics["negatives"]) == (6, 5)


@pytest.mark.parametrize("method", ["paired by cosine", "one that judges no pairs"])
def test_by_cosine(corpus: Path, method: str) -> None:
    own = pair_case.method() if method == "paired by cosine" else tiny_model.method()
    outcome = matched(corpus, method=own, by="cosine" if method == "paired by cosine" else None)
    assert outcome.by == "cosine"
    index = tiny_model.open_corpus(corpus)
    images = embed_images(own, index, tiny_model.transform(), batch=4, device=CPU, max_pixels=10_000)
    texts = embed_texts(own, tiny_model.tokenizer(), outcome.texts, max_length=12, batch=4, device=CPU)
    assert np.allclose(outcome.scores, (images * texts).sum(axis=1), atol=1e-6)
    assert outcome.metrics["auc"] == pytest.approx(
        counted_auc(outcome.scores.tolist(), outcome.is_match.tolist())
    )


def test_pairs_from_a_method_that_judges_none_are_an_error(corpus: Path) -> None:
    with pytest.raises(ValueError, match="Clip embeds pictures and texts apart"):
        matched(corpus, method=tiny_model.method(), by="pairs")


@pytest.mark.parametrize(
    ("labels", "changed", "message"),
    [
        (LABELS, {"label": "matches"}, "no label 'matches'; there are: concept, match"),
        (["1", "0", "2"], {}, "sample 'test0002' has the label 'match' '2'; it must be '1'"),
        (["1", "", "0"], {}, "sample 'test0001' has the label 'match' ''"),
        (["1", "1"], {}, "every sample has the label 'match' '1'; an AUC needs matches and others"),
        (["0", "0"], {}, "every sample has the label 'match' '0'"),
        (LABELS, {"texts": ["title", "content"]}, "sample 'test0000' has no title and no content to match"),
    ],
)
def test_what_cannot_be_measured_is_named(
    tmp_path: Path, labels: list[str], changed: dict[str, Any], message: str
) -> None:
    corpus = pair_case.write_matching_corpus(tmp_path / "corpus", labels)
    with pytest.raises((ValueError, CorpusError), match=message):
        matched(corpus, **changed)


def _match_in(rank: int, world: int, corpus: str) -> list[Any]:
    pair_case.plug_in()
    values: list[Any] = []
    for by in ("pairs", "cosine"):
        outcome = matched(Path(corpus), by=by)
        values += [json.dumps(outcome.metrics), outcome.scores.tobytes().hex(), len(outcome.scores)]
    return values


@pytest.mark.slow
def test_every_sample_counts_once_whatever_the_processes(corpus: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _match_in(0, 1, str(corpus))
    finally:
        torch.set_num_threads(threads)
    assert one[2] == len(LABELS)
    assert run_distributed(_match_in, 2, str(corpus)) == [one, one]
