"""The command line: help that teaches, quick starts, exit codes and messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline_harness import TINY, environment, inline, inline_json, tandem, write_recipe

COMMANDS = ("plan", "run", "stage", "status", "results", "compare", "report", "schema")


def test_help_names_the_commands_and_teaches_the_first_steps(tmp_path: Path) -> None:
    shown = tandem("--help", cwd=tmp_path).stdout
    for name in COMMANDS:
        assert f" {name} " in shown
    assert "tandem run recipes/demo.yaml" in shown
    assert "75 stopped" in shown


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the tiny recipe was run under the root `elsewhere`."""
    place = tmp_path_factory.mktemp("finished")
    write_recipe(place)
    tandem("run", "tiny.yaml", "--root", "elsewhere", cwd=place)
    return place


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example(tmp_path: Path, name: str) -> None:
    from typer.testing import CliRunner

    from pipeline.cli import app

    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert f"tandem {name}" in shown.output
    if name not in ("schema", "report"):
        assert "--json" in shown.output
        assert "--root" in shown.output
        assert "--set" in shown.output


def test_plan_shows_a_change_and_what_depends_on_it(finished: Path) -> None:
    shown = inline(
        "plan", "tiny.yaml", "--root", "elsewhere", "--set", "stages.train.epochs=3", cwd=finished
    ).stdout
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "reused" in rows["numbers"]
    assert "will run" in rows["train"]
    assert "epochs 2 → 3" in rows["train"]
    assert "will run" in rows["tune"]
    assert rows["train"].split()[3].startswith("train/")


def test_user_errors_end_with_2_and_no_traceback(tmp_path: Path) -> None:
    write_recipe(tmp_path, TINY.replace("seed: 7", "sede: 7"))
    for arguments in (
        ("plan", "tiny.yaml"),
        ("run", "tiny.yaml"),
        ("status", "tiny.yaml"),
        ("results", "tiny.yaml"),
        ("compare", "tiny.yaml"),
    ):
        done = inline(*arguments, cwd=tmp_path, code=2)
        assert "tiny.yaml:3: sede: unknown key" in done.stderr
        assert "did you mean 'seed'" in done.stderr
        assert "Traceback" not in done.stderr
    assert "no such file" in inline("plan", "none.yaml", cwd=tmp_path, code=2).stderr
    inline("plan", "tiny.yaml", "--misspelt", cwd=tmp_path, code=2)


def test_stage_wants_its_inputs_done(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    refused = inline("stage", "tiny.yaml", "train", cwd=tmp_path, code=2)
    assert "stage 'train' reads 'numbers' (numbers), which is not done (not run yet)" in refused.stderr
    assert not (tmp_path / "runs" / "tiny").exists()
    assert tandem("stage", "tiny.yaml", "numbers", cwd=tmp_path).stdout.startswith("[1/1] numbers  runs")


def test_an_absent_file_is_named_with_its_field(tmp_path: Path) -> None:
    write_recipe(tmp_path, TINY.replace("count: 4", "count: 4, source: log.csv"))
    refused = inline("run", "tiny.yaml", cwd=tmp_path, code=2)
    assert f"tiny.yaml:7: stages.numbers.source: {tmp_path}/log.csv is not there" in refused.stderr
    assert "cannot run" in inline("plan", "tiny.yaml", cwd=tmp_path).stdout


def test_results_and_status_before_anything_ran(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    found = inline_json("results", "tiny.yaml", cwd=tmp_path)
    assert (found["recipe"], found["stages"], found["metrics"], found["complete"]) == ("tiny", {}, {}, False)
    assert [row["state"] for row in inline_json("status", "tiny.yaml", cwd=tmp_path)["stages"]] == [
        "waiting"
    ] * 3
    assert "nothing is evaluated yet" in inline("results", "tiny.yaml", cwd=tmp_path).stdout
    assert "no finished run" in inline("compare", "tiny.yaml", "--runs", cwd=tmp_path, code=2).stderr


def test_results_by_name(finished: Path) -> None:
    found = inline_json("results", "tiny.yaml", "--root", "elsewhere", cwd=finished)
    assert found["complete"]
    assert found["metrics"]["eval/tiny/i2t_r@1"] == 10.0
    assert found["stages"]["numbers"] == {"numbers/sum": 10.0}
    shown = inline("results", "tiny.yaml", "--root", "elsewhere", cwd=finished).stdout
    assert "i2t_r@1" in shown
    assert "chance" in shown
    assert not (finished / "runs").exists()


def test_markup_in_a_recipe_is_text(finished: Path) -> None:
    override = "stages.train.losses={'[red]x[/red]': 1}"
    shown = inline("plan", "tiny.yaml", "--root", "elsewhere", "--set", override, cwd=finished).stdout
    assert "losses.[red]x[/red] is new: 1.0" in shown


@pytest.mark.parametrize("command", ["--help", "status", "results", "plan"])
def test_no_heavy_import_for_what_needs_none(tmp_path: Path, command: str) -> None:
    write_recipe(tmp_path)
    arguments = [command] if command == "--help" else [command, "tiny.yaml"]
    code = (
        "import sys\nfrom pipeline import cli\ntry:\n    cli.app(sys.argv[1:], standalone_mode=False)\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'deepspeed', 'mlflow', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_directories_are_remembered_and_forgotten_with_the_recipe(tmp_path: Path) -> None:
    """The memory behind a quick status must never show another fingerprint's directory."""
    from pipeline import results
    from pipeline.recipe import load

    text = """
name: real
stages:
  filter: {kind: filter, click_log: log.csv}
"""
    path = write_recipe(tmp_path, text, "real.yaml")
    (tmp_path / "log.csv").write_text("query,url,title,content,show,click\n")
    root = tmp_path / "runs"
    (root / "real").mkdir(parents=True)
    first = results.view(path, root).stages[0].directory
    cache = root / "real" / ".directories.json"
    assert len(json.loads(cache.read_text())) == 1
    assert results.view(path, root).stages[0].directory == first
    assert results.view(path, root, ["stages.filter.min_show=3"]).stages[0].directory != first
    (tmp_path / "log.csv").write_text("query,url,title,content,show,click\na,b,c,d,1,1\n")
    changed = results.view(path, root).stages[0].directory
    assert changed != first
    cache.write_text("{broken")
    assert results.view(path, root).stages[0].directory == changed
    assert load(path).stages["filter"].kind == "filter"
