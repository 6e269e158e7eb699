"""Re-ranked and matching galleries: from the evaluate stage to tables and report; and in validation."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from pipeline import report, tables
from pipeline.results import RunView, StageRun
from stages import evaluate, pretrain
from stages.base import Report, StageError
from tests import pair_case, tiny_model
from tests.test_evaluate import job
from tests.test_report import Page
from tests.training_case import config_values, make_job

LABELS = ["1", "0", "1", "1", "0", "0", "1", "0", "0", "1", "1"]
RERANKED = {
    "name": "reranked",
    "split": "test",
    "texts": ["captions"],
    "rerank": {"top_k": 4, "batch": 5, "score": "match"},
}
MATCHING = {"name": "icm", "split": "test", "task": "matching", "texts": ["captions"]}


@pytest.fixture(autouse=True)
def plugged() -> Iterator[None]:
    pair_case.plug_in()
    yield
    pair_case.plug_out()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    pair_case.write_matching_corpus(root / "benchmark" / "out", LABELS)
    pair_case.plug_in()
    weights = pair_case.write_stage(root / "finetune")
    pair_case.plug_out()
    return {"corpus": root / "benchmark", "weights": weights}


def config(*galleries: dict[str, Any], **changed: Any) -> evaluate.Config:
    values = {"galleries": list(galleries), "batch": 4, "examples": 5, "top_k": 6, "thumbnail_px": 20}
    return evaluate.Config.model_validate(values | changed)


def finished(directory: Path, report_: Report) -> RunView:
    """The run as the report and the tables see it."""
    done = {"metrics": report_.metrics, "counts": report_.counts, "seconds": 1.0, "finished_at": "now"}
    stage = StageRun("evaluate", "evaluate", directory, done)
    return RunView("pairs", Path("pairs.yaml"), directory.parent, [stage], None)


def printed(table: Any) -> str:
    console = Console(width=250, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_reranked_gallery_shows_its_answers_in_the_new_order(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made = evaluate.run(config(RERANKED, RERANKED | {"name": "plain", "rerank": None}), job(tmp_path, inputs))
    for name in ("i2t_r@1", "t2i_r@10", "rsum", "r@m", "t2i_median_rank"):
        plain = made.metrics[f"eval/plain/{name}"]
        assert made.metrics[f"eval/reranked/cosine_{name}"] == plain
        assert f"eval/reranked/{name}" in made.metrics
    assert 0 < made.metrics["eval/reranked/ceiling_t2i"] <= 100
    shown = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert shown["reranked"]["rerank"] == {"top_k": 4, "score": "match"}
    assert "rerank" not in shown["plain"]
    orders = {name: [] for name in shown}
    for asked in [*shown["reranked"]["t2i"], *shown["reranked"]["i2t"]]:
        answers = asked["answers"]
        assert len(answers) == 6
        matches = [answer["match"] for answer in answers[:4]]
        assert matches == sorted(matches, reverse=True)
        assert not any("match" in answer for answer in answers[4:])  # behind the candidates, by cosine
        behind = [answer["cosine"] for answer in answers[4:]]
        assert behind == sorted(behind, reverse=True)
        assert max(behind) <= min(answer["cosine"] for answer in answers[:4])
        rights = [answer["right"] for answer in answers]
        assert (asked["rank"] <= 6) == any(rights)
        if any(rights):
            assert rights.index(True) + 1 == asked["rank"]
            first = answers[rights.index(True)]
            assert asked["best_right"].items() <= first.items()
        named = {answer.get("key", answer.get("text")) for answer in answers}
        assert len(named) == 6
    for name, gallery in shown.items():
        for asked in gallery["t2i"]:
            orders[name].append([answer["key"] for answer in asked["answers"]])
    assert orders["reranked"] != orders["plain"]

    run = finished(tmp_path, made)
    words = Page(report.render(run)).words()
    ceilings = [made.metrics[f"eval/reranked/ceiling_{way}"] for way in ("i2t", "t2i")]
    told = f"{ceilings[0]:.1f} % (i2t), {ceilings[1]:.1f} % (t2i)"
    assert f"reranked 11 images, 12 texts; re-ranked: a right one is a candidate for {told}" in words
    assert "reranked, by cosine before re-ranking" in words
    first = shown["reranked"]["t2i"][0]["answers"][0]
    assert f"match {first['match']:.2f}, cosine {first['cosine']:.2f}" in words
    table = printed(tables.of_recalls(made.metrics, "results"))
    assert "reranked, by cosine" in table
    assert "ceiling_i2t" in table


def test_a_matching_gallery_gives_its_auc(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = evaluate.run(
        config(MATCHING, MATCHING | {"name": "by_cosine", "match_by": "cosine"}), job(tmp_path, inputs)
    )
    assert set(made.metrics) == {"eval/icm/auc", "eval/by_cosine/auc"}
    assert made.counts == {
        "icm_positives": 6,
        "icm_negatives": 5,
        "by_cosine_positives": 6,
        "by_cosine_negatives": 5,
    }
    shown = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert (shown["icm"]["score"], shown["by_cosine"]["score"]) == ("match", "cosine")
    assert len(shown["icm"]["pairs"]) == 5
    scores = [pair["score"] for pair in shown["icm"]["pairs"]]
    assert scores == sorted(scores, reverse=True)
    for pair in shown["icm"]["pairs"]:
        number = int(pair["key"][-4:])
        assert pair["text"] == f"red thing {number}"
        assert pair["right"] == (LABELS[number] == "1")
        assert (tmp_path / "out" / pair["picture"]).exists()

    words = Page(report.render(finished(tmp_path, made))).words()
    assert f"icm {made.metrics['eval/icm/auc']:.1f} 6 5" in words
    assert "icm: match or no match" in words
    assert f"match {scores[0]:.2f}" in words
    assert "image → text" not in words
    assert "auc" in printed(tables.of_recalls(made.metrics, "results"))


def test_a_gallery_of_one_direction(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = evaluate.run(config(RERANKED | {"directions": ["t2i"]}), job(tmp_path, inputs))
    assert not [name for name in made.metrics if "i2t" in name or "rsum" in name]
    assert "eval/reranked/cosine_r@m" in made.metrics
    shown = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert "i2t" not in shown["reranked"]
    words = Page(report.render(finished(tmp_path, made))).words()
    assert "reranked: text → image" in words
    assert "reranked: image → text" not in words


@pytest.mark.parametrize("gallery", [RERANKED, MATCHING | {"match_by": "pairs"}])
def test_a_method_that_judges_no_pairs_is_told_before_anything_is_embedded(
    inputs: dict[str, Path], tmp_path: Path, gallery: dict[str, Any]
) -> None:
    weights = tiny_model.write_stage(tmp_path / "clip")
    field = "rerank" if "rerank" in gallery else "match_by"
    first = {"name": "first", "split": "test", "relevance": "colour"}  # would fail, were it looked at
    message = (
        rf"galleries.{gallery['name']}.{field}: Clip embeds .* leave the field out, or give a method that"
    )
    with pytest.raises(StageError, match=message):
        evaluate.run(config(first, gallery), job(tmp_path / "evaluate", inputs | {"weights": weights}))


def test_a_matching_gallery_of_another_corpus_is_a_stage_error(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    tiny_model.write_corpus(tmp_path / "shard" / "out", 3)
    with pytest.raises(StageError, match=r"galleries.icm: .*no label 'match'; there are: concept, vendor"):
        evaluate.run(config(MATCHING), job(tmp_path / "evaluate", inputs | {"corpus": tmp_path / "shard"}))


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ({"task": "matching", "rerank": {"top_k": 3}}, "rerank: says nothing in task matching"),
        ({"task": "matching", "relevance": "concept"}, "relevance: says nothing in task matching"),
        ({"task": "matching", "directions": ["t2i"]}, "directions: says nothing"),
        ({"task": "matching", "folds": 5}, "folds: says nothing in task matching"),
        ({"label": "match"}, "label: says nothing in task retrieval; leave it out, or set task: matching"),
        ({"match_by": "cosine"}, "match_by: says nothing in task retrieval"),
        ({"directions": ["t2i", "t2i"]}, "directions: t2i stands twice"),
        ({"directions": []}, "directions"),
        ({"rerank": {"top_k": 0}}, "top_k"),
        ({"rerank": {"score": "mach"}}, "score"),
        ({"task": "match"}, "task"),
    ],
)
def test_a_wrong_gallery_is_refused(gallery: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config({"name": "x", "split": "test"} | gallery)


# ------------------------------------------------------------------------------------------- validation


def training(**changed: Any) -> dict[str, Any]:
    return config_values(
        model=pair_case.MODEL, losses={"ccl": 1.0}, epochs=2, data={"texts": ["captions"]}, **changed
    )


def test_training_picks_its_best_weights_by_auc(tmp_path: Path) -> None:
    corpus = pair_case.write_matching_corpus(tmp_path / "benchmark/out", LABELS, ("train", "val"))
    validation = {"split": "val", "task": "matching", "label": "match", "texts": ["captions"], "batch": 4}
    values = training(validate=validation, pick_best="val/auc")
    made = pretrain.run(pretrain.Config(**values), make_job(tmp_path / "a", corpus))
    assert 0 <= made.metrics["val/auc"] <= made.metrics["best/val/auc"] <= 100
    assert made.metrics["val/positives"] == 6
    assert "val/rsum" not in made.metrics


def test_validation_reranks(tmp_path: Path) -> None:
    corpus = pair_case.write_matching_corpus(tmp_path / "benchmark/out", LABELS, ("train", "val"))
    validation = {"split": "val", "texts": ["captions"], "rerank": {"top_k": 3}, "directions": ["t2i"]}
    values = training(validate=validation, pick_best="val/r@m")
    made = pretrain.run(pretrain.Config(**values), make_job(tmp_path / "a", corpus))
    assert {"val/t2i_r@1", "val/cosine_t2i_r@1", "val/ceiling_t2i", "val/cosine_r@m"} <= set(made.metrics)
    assert not [name for name in made.metrics if "i2t" in name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model": tiny_model.MODEL, "validate": {"rerank": {"top_k": 3}}},
            "validate.rerank: Clip embeds pictures and texts apart",
        ),
        (
            {"model": tiny_model.MODEL, "validate": {"task": "matching", "match_by": "pairs"}},
            "validate.match_by: Clip embeds",
        ),
        (
            {"validate": {"task": "matching"}, "pick_best": "val/rsum"},
            "'val/rsum' is no metric of .*say val/auc",
        ),
        ({"validate": {}, "pick_best": "val/auc"}, "'val/auc' is no metric of .*say val/r@m"),
        ({"validate": {"directions": ["t2i"]}, "pick_best": "val/rsum"}, "'val/rsum' is no metric"),
        ({"validate": {"directions": ["t2i"]}, "pick_best": "val/i2t_r@1"}, "'val/i2t_r@1' is no metric"),
        ({"validate": {}, "pick_best": "val/cosine_rsum"}, "'val/cosine_rsum' is no metric"),
    ],
)
def test_a_validation_that_cannot_be_is_refused_before_training(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        pretrain.Config(**(training() | changed))
