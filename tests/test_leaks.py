"""A recipe that evaluates on what was not checked is refused, with line and remedy, unless it says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import leaks, plan, report, runner, tables
from pipeline.recipe import load, load_head
from pipeline.results import RunView, StageRun
from pipeline.slurm.submit import Request, submit
from stages.base import StageError
from tests.pipeline_harness import write_recipe

RECIPE = """
name: checked
tracking: {uri: "off"}
stages:
  filter: {kind: filter, click_log: log.csv}
  crawl: {kind: crawl, inputs: {pairs: filter}}
  other:
    kind: shard
    inputs: {pictures: crawl}
    splits: [{name: test, share: 0.1}, {name: train}]
    decontaminate: {against: [{split: test}]}
  shard:
    kind: shard
    inputs: {pictures: crawl, held_out: other}
    decontaminate: {against: [{role: held_out, split: test}]}
  pretrain:
    kind: pretrain
    inputs: {corpus: shard}
  finetune:
    kind: finetune
    inputs: {corpus: other, weights: pretrain}
  evaluate:
    kind: evaluate
    inputs: {corpus: other, weights: finetune}
    galleries:
      - {name: own, split: test}
"""


def problems(tmp_path: Path, *overrides: str, text: str = RECIPE) -> str:
    head, source = load_head(write_recipe(tmp_path, text), overrides)
    try:
        leaks.check(source, head.stages)
    except StageError as error:
        return str(error)
    return ""


def test_a_checked_recipe_passes(tmp_path: Path) -> None:
    assert problems(tmp_path) == ""


def test_each_training_stage_of_the_chain_counts(tmp_path: Path) -> None:
    said = problems(tmp_path, "stages.shard.decontaminate=null")
    assert "tiny.yaml:26: stages.evaluate.galleries.0: split 'test' of stage 'other'" in said
    assert "what 'pretrain' trains on (split 'train' of stage 'shard')" in said
    assert (
        "add `decontaminate: {against: [{role: held_out, split: test}]}` and `inputs.held_out: other`" in said
    )
    assert 'say `unchecked: "<why>"` in stages.evaluate' in said
    tuned = problems(tmp_path, "stages.other.decontaminate=null")
    assert "what 'finetune' trains on" in tuned
    assert "add `decontaminate: {against: [{split: test}]}` to stages.other" in tuned
    assert "pretrain" not in tuned


@pytest.mark.parametrize(
    "override",
    [
        "stages.shard.decontaminate.against=[{role: held_out, split: val}]",
        "stages.shard.decontaminate.from=[val]",
        "stages.shard.inputs.held_out=shard_2",
        "stages.pretrain.inputs.corpus=crawl",
    ],
)
def test_another_set_or_another_split_is_no_check(tmp_path: Path, override: str) -> None:
    text = RECIPE.replace("  shard:\n", "  shard_2: {kind: shard, inputs: {pictures: crawl}}\n  shard:\n")
    assert "'pretrain'" in problems(tmp_path, override, text=text)


def test_of_several_held_out_corpora_each_is_known_by_its_input(tmp_path: Path) -> None:
    two = RECIPE.replace("held_out: other}", "held_out_a: crawl, held_out_b: other}")
    against = "[{role: held_out_a, split: test}, {role: held_out_b, split: test}]"
    assert problems(tmp_path, text=two.replace("[{role: held_out, split: test}]", against)) == ""
    swapped = two.replace("[{role: held_out, split: test}]", "[{role: held_out_a, split: test}]")
    assert "'pretrain'" in problems(tmp_path, text=swapped)


def test_regions_of_the_same_corpus_change_no_check(tmp_path: Path) -> None:
    made = "{kind: regions, inputs: {corpus: other}, source: {from: grid, name: resnet10t}}"
    regions = f"  regions: {made}\n  pretrain:\n"
    text = RECIPE.replace("  pretrain:\n", regions).replace(
        "{corpus: other,", "{corpus: other, regions: regions,"
    )
    assert problems(tmp_path, text=text) == ""
    tuned = problems(tmp_path, "stages.other.decontaminate=null", text=text)
    assert "what 'finetune' trains on" in tuned
    with pytest.raises(
        StageError, match=r"finetune\.inputs\.regions: 'shard' is a shard stage; name one of kind"
    ):
        problems(tmp_path, "stages.finetune.inputs.regions=shard", text=text)


def test_training_on_the_evaluated_split_is_told_as_such(tmp_path: Path) -> None:
    said = problems(tmp_path, "stages.finetune.data.split=test")
    assert "'finetune' trains on it; evaluate on another split" in said


def test_a_reason_lets_it_pass_and_the_plan_shows_it(tmp_path: Path) -> None:
    why = "stages.evaluate.unchecked=the paper did not"
    assert problems(tmp_path, "stages.shard.decontaminate=null", why) == ""
    head, _ = load_head(write_recipe(tmp_path, RECIPE), [why])
    assert leaks.notes(head.stages) == ["evaluate: not checked for leaks: the paper did not"]


def write_manifest(folder: Path, checked: list[dict[str, Any]] | None) -> None:
    folder.mkdir(parents=True)
    values: dict[str, Any] = {"format": 1, "splits": {"train": 1}}
    (folder / "manifest.json").write_text(json.dumps(values | ({"checked": checked} if checked else {})))


@pytest.mark.parametrize(
    ("checked", "passes"),
    [
        (None, False),
        ([{"name": "own", "corpus": "abc", "split": "test", "in_splits": ["train"]}], True),
        ([{"name": "own", "corpus": "abc", "split": None, "in_splits": ["train"]}], True),
        ([{"name": "own", "corpus": "abc", "split": "test", "in_splits": ["val"]}], False),
        ([{"name": "third", "corpus": "abc", "split": "test", "in_splits": ["train"]}], False),
    ],
)
def test_of_a_corpus_made_elsewhere_the_manifest_tells(
    tmp_path: Path, checked: list[dict[str, Any]] | None, passes: bool
) -> None:
    write_manifest(tmp_path / "made", checked)
    text = RECIPE.replace("    inputs: {corpus: shard}\n", "    data: {corpus: made}\n")
    said = problems(tmp_path, text=text)
    assert (said == "") is passes
    assert passes or f"of {tmp_path / 'made'}) was not checked against it: make that corpus again" in said


def test_an_evaluation_corpus_made_elsewhere_is_known_by_its_directory(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "{corpus: other, weights: finetune}", "{weights: pretrain}\n    data: {corpus: sets/f30k}"
    )
    said = problems(tmp_path, text=text)
    assert f"add `decontaminate: {{against: [{{corpus: {tmp_path / 'sets/f30k'}, split: test}}]}}`" in said
    named = text.replace("{role: held_out, split: test}", "{corpus: ./sets/f30k/, split: test}")
    assert problems(tmp_path, text=named) == ""


def test_plan_refuses_and_shows_the_reason(tmp_path: Path) -> None:
    """With the real stages: the demo's recipe without its check."""
    demo = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    broken = load(demo, ["stages.shard.decontaminate=null"])
    with pytest.raises(StageError, match=r"demo\.yaml:\d+: stages\.evaluate\.galleries\.0"):
        plan.make(broken, tmp_path / "runs")
    told = load(demo, ["stages.shard.decontaminate=null", "stages.evaluate.unchecked=as an experiment"])
    shown = tables.of_plan(plan.make(told, tmp_path / "runs"))
    assert "as an experiment" in str(shown.caption)


def test_run_and_submit_refuse_before_anything_starts(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    unset = ("stages.shard.decontaminate=null",)
    with pytest.raises(StageError, match=r"what 'finetune' trains on .* is not checked against it"):
        runner.run(runner.Request(demo, tmp_path / "runs", unset), Console(stderr=True))
    with pytest.raises(StageError, match=r"what 'finetune' trains on .* is not checked against it"):
        submit(Request(demo, tmp_path / "runs", Path("a100_8x8"), unset, dry_run=True))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("why", [None, "the paper did not <b>check</b>"])
def test_the_report_shows_the_reason(tmp_path: Path, why: str | None) -> None:
    directory = tmp_path / "runs" / "r" / "evaluate" / "0123456789ab"
    (directory / "out").mkdir(parents=True)
    (directory / "out" / "examples.json").write_text("{}")
    (directory / "config.yaml").write_text(json.dumps({"seed": 1, "config": {"unchecked": why}}))
    done = {"metrics": {}, "counts": {}, "seconds": 1.0, "finished_at": "2030-01-01T00:00:00Z"}
    stage = StageRun("evaluate", "evaluate", directory, done)
    page = report.render(RunView("r", tmp_path / "r.yaml", tmp_path / "runs", [stage], None))
    assert ("Not checked for leaks." in page) is (why is not None)
    assert why is None or "the paper did not &lt;b&gt;check&lt;/b&gt;" in page


BENCHMARK = """
name: from_log
tracking: {uri: "off"}
stages:
  filter: {kind: filter, click_log: log.csv}
  crawl: {kind: crawl, inputs: {pairs: filter}}
  shard:
    kind: shard
    inputs: {pictures: crawl}
    splits: [{name: held, share: 0.1}, {name: train}]
    decontaminate: {against: [{split: held}]}
  icr: {kind: benchmark, inputs: {corpus: shard}, set: icr, split: held}
  iqr: {kind: benchmark, inputs: {corpus: shard}, set: iqr, split: held}
  pretrain:
    kind: pretrain
    inputs: {corpus: shard}
  finetune:
    kind: finetune
    inputs: {corpus: icr, weights: pretrain}
  evaluate:
    kind: evaluate
    inputs: {corpus: icr, weights: finetune}
    galleries:
      - {name: icr, split: test}
"""


def test_a_benchmark_is_of_the_split_that_it_was_made_from(tmp_path: Path) -> None:
    assert problems(tmp_path, text=BENCHMARK) == ""
    unchecked = problems(tmp_path, "stages.shard.decontaminate=null", text=BENCHMARK)
    assert "what 'pretrain' trains on (split 'train' of stage 'shard') is not checked" in unchecked
    assert "against: [{split: held}]" in unchecked
    own = problems(tmp_path, "stages.finetune.data.split=test", text=BENCHMARK)
    assert "'finetune' trains on it" in own
    other = problems(tmp_path, "stages.evaluate.inputs.corpus=iqr", text=BENCHMARK)
    assert "'finetune' trains on what was made of the same split" in other
    assert "pretrain" not in other
