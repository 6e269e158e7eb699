"""The command line: `tandem plan | run | submit | status | results | …`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import corpus_command, shards_command
from pipeline.cli_options import (
    ROOT,
    UNCHANGED,
    JsonOption,
    RecipeArgument,
    RootOption,
    SetOption,
    StopAfterOption,
    TrackingOption,
    console,
    print_json,
)
from pipeline.slurm import commands as slurm_commands
from stages.base import StageError

app = typer.Typer(
    name="tandem",
    help="""
    From a click log to a trained, evaluated image-text retrieval model.

    A recipe (YAML) says what to train: its stages, in order. Each stage works in a directory of its own,
    named by a fingerprint of everything that shapes its result; what is done is reused, what was interrupted
    goes on.

    Start with:

      tandem plan recipes/demo.yaml       what would run, and why

      tandem run recipes/demo.yaml        run it; Ctrl-C stops, the same command goes on

      tandem results recipes/demo.yaml    the recall table

    Exit codes: 0 done, 2 a mistake that you can mend (or a full disk), 75 stopped (run it again), 76 a rank
    stood still and is named (run it again), 1 a crash.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    json_: JsonOption = False,
) -> None:
    """Say what would run, what is reused and why; start nothing.

    A changed setting is named with its old and new value ("epochs 12 → 14"), and only what depends on it runs
    again. Training stages are shown with their parameters a part, their steps, and the memory that each ZeRO
    stage needs on a GPU.

      tandem plan recipes/demo.yaml

      tandem plan recipes/demo.yaml --set stages.finetune.epochs=14
    """
    from pipeline import estimates, tables
    from pipeline import plan as planning
    from pipeline.recipe import load

    made = planning.make(load(recipe, overrides), root)
    if not json_:
        console().print(tables.of_plan(made))  # at once: to count a model takes seconds
    shown = estimates.of_plan(made)
    if json_:
        print_json(
            {
                "recipe": made.recipe.name,
                "stages": [stage.as_json() | {"training": shown.get(stage.name)} for stage in made.stages],
            }
        )
        return
    for table in estimates.tables(shown):
        console().print(table)


def _run(
    recipe: Path,
    root: Path,
    overrides: list[str],
    first: str | None,
    last: str | None,
    uri: str | None,
    stop_after: str | None,
    json_: bool,
) -> None:
    from pipeline import runner, stop_time

    stop_at = stop_time.stop_at(stop_after)
    request = runner.Request(recipe, root, tuple(overrides), first, last, uri, stop_at)
    ran = runner.run(request, console(stderr=json_))
    if json_:
        print_json(ran.as_json())
    elif ran.code == 0 and "evaluate" in {*ran.ran, *ran.reused}:
        _show_recalls(recipe, root, overrides)
    raise typer.Exit(ran.code)


@app.command()
def run(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    from_: Annotated[
        str | None, typer.Option("--from", help="begin with this stage", metavar="STAGE")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="end with this stage", metavar="STAGE")] = None,
    tracking_uri: TrackingOption = None,
    stop_after: StopAfterOption = None,
    json_: JsonOption = False,
) -> None:
    """Run the recipe: what is done is reused, what was interrupted goes on.

    Ctrl-C (or SIGTERM) once stops after the current step and saves, twice stops at once. The same command
    goes on, also after a crash, a kill or a power cut. With --stop-after all is saved within that time.

      tandem run recipes/demo.yaml

      tandem run recipes/demo.yaml --until shard

      tandem run recipes/demo.yaml --set stages.finetune.epochs=14
    """
    _run(recipe, root, overrides, from_, until, tracking_uri, stop_after, json_)


@app.command()
def stage(
    recipe: RecipeArgument,
    stage: Annotated[
        str, typer.Argument(help="the stage's name in the recipe", metavar="STAGE", show_default=False)
    ],
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    tracking_uri: TrackingOption = None,
    stop_after: StopAfterOption = None,
    json_: JsonOption = False,
) -> None:
    """Run one stage; what it reads must be done.

    tandem stage recipes/demo.yaml pretrain_1
    """
    _run(recipe, root, overrides, stage, stage, tracking_uri, stop_after, json_)


@app.command()
def status(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    watch: Annotated[bool, typer.Option("--watch", help="show it anew until all has ended")] = False,
    json_: JsonOption = False,
) -> None:
    """A row a stage: done, running, queued, failed, stopped or waiting; step, speed, loss, time left.

    What failed comes first, with the reason and the last lines of the right log. On a cluster the states are
    SLURM's too: job, queue reason, tasks done, restarts.

      tandem status recipes/demo.yaml

      tandem status recipes/demo.yaml --watch
    """
    from pipeline import status_command

    if json_:
        print_json(status_command.as_json(recipe, root, overrides))
    elif watch:
        status_command.watch(recipe, root, overrides, console())
    else:
        status_command.show(recipe, root, overrides, console())


@app.command()
def results(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    json_: JsonOption = False,
) -> None:
    """The recall table, and what each stage counted and measured.

    With --json: {"recipe", "stages": {stage: {metric: value}}, "metrics": {"eval/unseen_vendor/i2t_r@1": …}}.

      tandem results recipes/demo.yaml --json
    """
    from pipeline import mlflow_follow, tables
    from pipeline import results as viewing
    from pipeline.recipe import load_head

    run_view = viewing.view(recipe, root, overrides)
    found = viewing.as_json(run_view)
    if json_:
        print_json(found)
    else:
        console().print(tables.of_stages(run_view))
        _show_recalls(recipe, root, overrides)
    sys.stdout.flush()
    say = console(stderr=True).print
    mlflow_follow.catch_up(run_view, load_head(recipe, overrides)[0].tracking, say)


def _show_recalls(recipe: Path, root: Path, overrides: list[str]) -> None:
    from pipeline import results as viewing
    from pipeline import tables

    run_view = viewing.view(recipe, root, overrides)
    metrics, title = viewing.as_json(run_view)["metrics"], f"results of {run_view.name}"
    table = tables.of_recalls(metrics, title)
    console().print(table if table is not None else "nothing is evaluated yet: tandem run " + str(recipe))
    by_labels = tables.of_labels(metrics, title)
    if by_labels is not None:
        console().print(by_labels)


@app.command()
def compare(
    recipes: Annotated[
        list[Path], typer.Argument(help="one recipe or more", metavar="RECIPE...", show_default=False)
    ],
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    runs: Annotated[
        bool, typer.Option("--runs", help="every finished run of each recipe, not the current alone")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Metrics side by side, and the settings in which the runs differ.

    tandem compare recipes/cookie.yaml recipes/clip.yaml

    tandem compare recipes/demo.yaml --runs
    """
    from pipeline import compare as comparing
    from pipeline import results as viewing
    from pipeline import tables

    views = [viewing.view(recipe, root, overrides) for recipe in recipes]
    columns = [
        c for view in views for c in (comparing.of_all_runs(view) if runs else [comparing.of_recipe(view)])
    ]
    if not columns:
        raise StageError(
            f"no finished run of {', '.join(map(str, recipes))} under {root}; run it first: tandem run"
        )
    found = comparing.compare(columns)
    if json_:
        print_json(found.as_json())
        return
    for table in tables.of_comparison(found):
        console().print(table)


@app.command()
def report(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    out: Annotated[
        Path | None, typer.Option("--out", help="the file; default: beside the runs", metavar="FILE")
    ] = None,
) -> None:
    """Write the report: one HTML file with the funnel, the curves, the recalls and example pictures.

    tandem report recipes/demo.yaml --out report.html
    """
    from pipeline import results as viewing
    from pipeline import runner
    from pipeline.report import write_report

    run_view = viewing.view(recipe, root, overrides)
    path = write_report(run_view, out or runner.report_path(run_view))
    sys.stdout.write(f"{path}\n")


app.add_typer(corpus_command.app, name="corpus")
for command in (slurm_commands.submit, slurm_commands.cancel, slurm_commands.doctor):
    app.command()(command)
app.add_typer(shards_command.app)


@app.command()
def schema(
    cluster: Annotated[bool, typer.Option("--cluster", help="of cluster files, not of recipes")] = False,
) -> None:
    """Print the JSON schema of recipes, or of cluster files, for editors.

    tandem schema > recipe.schema.json

    tandem schema --cluster > cluster.schema.json
    """
    if cluster:
        from pipeline.slurm.cluster import schema as made
    else:
        from pipeline.recipe import schema as made
    print_json(made())


def main() -> None:
    """The entry point of the `tandem` command."""
    try:
        app()
    except StageError as error:
        sys.stderr.write(f"tandem: {error}\n")
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        from pipeline.worker import disk_full_message

        message = disk_full_message(error, Path())
        if message is None:
            raise
        sys.stderr.write(f"tandem: {message}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
