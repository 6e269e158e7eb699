"""Options that several commands have, and how commands print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

RecipeArgument = Annotated[
    Path, typer.Argument(help="the recipe, a YAML file", metavar="RECIPE", show_default=False)
]
RootOption = Annotated[Path, typer.Option("--root", help="where runs are kept", metavar="DIR")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", help="change one value of the recipe; as often as you like", metavar="KEY=VALUE"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow server or database; 'off': none. Default: the recipe's", metavar="URI"
    ),
]

StopAfterOption = Annotated[
    str | None,
    typer.Option(
        "--stop-after",
        help="save and end within this time (3h50m), exit code 75; also TANDEM_STOP_AT, in unix seconds",
        metavar="TIME",
    ),
]

ClusterOption = Annotated[
    Path,
    typer.Option("--cluster", help="a cluster file, or the name of one in slurm/clusters", metavar="FILE"),
]

UNCHANGED: list[str] = []
PIPE_WIDTH = 150  # of tables that go to a file or a pipe

ROOT = Path("runs")


def console(**options: Any) -> Console:
    """As wide as the terminal, wide enough for tables elsewhere."""
    made = Console(**options)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_WIDTH
    return made


def print_json(value: Any) -> None:
    """To the standard output; NaN and infinities as null."""
    from pipeline.run_directory import finite

    sys.stdout.write(
        json.dumps(finite(value), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n"
    )
