"""The evaluate stage from a corpus and a model to metrics, examples and thumbnails."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from learning.evaluation.metrics import KS
from stages.base import Job, StageError, Stopped
from stages.evaluate import Config, run
from tests import tiny_model


class Tracker:
    def metrics(self, values: Any, step: int) -> None: ...

    def params(self, values: Any) -> None: ...


class Task:
    def advance(self, n: float = 1, **shown: Any) -> None: ...


class Progress:
    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[Task]:
        yield Task()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    tiny_model.write_corpus(root / "shard" / "out", 23, title='<b onload="alert(1)">title</b>')
    return {"corpus": root / "shard", "weights": tiny_model.write_stage(root / "finetune")}


def job(directory: Path, inputs: dict[str, Path], seed: int = 7, stop: bool = False) -> Job:
    return Job(directory, inputs, Tracker(), Progress(), lambda: stop, seed=seed)


def config(**changed: Any) -> Config:
    values = {
        "galleries": [
            {"name": "by_concept", "split": "test", "relevance": "concept", "texts": ["content"]},
            {"name": "own", "split": "test", "texts": ["captions"], "folds": 5},
        ],
        "batch": 8,
        "examples": 4,
        "top_k": 3,
        "thumbnail_px": 20,
    }
    return Config.model_validate(values | changed)


def test_from_corpus_and_model_to_metrics_examples_and_pictures(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    report = run(config(), job(tmp_path, inputs))
    assert report.counts == {
        "by_concept_images": 23,
        "by_concept_texts": 23,
        "own_images": 23,
        "own_texts": 115,
    }
    for gallery in ("by_concept", "own"):
        for name in [f"{way}_r@{k}" for way in ("i2t", "t2i") for k in KS]:
            assert 0 <= report.metrics[f"eval/{gallery}/{name}"] <= 100
            assert 0 < report.metrics[f"eval/{gallery}/chance_{name}"] <= 100
        assert f"eval/{gallery}/rsum" in report.metrics
    assert report.metrics["eval/by_concept/chance_i2t_r@1"] == pytest.approx(100 * (21 * 3 + 2 * 2) / 23 / 23)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == {"metrics": report.metrics, "counts": report.counts}
    examples = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert list(examples) == ["by_concept", "own"]
    for gallery in examples.values():
        assert [len(gallery[way]) for way in ("t2i", "i2t")] == [4, 4]
        for asked in [*gallery["t2i"], *gallery["i2t"]]:
            assert len(asked["answers"]) == 3
            rights = [answer["right"] for answer in asked["answers"]]
            assert (asked["rank"] <= 3) == any(rights)
            if any(rights):
                assert rights.index(True) + 1 == asked["rank"]
                first = asked["answers"][rights.index(True)]
                assert asked["best_right"].items() <= first.items()
            cosines = [answer["cosine"] for answer in asked["answers"]]
            assert cosines == sorted(cosines, reverse=True)
    shown = examples["own"]["i2t"][0]["query"]["picture"]
    with Image.open(tmp_path / "out" / shown) as picture:
        assert picture.format == "WEBP"
        assert max(picture.size) == 20


def test_the_same_seed_shows_the_same_and_another_seed_changes_no_number(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    first = run(config(), job(tmp_path / "a", inputs))
    again = run(config(), job(tmp_path / "b", inputs))
    other = run(config(), job(tmp_path / "c", inputs, seed=8))
    texts = [(tmp_path / name / "out" / "examples.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert first.metrics == again.metrics == other.metrics


def test_half_a_thumbnail_of_a_killed_run_is_written_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    run(config(), job(tmp_path, inputs))
    pictures = sorted((tmp_path / "out" / "pictures").iterdir())
    whole = pictures[0].read_bytes()
    pictures[0].write_bytes(whole[:20])
    run(config(), job(tmp_path, inputs))
    assert pictures[0].read_bytes() == whole


def test_no_examples_are_wanted(inputs: dict[str, Path], tmp_path: Path) -> None:
    run(config(examples=0), job(tmp_path, inputs))
    assert json.loads((tmp_path / "out" / "examples.json").read_text())["own"]["t2i"] == []


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ({"split": "tset"}, "no split 'tset'; there are: test"),
        ({"relevance": "colour"}, "galleries.x: .*no label 'colour'; there are: concept, vendor"),
        ({"folds": 24}, "galleries.x: folds: 24; allowed: 1 … 23"),
    ],
)
def test_what_a_user_can_mend_is_a_stage_error(
    inputs: dict[str, Path], tmp_path: Path, gallery: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        run(config(galleries=[{"name": "x", "split": "test"} | gallery]), job(tmp_path, inputs))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_damaged_picture_stops_the_stage(inputs: dict[str, Path], tmp_path: Path) -> None:
    corpus = tiny_model.write_corpus(tmp_path / "shard" / "out", 3)
    shard = next(corpus.rglob("*.tar"))
    data = tiny_model.picture_bytes(1)
    shard.write_bytes(shard.read_bytes().replace(data, bytes(len(data))))
    with pytest.raises(StageError, match=rf"{shard.name}: sample test0001"):
        run(config(), job(tmp_path, inputs | {"corpus": tmp_path / "shard"}))


def test_a_model_that_is_not_done(inputs: dict[str, Path], tmp_path: Path) -> None:
    stage = tiny_model.write_stage(tmp_path / "finetune")
    (stage / "DONE.json").unlink()
    with pytest.raises(StageError, match="the stage is not done"):
        run(config(), job(tmp_path, inputs | {"weights": stage}))


def test_it_stops_between_galleries_when_asked(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(config(), job(tmp_path, inputs, stop=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"galleries": []},
        {"galleries": [{"name": "a", "split": "s"}, {"name": "a", "split": "t"}]},
        {"galleries": [{"name": "a/b", "split": "s"}]},
        {"galleries": [{"name": "a", "split": "s", "texts": ["titel"]}]},
        {"batch": 0},
    ],
)
def test_a_wrong_config_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**changed)
