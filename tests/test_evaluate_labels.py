"""Label-wise galleries: from the evaluate stage to tables and report; and in validation."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import report, tables
from stages import evaluate, pretrain
from stages.base import StageError
from tests import label_case, tiny_model
from tests.test_evaluate import job
from tests.test_evaluate_pairs import config, finished, printed
from tests.test_report import Page
from tests.training_case import config_values, make_job


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    label_case.write_corpus(root / "shard" / "out")
    return {"corpus": root / "shard", "weights": tiny_model.write_stage(root / "finetune")}


def test_from_corpus_and_model_to_metrics_examples_and_report(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    tags = {"label_set": {"fields": ["tags"], "names": ["a", "c"]}, "gain": "exponential", "cut": 5}
    galleries = [label_case.gallery(), label_case.gallery("tags", folds=2, **tags)]
    made = evaluate.run(config(*galleries), job(tmp_path, inputs))
    for name in ("i2t_ndcg", "t2i_map", "ndcg", "map", "i2t_r@1", "rsum"):
        assert 0 <= made.metrics[f"eval/by_labels/{name}"] <= (600 if name == "rsum" else 100)
    assert {"eval/tags/ndcg@5", "eval/tags/chance_i2t_map@5"} <= set(made.metrics)
    assert "eval/tags/ndcg" not in made.metrics
    assert made.counts == {
        "by_labels_images": 24,
        "by_labels_texts": 25,
        "by_labels_labels": 4,
        "by_labels_unlabelled": 3,
        "by_labels_i2t_left_out": 3,
        "by_labels_t2i_left_out": 3,
        "tags_images": 24,
        "tags_texts": 25,
        "tags_labels": 2,
        "tags_unlabelled": 15,
        "tags_i2t_left_out": 15,
        "tags_t2i_left_out": 16,
    }

    shown = json.loads((tmp_path / "out" / "examples.json").read_text())
    asked = shown["by_labels"]
    assert (asked["task"], asked["fields"], asked["gain"], asked["cut"]) == (
        "labels",
        ["classes"],
        "linear",
        None,
    )
    assert [len(asked[way]) for way in ("t2i", "i2t")] == [5, 5]
    for query in asked["i2t"]:
        own = label_case.labels_of(int(query["query"]["key"][-4:]))
        assert set(query["labels"]) == own
        assert own  # a picture without labels is no query
    for query in asked["t2i"]:
        for answer in query["answers"]:
            shared = label_case.labels_of(int(answer["key"][-4:])) & set(query["labels"])
            assert set(answer["shared"]) == shared
            assert answer["right"] == bool(shared)
    for query in [*asked["t2i"], *asked["i2t"]]:
        rights = [answer["right"] for answer in query["answers"]]
        assert len(rights) == 6
        assert (query["rank"] <= 6) == any(rights)
        if any(rights):
            assert rights.index(True) + 1 == query["rank"]
            assert query["best_right"].items() <= query["answers"][rights.index(True)].items()

    run = finished(tmp_path, made)
    words = Page(report.render(run)).words()
    ndcg = [
        report.percent(made.metrics[f"eval/by_labels/{chance}{way}ndcg"])
        for way in ("i2t_", "t2i_", "")
        for chance in ("", "chance_")
    ]
    remark = "4 labels (classes); 3 queries (i2t) have no right answer; 3 queries (t2i) have no right answer"
    assert f"by_labels {remark} {' '.join(ndcg)}" in words
    assert "2 labels (tags); gain exponential; the first 5;" in words
    assert "24 images, 25 texts; right: one shared label" in words
    assert f"{', '.join(asked['t2i'][0]['labels'])}; NDCG {asked['t2i'][0]['ndcg']:.1f}" in words
    table = printed(tables.of_labels(made.metrics, "results"))
    assert "by_labels, by chance" in table
    assert table.count("ndcg@5") == 3
    recalls = printed(tables.of_recalls(made.metrics, "results"))
    assert "i2t_r@1" in recalls
    assert "ndcg" not in recalls
    assert tables.of_labels({"eval/a/i2t_r@1": 3.0}, "results") is None


def test_names_of_labels_in_the_report_are_escaped(tmp_path: Path) -> None:
    corpus = tmp_path / "shard" / "out"
    hostile = "<script>document.title='pwned'</script>"
    tiny_model.write_corpus(corpus, 4, classes=[hostile])
    inputs = {"corpus": tmp_path / "shard", "weights": tiny_model.write_stage(tmp_path / "finetune")}
    made = evaluate.run(config(label_case.gallery()), job(tmp_path / "evaluate", inputs))
    page = report.render(finished(tmp_path / "evaluate", made))
    assert hostile not in page
    assert "&lt;script&gt;document.title" in page


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (
            {"label_set": {"fields": ["tag"]}},
            r"galleries.by_labels: label_set.fields: .*there are: concept, t",
        ),
        ({"label_set": {"names": ["ox"]}}, r"galleries.by_labels: label_set.names: no sample has one of ox"),
        ({"texts": ["title"], "folds": 25}, "folds: 25"),
    ],
)
def test_what_a_user_can_mend_is_a_stage_error(
    inputs: dict[str, Path], tmp_path: Path, gallery: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        evaluate.run(config(label_case.gallery() | gallery), job(tmp_path, inputs))


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (
            {"rerank": {"top_k": 3}},
            "rerank: says nothing in task labels; leave it out, or set task: retrieval",
        ),
        ({"relevance": "concept"}, "relevance: says nothing in task labels"),
        ({"label": "match"}, "label: says nothing in task labels; leave it out, or set task: matching"),
        (
            {"task": "retrieval", "cut": 3},
            "cut: says nothing in task retrieval; leave it out, or set task: lab",
        ),
        ({"task": "matching", "gain": "exponential"}, "gain: says nothing in task matching"),
        ({"task": "retrieval", "label_set": {}}, "label_set: says nothing in task retrieval"),
        ({"task": "matching", "folds": 2}, "folds: .* set task: retrieval or labels"),
        ({"cut": 0}, "cut"),
        ({"gain": "quadratic"}, "gain"),
        ({"label_set": {"fields": []}}, "label_set.fields"),
        ({"label_set": {"names": ["a", "a"]}}, "'a' stands twice"),
        ({"label_set": {"field": ["classes"]}}, "label_set.field"),
    ],
)
def test_a_wrong_gallery_is_refused(gallery: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(label_case.gallery() | gallery)


# ------------------------------------------------------------------------------------------- validation


def training(**changed: Any) -> dict[str, Any]:
    return config_values(losses={"ccl": 1.0}, epochs=2, data={"texts": ["captions"]}, **changed)


def validation(**changed: Any) -> dict[str, Any]:
    found = label_case.gallery(split="train", **changed)
    return {name: value for name, value in found.items() if name != "name"}


def test_training_picks_its_best_weights_by_ndcg(tmp_path: Path) -> None:
    corpus = label_case.write_corpus(tmp_path / "shard/out", ["train"])
    values = training(validate=validation(batch=8), pick_best="val/ndcg")
    made = pretrain.run(pretrain.Config(**values), make_job(tmp_path / "a", corpus))
    assert 0 < made.metrics["val/ndcg"] <= made.metrics["best/val/ndcg"] <= 100
    assert made.metrics["val/i2t_left_out"] == 3
    assert made.metrics["val/ndcg"] == pytest.approx(
        (made.metrics["val/i2t_ndcg"] + made.metrics["val/t2i_ndcg"]) / 2
    )


@pytest.mark.parametrize(
    ("validate", "pick_best", "message"),
    [
        (validation(), "val/auc", "'val/auc' is no metric of .*say val/ndcg"),
        (validation(), "val/ndcg@5", r"'val/ndcg@5' is no metric of .*say val/ndcg \["),
        (validation(cut=5), "val/ndcg", "'val/ndcg' is no metric of .*say val/ndcg@5"),
        (validation(directions=["t2i"]), "val/i2t_map", "'val/i2t_map' is no metric"),
        ({"task": "retrieval"}, "val/ndcg", "'val/ndcg' is no metric of .*say val/r@m"),
        ({"task": "retrieval"}, "val/i2t_left_out", "'val/i2t_left_out' is no metric"),
        ({"task": "matching"}, "val/map", "'val/map' is no metric of .*say val/auc"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_before_training(
    validate: dict[str, Any], pick_best: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        pretrain.Config(**training(validate=validate, pick_best=pick_best))


@pytest.mark.parametrize(
    ("validate", "pick_best"),
    [
        (validation(), "val/map"),
        (validation(cut=5), "val/i2t_ndcg@5"),
        (validation(directions=["t2i"]), "val/ndcg"),
        (validation(), "val/rsum"),
    ],
)
def test_a_metric_that_can_be_is_taken(validate: dict[str, Any], pick_best: str) -> None:
    assert pretrain.Config(**training(validate=validate, pick_best=pick_best)).pick_best == pick_best
