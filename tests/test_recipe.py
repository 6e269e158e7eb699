"""Recipes: merging, and that each mistake is named with its place, field, value and what is allowed."""

import json
from pathlib import Path

import pytest

from pipeline.recipe import load, schema
from stages.base import StageError
from tests.pipeline_harness import TINY, write_recipe


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(StageError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        # misspelt keys, at three depths
        ("seed: 7", "sede: 7", ["tiny.yaml:3: sede: unknown key", "value is 7", "did you mean 'seed'?"]),
        (
            "epochs: 2",
            "epoch: 2",
            ["tiny.yaml:8: stages.train.epoch: unknown key", "did you mean 'epochs'?", "step_s"],
        ),
        (
            "epochs: 2",
            "schedule: {nmae: step}",
            ["stages.train.schedule.nmae: unknown key", "did you mean 'name'?", "allowed: name, warmup"],
        ),
        # wrong types and values
        ("epochs: 2", "epochs: twelve", ["stages.train.epochs: 'twelve': it should be a valid integer"]),
        ("epochs: 2", "epochs: 0", ["stages.train.epochs: 0: it should be greater than or equal to 1"]),
        (
            "epochs: 2",
            "schedule: {name: stpe}",
            ["stages.train.schedule.name: 'stpe' is not allowed; did you mean 'step'?", "'cosine'"],
        ),
        (
            "epochs: 2",
            "losses: {ccl: much}",
            ["stages.train.losses.ccl: 'much': it should be a valid number"],
        ),
        ("processes: 2", "processes: 0", ["tiny.yaml:4: launch.processes: 0: it should be greater"]),
        ("name: tiny", "name: ../tiny", ["name: '../tiny'"]),
        ("name: tiny", "", ["name: missing"]),
        # kinds
        (
            "kind: tests.tiny.numbers",
            "kind: filtr",
            ["tiny.yaml:7: stages.numbers.kind:", "'filtr' is unknown", "did you mean 'filter'?", "evaluate"],
        ),
        (
            "kind: tests.tiny.numbers, ",
            "",
            ["tiny.yaml:7: stages.numbers.kind: missing; allowed: filter, ingest, crawl"],
        ),
        ("tests.tiny.numbers", "tests.tiny.nothing", ["no module 'tests.tiny.nothing' can be imported"]),
        ("tests.tiny.numbers", "tests.tiny", ["'tests.tiny' has no `Config`"]),
        # inputs: no such stage, a later one, itself, a circle, a misspelt role, a missing one
        (
            "{numbers: numbers}",
            "{numbers: nubmers}",
            ["stages.train.inputs.numbers: 'nubmers' is not a stage", "did you mean 'numbers'?"],
        ),
        (
            "{numbers: numbers}",
            "{numbers: later}",
            ["stages.train.inputs.numbers: stage 'later' stands after 'train'; move 'later' before it"],
        ),
        (
            "{numbers: numbers}",
            "{numbers: train}",
            ["stages.train.inputs.numbers: stage 'train' reads itself"],
        ),
        ("{numbers: numbers}", "{numbers: tune}", ["'tune' and 'train' read each other in a circle"]),
        (
            "inputs: {numbers: numbers}, epochs: 2",
            "inputs: {number: numbers}",
            [
                "stages.train.inputs.number: unknown input",
                "did you mean 'numbers'?",
                "allowed: numbers, weights",
            ],
        ),
        ("inputs: {numbers: numbers}, epochs: 2", "epochs: 2", ["stages.train.inputs.numbers: missing;"]),
        # the file itself
        ("name: tiny", "name: [tiny", ["tiny.yaml:3: not valid YAML"]),
        ("seed: 7", "seed: 7\nseed: 8", ["not valid YAML: found duplicate key seed"]),
        ("seed: 7", "seed: ${nothing.here}", ["tiny.yaml: seed: Interpolation key 'nothing.here' not found"]),
        ("seed: 7", "seed: ???", ["tiny.yaml: seed: Missing mandatory value"]),
    ],
)
def test_each_mistake_has_its_message(tmp_path: Path, before: str, after: str, parts: list[str]) -> None:
    text = TINY + "  later: {kind: tests.tiny.numbers}\n"
    assert before in text
    found = message(write_recipe(tmp_path, text.replace(before, after, 1)))
    for part in parts:
        assert part in found, found
    assert "tiny.yaml" in found


def test_all_mistakes_of_a_stage_are_told_at_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, TINY.replace("epochs: 2", "epochs: no, step_s: soon"))
    assert message(path).count("stages.train.") == 2


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    assert "no such file; did you mean 'tiny.yaml'?; recipes in" in message(tmp_path / "tinny.yaml")
    assert "a recipe is a mapping" in message(write_recipe(tmp_path, "just words", "words.yaml"))
    assert "a recipe is a mapping" in message(write_recipe(tmp_path, "", "empty.yaml"))
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    assert "latin.yaml: not UTF-8 at byte 9" in message(tmp_path / "latin.yaml")


def test_interpolation_names_where_the_value_was_written(tmp_path: Path) -> None:
    text = TINY.replace("stages:", "model: {name: stpe}\nstages:").replace(
        "epochs: 2", 'schedule: "${model}"'
    )
    found = message(write_recipe(tmp_path, text))
    assert "tiny.yaml:6: stages.train.schedule.name (written as model.name): 'stpe' is not allowed" in found


def test_extends_merges_and_null_leaves_out(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    changed = "extends: tiny.yaml\nstages:\n  train: {epochs: 5}\n  tune: null\n"
    recipe = load(write_recipe(tmp_path, changed, "changed.yaml"))
    assert recipe.name == "tiny"
    assert list(recipe.stages) == ["numbers", "train"]
    assert recipe.stages["train"].model_dump()["epochs"] == 5
    left_out = write_recipe(tmp_path, "extends: tiny.yaml\nstages: {train: null}\n", "left_out.yaml")
    assert "'train' is not a stage of this recipe (it is set to null)" in message(left_out)
    wrong = write_recipe(tmp_path, "extends: tiny.yaml\nstages: {train: {epochs: x}}\n", "wrong.yaml")
    assert "wrong.yaml:2: stages.train.epochs: 'x'" in message(wrong)  # not tiny.yaml
    base_wrong = write_recipe(tmp_path, TINY.replace("epochs: 2", "epochs: y"), "tiny.yaml")
    assert f"{base_wrong}:8: stages.train.epochs: 'y'" in message(
        write_recipe(tmp_path, "extends: tiny.yaml\n", "on_top.yaml")
    )


def test_extends_mistakes(tmp_path: Path) -> None:
    write_recipe(tmp_path, "extends: b.yaml\n", "a.yaml")
    write_recipe(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "in a circle: a.yaml → b.yaml → a.yaml" in message(tmp_path / "a.yaml")
    assert "extends: 'bb.yaml' is no file; did you mean 'b.yaml'?" in message(
        write_recipe(tmp_path, "extends: bb.yaml\n", "c.yaml")
    )


def test_set_changes_values_with_their_types(tmp_path: Path) -> None:
    recipe = load(
        write_recipe(tmp_path),
        ["stages.train.epochs=5", "stages.train.schedule.name=cosine", "stages.tune.step_s=1e-3", "seed=9"],
    )
    train, tune = recipe.stages["train"].model_dump(), recipe.stages["tune"].model_dump()
    assert (train["epochs"], train["schedule"]["name"], tune["step_s"]) == (5, "cosine", 0.001)
    assert recipe.head.seed == 9
    off = load(recipe.path, ["tracking.uri=off"])  # YAML reads a bare off as false
    assert off.head.tracking.uri == "off"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stages.train.epcohs=5", "--set stages.train.epcohs=5: stages.train.epcohs: unknown key"),
        ("stages.trian.epochs=5", "there is no stage 'trian'; did you mean 'train'?"),
        ("stages.train.epochs=many", "--set stages.train.epochs=many: stages.train.epochs: 'many'"),
        ("stages.train.schedule.nmae=step", "did you mean 'name'?"),
        ("lanch.processes=4", "lanch: unknown key"),
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("seed.deep=3", "seed: {'deep': 3}: it should be a valid integer"),
        ("seed=[1", "--set seed=[1:"),
    ],
)
def test_set_mistakes(tmp_path: Path, override: str, part: str) -> None:
    assert part in message(write_recipe(tmp_path), override)


def test_until_validates_only_what_is_needed(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, TINY.replace("epochs: 1", "epochs: no"))
    assert list(load(path, until="train").stages) == ["numbers", "train"]
    assert "stages.tune.epochs" in message(path)


def test_schema_knows_every_kind() -> None:
    text = json.dumps(schema())
    for kind in ("filter", "ingest", "crawl", "shard", "benchmark", "pretrain", "finetune", "evaluate"):
        assert f'"#/$defs/{kind}"' in text
    assert '"contrastive_batch"' in text


def test_a_method_and_its_fields(tmp_path: Path) -> None:
    """Through the real pretrain stage: unknown method, misspelt field of it, wrong type, unknown loss."""
    text = """
name: real
model:
  method: clip
  vision: {name: resnet10t, image_px: 64}
  text: {layers: 1, width: 32, heads: 2, intermediate: 64}
stages:
  shard: {kind: tests.tiny.numbers}
  pretrain_1:
    kind: pretrain
    inputs: {corpus: shard}
    model: "${model}"
    losses: {ccl: 1}
    contrastive_batch: 8
    epochs: 1
    optimizer: {learning_rate: 1.0e-3}
    deepspeed: zero0.json
"""
    path = write_recipe(tmp_path, text, "real.yaml")
    assert load(path).stages["pretrain_1"].kind == "pretrain"
    unknown = message(path, "model.method=cokie")
    assert "stages.pretrain_1.model.method (written as model.method): 'cokie' is not a method" in unknown
    assert "did you mean 'cookie'?" in unknown
    misspelt = message(path, "model.vison={name: resnet10t}")
    assert "stages.pretrain_1.model.vison (written as model.vison): unknown key" in misspelt
    assert "did you mean 'vision'?" in misspelt
    deep = message(path, "model.vision.image_pix=32")
    assert "--set model.vision.image_pix=32: stages.pretrain_1.model.vision.image_pix" in deep
    assert "did you mean 'image_px'?" in deep
    assert "model.vision.image_px (written as model.vision.image_px): 'big'" in message(
        path, "model.vision.image_px=big"
    )
    assert "stages.pretrain_1.losses: ccll is not a loss of clip" in message(
        path, "stages.pretrain_1.losses.ccll=1"
    )


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{from: grid, nam: x}", ["source.nam: unknown key", "'name'?; allowed: name, weights, key_order"]),
        ("{from: gird, name: x}", ["source: 'gird' is not allowed; allowed: 'files', 'faster_rcnn', 'grid'"]),
        ("{name: x}", ["source: {'name': 'x'}: from: missing; it says which kind this is"]),
        (
            "{from: files, layout: npy, parts: [{features: a, ids: b, boxs: c}]}",
            ["source.parts.0.boxs: unknown key", "did you mean 'boxes'?; allowed: features, ids, boxes"],
        ),
    ],
)
def test_mistakes_in_a_section_of_several_kinds_are_of_the_kind_that_is_named(
    tmp_path: Path, source: str, parts: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nstages:\n  g: {{kind: regions, data: {{corpus: c}}, source: {source}}}\n")
    said = message(path)
    for part in parts:
        assert part in said, said
