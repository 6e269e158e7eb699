"""`tandem status`: the rows of the run directories, joined with SLURM's where jobs were sent; or --watch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pipeline import status, tables
from pipeline.results import RunView, view
from pipeline.slurm import joined
from pipeline.status import StageStatus

WATCH_EVERY_S = 5.0
MOVING = ("running", "queued")


def rows(run: RunView) -> tuple[list[StageStatus], str | None]:
    """One a stage, and why SLURM could not be asked."""
    return joined.join(run, status.statuses(run))


def as_json(recipe: Path, root: Path, overrides: Sequence[str]) -> dict[str, Any]:
    run = view(recipe, root, overrides)
    found, problem = rows(run)
    slurm = {} if problem is None else {"slurm": problem}
    return {"recipe": run.name, **slurm, "stages": [row.as_json() for row in found]}


def show(recipe: Path, root: Path, overrides: Sequence[str], console: Console) -> None:
    run = view(recipe, root, overrides)
    found, problem = rows(run)
    for line in _told_first(found, problem):
        console.print(line, soft_wrap=True)
    console.print(tables.of_status(found, f"status of {run.name}"))


def watch(recipe: Path, root: Path, overrides: Sequence[str], console: Console) -> None:
    """Until no stage runs or waits in a queue; Ctrl-C ends the watching alone."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            run = view(recipe, root, overrides)
            found, problem = rows(run)
            parts: list[RenderableType] = [*_told_first(found, problem)]
            live.update(Group(*parts, tables.of_status(found, f"status of {run.name}")), refresh=True)
            if not any(row.state in MOVING for row in found):
                return
            try:
                time.sleep(WATCH_EVERY_S)
            except KeyboardInterrupt:
                return


def _told_first(found: Sequence[StageStatus], problem: str | None) -> list[Text]:
    told = [Text(line, style="red") for line in tables.failures(found)]
    if problem is not None:
        told.append(
            Text(f"SLURM was not asked: {problem}; this is what the run directories say", style="yellow")
        )
    return told
