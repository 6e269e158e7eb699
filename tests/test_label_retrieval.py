"""Label-wise retrieval of a split: whose labels count, folds, errors, and the same bits over processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from learning import methods
from learning.evaluation.embed import embed_images, embed_texts
from learning.evaluation.label_retrieval import LabelOutcome, evaluate_labels
from learning.evaluation.label_sets import LabelSetConfig, names_of
from learning.training.split_regions import stacked
from tests import label_case, region_case, tiny_model
from tests.distributed_harness import run_distributed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_case.write_corpus(tmp_path_factory.mktemp("labels"))


def evaluated(corpus: Path, label_set: dict[str, Any] | None = None, **changed: Any) -> LabelOutcome:
    options = {"texts": ["captions"], "batch": 5, "device": CPU, "max_length": 12} | changed
    return evaluate_labels(
        options.pop("method", None) or tiny_model.method(),
        tiny_model.tokenizer(),
        tiny_model.transform(),
        tiny_model.open_corpus(corpus),
        options.pop("texts"),
        LabelSetConfig(**(label_set or {})),
        **options,
    )


def cosines_of(corpus: Path, texts: list[str]) -> np.ndarray:
    """Images × texts, in whole numbers: texts whose words are unknown are equal, and stay so."""
    index = tiny_model.open_corpus(corpus)
    method = tiny_model.method()
    images = embed_images(method, index, tiny_model.transform(), batch=5, device=CPU, max_pixels=10_000)
    read = embed_texts(method, tiny_model.tokenizer(), texts, max_length=12, batch=5, device=CPU)
    return np.round(images.astype(np.float64) * 2**26) @ np.round(read.astype(np.float64) * 2**26).T


def expected(cosines: np.ndarray, images: list[set[str]], texts: list[set[str]]) -> dict[str, float]:
    """The metrics by scikit-learn, query by query."""
    found: dict[str, float] = {}
    for way, scores, asked, answers in (
        ("i2t", cosines, images, texts),
        ("t2i", cosines.T, texts, images),
    ):
        shared = np.array([[len(own & other) for other in answers] for own in asked])
        rows = np.flatnonzero(shared.any(axis=1))
        found[f"{way}_ndcg"] = 100 * ndcg_score(shared[rows], scores[rows])
        each = [average_precision_score(shared[row] > 0, scores[row]) for row in rows]
        found[f"{way}_map"] = 100 * float(np.mean(each))
        found[f"{way}_left_out"] = len(asked) - len(rows)
        is_right = [shared[row] > 0 for row in rows]
        first = [  # a wrong answer of the same score goes before
            scores[row][right].max() > scores[row][~right].max(initial=-np.inf)
            for row, right in zip(rows, is_right, strict=True)
        ]
        found[f"{way}_r@1"] = 100 * float(np.mean(first))
    return found | {name: (found[f"i2t_{name}"] + found[f"t2i_{name}"]) / 2 for name in ("ndcg", "map")}


def test_equals_scikit_learn_and_a_text_of_several_pictures_has_the_labels_of_all(corpus: Path) -> None:
    outcome = evaluated(corpus)
    images = [label_case.labels_of(i) for i in range(24)]
    owned = {text: set() for text in outcome.gallery.texts}
    for number, own in enumerate(images):
        for caption in label_case.captions(number):
            owned[caption["text"]] |= own
    assert owned["two of them"] == {"dog", "frisbee", "cat"}
    assert len(owned) == 25
    assert outcome.names == ("cat", "dog", "frisbee", "ship")
    cosines = cosines_of(corpus, outcome.gallery.texts)
    for name, value in expected(cosines, images, list(owned.values())).items():
        assert outcome.metrics[name] == pytest.approx(value, abs=1e-9), name
    sizes = [outcome.metrics[name] for name in ("images", "texts", "labels", "unlabelled")]
    assert sizes == [24, 25, 4, 3]


def test_only_the_labels_named_count_and_one_that_nobody_has_does_no_harm(corpus: Path) -> None:
    outcome = evaluated(corpus, {"names": ["cat", "ship", "unicorn"]})
    assert (outcome.metrics["labels"], outcome.metrics["unlabelled"]) == (3, 12)
    assert outcome.metrics["i2t_left_out"] == 12  # they stay as wrong answers
    assert outcome.metrics["images"] == 24
    sides = {side.direction: side for side in outcome.sides}
    counted = [i for i in range(24) if label_case.labels_of(i) & {"cat", "ship"}]
    assert np.flatnonzero(sides["i2t"].judged.counted).tolist() == counted
    assert sides["i2t"].judged.answers == 25


def test_fields_are_read_together_and_a_label_may_hold_several(corpus: Path) -> None:
    outcome = evaluated(corpus, {"fields": ["tags"]})
    assert outcome.names == ("a", "b", "c", "z")
    both = evaluated(corpus, {"fields": ["classes", "tags"]})
    assert both.names == ("a", "b", "c", "cat", "dog", "frisbee", "ship", "z")
    third = next(side for side in both.sides if side.direction == "i2t").asked.of_row(3)
    assert [both.names[label] for label in third] == ["a", "c"]  # no classes; "c| a"
    record = {"classes": ["a ", "b", ""], "labels": {"x": "b||c|d"}}
    assert names_of(record, ["x", "classes"]) == ["b", "c", "d", "a"]
    assert names_of({}, ["x", "classes"]) == []


def test_folds_are_galleries_of_their_own(corpus: Path) -> None:
    """A text in two folds has in each the labels of the pictures there."""
    outcome = evaluated(corpus, folds=3)
    whole = outcome.gallery.texts
    assert [len(side.queries) for side in outcome.sides] == [24, 25]
    cosines = cosines_of(corpus, whole)
    parts = []
    for start in (0, 8, 16):
        images = [label_case.labels_of(i) for i in range(start, start + 8)]
        owned: dict[str, set[str]] = {}
        for number, own in enumerate(images, start=start):
            for caption in label_case.captions(number):
                owned.setdefault(caption["text"], set()).update(own)
        columns = [whole.index(text) for text in owned]
        parts.append(expected(cosines[start : start + 8, columns], images, list(owned.values())))
    for name in parts[0]:
        values = [part[name] for part in parts]
        value = sum(values) if name.endswith("left_out") else float(np.mean(values))
        assert outcome.metrics[name] == pytest.approx(value, abs=1e-9), name


def test_one_direction_a_cut_and_the_other_gain(corpus: Path) -> None:
    outcome = evaluated(corpus, directions=["t2i"], cut=3, gain="exponential")
    assert outcome.metrics["ndcg@3"] == outcome.metrics["t2i_ndcg@3"]
    assert {"map@3", "chance_t2i_map@3", "t2i_r@5", "r@m", "chance_r@m"} <= set(outcome.metrics)
    assert not [name for name in outcome.metrics if "i2t" in name or name in ("ndcg", "map", "rsum")]
    linear = evaluated(corpus, directions=["t2i"], cut=3)
    assert linear.metrics["ndcg@3"] != outcome.metrics["ndcg@3"]
    assert linear.metrics["map@3"] == outcome.metrics["map@3"]


def test_regions_are_read_in_place_of_pictures(corpus: Path, tmp_path: Path) -> None:
    region_case.plug_in()
    try:
        torch.manual_seed(3)
        config = methods.parse_config(region_case.MODEL)
        method = methods.build(config, ("ccl",), tiny_model.tokenizer().vocabulary_size)
        store = region_case.write_store(tmp_path / "out", corpus)
        outcome = evaluated(corpus, method=method, regions=store, directions=["i2t"])
    finally:
        region_case.plug_out()
    rows = [region_case.regions_of(key) for key in tiny_model.open_corpus(corpus).keys]
    expected = method.embed_regions(stacked(rows)).detach().numpy()  # type: ignore[attr-defined]
    assert np.allclose(outcome.sides[0].queries, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("label_set", "changed", "message"),
    [
        (
            {"fields": ["colour"]},
            {},
            "label_set.fields: .*no label 'colour'; there are: concept, tags; or cl",
        ),
        (
            {"names": ["ox"]},
            {},
            "label_set.names: no sample has one of ox; there are: cat, dog, frisbee, ship",
        ),
        ({}, {"folds": 25}, "folds: 25; allowed: 1 … 24"),
        ({}, {"texts": ["content"], "folds": 24}, "no query of i2t shares a label with any answer"),
    ],
)
def test_what_cannot_be_measured_is_named(
    corpus: Path, label_set: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluated(corpus, label_set, **changed)


def test_a_corpus_without_classes_is_told(tmp_path: Path) -> None:
    tiny_model.write_corpus(tmp_path / "corpus", 3)
    with pytest.raises(ValueError, match=r"label_set\.fields: no sample has a label in classes"):
        evaluated(tmp_path / "corpus")


def _evaluate_in(rank: int, world: int, corpus: str) -> list[Any]:
    values: list[Any] = []
    for changed in ({}, {"folds": 2, "cut": 4, "gain": "exponential"}):
        outcome = evaluated(Path(corpus), **changed)
        values.append(json.dumps(outcome.metrics))
        values += [side.judged.ndcg.tobytes().hex() for side in outcome.sides]
    return values


@pytest.mark.slow
def test_the_same_bits_whatever_the_processes(corpus: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _evaluate_in(0, 1, str(corpus))
    finally:
        torch.set_num_threads(threads)
    assert run_distributed(_evaluate_in, 2, str(corpus)) == [one, one]
