"""Fingerprints and plans: what shapes a result changes the directory, what does not leaves it."""

import io
import json
import os
from pathlib import Path

import pytest
from pydantic import create_model
from rich.console import Console

import tests.tiny.train
from pipeline import plan, tables
from pipeline.fingerprint import ABSENT, HashCache, Identity, file_hashes, file_sha256, identities
from pipeline.recipe import Recipe, load
from pipeline.results import view
from pipeline.run_directory import RunDirectory
from stages.base import Report, StageError
from tests.pipeline_harness import TINY, write_recipe


def shorts(path: Path, root: Path, *overrides: str) -> dict[str, str]:
    return {name: identity.short for name, identity in identities(load(path, overrides), root).items()}


def finish(recipe: Recipe, root: Path, *names: str) -> None:
    """Make the stages done, without running them."""
    for name, identity in identities(recipe, root).items():
        if name in names:
            directory = RunDirectory.of(root, recipe.name, identity)
            directory.prepare(identity, recipe.name)
            (directory.path / "out" / "result.txt").write_text(name)
            directory.commit(identity, Report(), 1.0)


def actions(recipe: Recipe, root: Path) -> dict[str, str]:
    return {stage.name: stage.action for stage in plan.make(recipe, root).stages}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.tune.epochs=9", {"tune"}),
        ("stages.train.epochs=9", {"train", "tune"}),
        ("stages.train.schedule.warmup=0.1", {"train", "tune"}),
        ("stages.numbers.count=9", {"numbers", "train", "tune"}),
        ("seed=8", {"numbers", "train", "tune"}),
        ("stages.numbers.note=hello", set()),  # cosmetic
        ("launch.processes=1", set()),
        ("tracking.uri=http://127.0.0.1:1", set()),
        ("description=other", set()),
        ("stages.train.step_s=0.0", set()),  # the default, written out
    ],
)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(
    tmp_path: Path, override: str, changed: set[str]
) -> None:
    path = write_recipe(tmp_path)
    before, after = shorts(path, tmp_path), shorts(path, tmp_path, override)
    assert {name for name in before if before[name] != after[name]} == changed
    assert all(len(short) == 12 for short in before.values())


def test_a_field_that_a_later_version_adds_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade must not train anew what is done: what is left at its default does not count."""
    path = write_recipe(tmp_path)
    before = shorts(path, tmp_path)
    later = create_model("Later", __base__=tests.tiny.train.Config, new_field=(int, 3))
    monkeypatch.setattr(tests.tiny.train, "Config", later)
    assert shorts(path, tmp_path) == before
    assert shorts(path, tmp_path, "stages.train.new_field=4")["train"] != before["train"]


def test_two_stages_of_equal_config_differ_by_their_inputs_alone(tmp_path: Path) -> None:
    text = TINY.replace("weights: train}, epochs: 1", "weights: train}, epochs: 2")
    found = shorts(write_recipe(tmp_path, text), tmp_path)
    assert found["train"] != found["tune"]


def test_a_stage_may_be_renamed(tmp_path: Path) -> None:
    renamed = TINY.replace("  numbers: {kind", "  digits: {kind").replace(
        "{numbers: numbers", "{numbers: digits"
    )
    before = shorts(write_recipe(tmp_path), tmp_path)
    after = shorts(write_recipe(tmp_path, renamed, "renamed.yaml"), tmp_path)
    assert before["train"] == after["train"]


def test_a_files_content_counts_and_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("5")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("5")
    text = TINY.replace("count: 4", "count: 4, source: a.txt")
    path = write_recipe(tmp_path, text)
    before = shorts(path, tmp_path)
    assert shorts(path, tmp_path, "stages.numbers.source=elsewhere/b.txt") == before
    (tmp_path / "a.txt").write_text("6")
    assert shorts(path, tmp_path)["tune"] != before["tune"]


def test_big_files_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(b"x" * (2 << 20))
    cache = HashCache(tmp_path / ".hashes.json")
    digest = cache.sha256(big)
    cache.save()
    times = big.stat()
    with big.open("r+b") as stream:  # the same size and time: only the remembered hash can be returned
        stream.write(b"y")
    os.utime(big, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert HashCache(tmp_path / ".hashes.json").sha256(big) == digest
    os.utime(big, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert HashCache(tmp_path / ".hashes.json").sha256(big) != digest
    (tmp_path / ".hashes.json").write_text("{broken")
    assert HashCache(tmp_path / ".hashes.json").sha256(big) != digest


def test_a_directory_hashes_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_text("1")
    cache = HashCache(tmp_path / "none.json")
    before = cache.sha256(tmp_path / "weights")
    (tmp_path / "weights" / "a").rename(tmp_path / "weights" / "b")
    assert cache.sha256(tmp_path / "weights") != before
    assert cache.sha256(tmp_path / "nothing") == "absent"


def test_plan_from_nothing_to_done(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    root = tmp_path / "runs"
    assert actions(recipe, root) == {"numbers": "run", "train": "run", "tune": "run"}
    assert not root.exists()  # a plan writes nothing
    finish(recipe, root, "numbers", "train")
    assert actions(recipe, root) == {"numbers": "reuse", "train": "reuse", "tune": "run"}


def test_plan_says_why(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    root = tmp_path / "runs"
    finish(load(path), root, "numbers", "train", "tune")
    changed = plan.make(load(path, ["stages.train.epochs=14", "stages.train.schedule.name=cosine"]), root)
    assert changed["numbers"].action == "reuse"
    assert changed["train"].why == "epochs 2 → 14; schedule.name step → cosine"
    assert changed["tune"].why == "input train changed"
    assert plan.make(load(path, ["seed=8"]), root)["numbers"].why == "seed 7 → 8"
    losses = plan.make(load(path, ["stages.train.losses.ccl=2"]), root)["train"]
    assert losses.why == "losses is gone (was {}); losses.ccl is new: 2.0"


def test_plan_tells_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("5")
    path = write_recipe(tmp_path, TINY.replace("count: 4", "count: 4, source: a.txt"))
    finish(load(path), tmp_path / "runs", "numbers")
    (tmp_path / "a.txt").write_text("6")
    assert plan.make(load(path), tmp_path / "runs")["numbers"].why == "the content of source changed"


def test_plan_with_an_absent_file(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, TINY.replace("count: 4", "count: 4, source: no.csv"))
    made = plan.make(load(path), tmp_path / "runs")
    assert [stage.action for stage in made.stages] == ["blocked"] * 3
    assert made["numbers"].why == f"no.csv is not there: {tmp_path / 'no.csv'}"
    assert made["tune"].why == "waits for numbers, train"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("missing", "out/result.txt is missing"),
        ("truncated", "out/result.txt has 2 bytes, DONE.json says 5"),
        ("unreadable", "DONE.json cannot be read"),
        ("half", "DONE.json cannot be read"),
        ("moved", "DONE.json is not of this directory"),
        ("unfinished", "an earlier run did not finish it"),
    ],
)
def test_done_is_believed_only_with_its_files(tmp_path: Path, damage: str, why: str) -> None:
    recipe = load(write_recipe(tmp_path))
    root = tmp_path / "runs"
    finish(recipe, root, "numbers", "train", "tune")
    directory = plan.make(recipe, root)["train"].directory
    result, done = directory.path / "out" / "result.txt", directory.done_path
    if damage == "missing":
        result.unlink()
    elif damage == "truncated":
        result.write_text("tr")
    elif damage == "unreadable":
        done.write_text("\x00\x01")
    elif damage == "half":
        done.write_text(done.read_text()[:40])
    elif damage == "moved":
        done.write_text(json.dumps(json.loads(done.read_text()) | {"fingerprint": "0" * 64}))
    else:
        done.unlink()
    found = plan.make(recipe, root)["train"]
    assert (found.action, found.why) == ("resume", found.why)
    assert why in found.why


def test_from_and_until(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    made = plan.make(recipe, tmp_path / "runs")
    assert [stage.name for stage in made.between(None, "train")] == ["numbers", "train"]
    with pytest.raises(
        StageError, match=r"--from train: stage 'train' reads 'numbers' \(numbers\), which is not done"
    ):
        made.between("train", None)
    with pytest.raises(StageError, match="--from: there is no stage 'tran'; did you mean 'train'"):
        made.between("tran", None)
    with pytest.raises(StageError, match="'tune' stands after 'train'"):
        made.between("tune", "train")
    finish(recipe, tmp_path / "runs", "numbers")
    made = plan.make(recipe, tmp_path / "runs")
    assert [stage.name for stage in made.between("train", "train")] == ["train"]


def test_lock_names_its_holder(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "stage")
    assert directory.holder() is None
    with directory.lock():
        assert directory.holder() == f"process {os.getpid()} on host {os.uname().nodename}"
        with pytest.raises(StageError, match=f"process {os.getpid()} on host .* works on this stage"):
            directory.refuse_if_held()
        with pytest.raises(StageError, match="works on this stage"), directory.lock(wait_s=0.2):
            pass
    assert directory.holder() is None
    with directory.lock(wait_s=0):
        pass


def test_commit_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    finish(recipe, tmp_path / "runs", "numbers")
    identity: Identity = identities(recipe, tmp_path / "runs")["numbers"]
    directory = RunDirectory.of(tmp_path / "runs", "tiny", identity)
    content = json.loads(directory.done_path.read_text())
    assert content["files"] == file_hashes(directory.path / "out")
    assert content["files"]["result.txt"]["bytes"] == len("numbers")
    assert not list(directory.path.glob(".*.tmp"))
    config = directory.config()
    assert config is not None
    assert config["config"]["count"] == 4
    assert "note" not in config["config"]


def test_no_json_has_nan(tmp_path: Path) -> None:
    identity = identities(load(write_recipe(tmp_path)), tmp_path)["numbers"]
    directory = RunDirectory.of(tmp_path, "tiny", identity)
    directory.prepare(identity, "tiny")
    directory.commit(identity, Report(metrics={"a": float("nan"), "b": 1.0}), 0.0)
    assert json.loads(directory.done_path.read_text())["metrics"] == {"a": None, "b": 1.0}


@pytest.mark.slow
def test_plan_counts_a_training_stage(tmp_path: Path) -> None:
    """Parameters, steps and memory, with the corpus far away: the recipe's hint gives the samples."""
    from pipeline import estimates

    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    text = """
name: real
launch: {processes: 4}
model:
  method: clip
  vision: {name: resnet10t, image_px: 64}
  text: {layers: 1, width: 32, heads: 2, intermediate: 64}
  dimension: 32
stages:
  numbers: {kind: tests.tiny.numbers, source: far_away.csv}
  one: &training
    kind: pretrain
    inputs: {corpus: numbers}
    model: "${model}"
    losses: {ccl: 1}
    contrastive_batch: 8
    epochs: 3
    optimizer: {learning_rate: 1.0e-3}
    deepspeed: zero2.json
    vocabulary: {size: 100}
  two:
    <<: *training
    inputs: {corpus: numbers, weights: one}
    vocabulary: {size: 8000}
"""
    path = write_recipe(tmp_path, text, "real.yaml")
    unknown = estimates.of_plan(plan.make(load(path), tmp_path))["one"]
    assert (unknown["steps"], unknown["samples_from"]) == (None, "unknown until numbers is done")
    made = plan.make(load(path, ["samples.numbers=100"]), tmp_path)
    found = estimates.of_plan(made)
    assert found["one"]["steps"] == 3 * (100 // 8)
    assert found["one"]["holding"] == "zero2"
    assert sum(found["one"]["parameters"].values()) == found["one"]["trainable"]
    assert found["one"]["parameters"] == found["two"]["parameters"]  # the vocabulary comes with the weights
    memory = found["one"]["bytes_per_gpu"]
    assert memory["zero0"] > memory["zero1"] > memory["zero2"] > memory["zero3"] > 0
    tables = estimates.tables(found)
    assert [table.row_count for table in tables] == [2, 2]

    def named(*overrides: str) -> list[str]:
        return [identity.short for identity in identities(load(path, overrides), tmp_path).values()]

    # how many ranks hold it, and how, makes no other result; its precision does
    before = named()
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert named("launch.processes=1") == before
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    assert [a == b for a, b in zip(named(), before, strict=True)] == [True, False, False]


def test_a_glob_is_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    cache = HashCache(tmp_path / ".hashes.json")
    logs = tmp_path / "logs"
    logs.mkdir()
    pattern = logs / "day-*.parquet"
    assert cache.sha256(pattern) == ABSENT
    (logs / "day-1.parquet").write_text("one")
    (logs / "other.txt").write_text("no part of it")
    first = cache.sha256(pattern)
    (logs / "other.txt").write_text("changed")
    assert cache.sha256(pattern) == first
    (logs / "day-2.parquet").write_text("two")
    second = cache.sha256(pattern)
    (logs / "day-1.parquet").write_text("1")
    assert len({first, second, cache.sha256(pattern), ABSENT}) == 4
    (logs / "day-[a].parquet").write_text("a file of that very name")
    assert cache.sha256(logs / "day-[a].parquet") == file_sha256(logs / "day-[a].parquet")


def test_what_another_recipe_has_done_is_taken_from_there(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = write_recipe(tmp_path)
    first = load(path)
    finish(first, root, "numbers", "train")
    text = "extends: tiny.yaml\nname: second\nreuse: [other, {}]\nstages: {{tune: {{epochs: 5}}}}\n"
    second = load(write_recipe(tmp_path, text.format(first.name), "second.yaml"))
    made = plan.make(second, root)
    assert {stage.name: stage.action for stage in made.stages} == {
        "numbers": "reuse",
        "train": "reuse",
        "tune": "run",
    }
    short = made["train"].identity.short
    assert made["train"].directory.path == root.resolve() / first.name / "train" / short
    assert made["tune"].directory.path.parents[1] == root.resolve() / "second"
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(tables.of_plan(made))
    assert f"{first.name}/train/{short}" in shown.export_text()
    assert {stage.name: stage.directory for stage in view(second.path, root).stages}["train"] == made[
        "train"
    ].directory.path

    alone = load(write_recipe(tmp_path, text.format("third"), "alone.yaml"))
    assert set(actions(alone, root).values()) == {"run"}
    finish(second, root, "numbers")  # its own comes first
    assert plan.make(second, root)["numbers"].directory.path.parents[1] == root.resolve() / "second"
    changed = load(second.path, ["stages.train.epochs=7"])
    assert actions(changed, root)["train"] == "run"


def test_a_damaged_result_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    first = load(write_recipe(tmp_path))
    finish(first, tmp_path, "numbers")
    second = load(
        write_recipe(tmp_path, f"extends: tiny.yaml\nname: second\nreuse: [{first.name}]\n", "second.yaml")
    )
    [stage, *_] = plan.make(second, tmp_path).stages
    (stage.directory.path / "out" / "result.txt").unlink()
    [stage, *_] = plan.make(second, tmp_path).stages
    assert (stage.action, stage.directory.path.parents[1].name) == ("run", "second")
