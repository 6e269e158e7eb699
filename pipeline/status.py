"""The state of each stage, read from the run directories alone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import logs
from pipeline.results import RunView, StageRun
from pipeline.run_directory import RunDirectory
from pipeline.tracking import METRICS

TAIL_BYTES = 65536


@dataclass(frozen=True)
class StageStatus:
    """A row of `tandem status`. None: nothing is known."""

    stage: str
    kind: str
    state: str  # done, running, failed, stopped, waiting; on a cluster also queued, cancelled
    directory: str
    doing: str | None = None  # what the stage says that it does
    completed: float | None = None
    total: float | None = None
    step: int | None = None
    samples_per_s: float | None = None
    loss: float | None = None
    seconds_left: float | None = None
    seconds: float | None = None  # of a stage that is done
    holder: str | None = None
    starts: int = 0
    error: str | None = None
    error_rank: int | None = None
    error_task: int | None = None  # of a stage that runs as an array of tasks
    last_lines: tuple[str, ...] = ()  # of the log of what failed
    job: str | None = None  # SLURM's number
    tasks_done: int | None = None
    tasks: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def statuses(run: RunView) -> list[StageStatus]:
    """One a stage, in order."""
    return [_status(stage) for stage in run.stages]


def _status(stage: StageRun) -> StageStatus:
    directory = RunDirectory(stage.directory)
    common: dict[str, Any] = {
        "stage": stage.name,
        "kind": stage.kind,
        "directory": str(stage.directory),
        "starts": _starts(stage.directory),
    }
    common |= last_metrics(stage.directory / "log" / METRICS)
    if stage.done:
        return StageStatus(state="done", seconds=stage.done.get("seconds"), **common)
    if not directory.started:
        errors = logs.read_errors(stage.directory)  # it failed before it made its directory
        return StageStatus(state="failed" if errors else "waiting", **common, **_error(errors))
    holder = directory.holder()
    told = progress(stage.directory)
    if holder:
        return StageStatus(state="running", holder=holder, **common, **told)
    errors = logs.read_errors(stage.directory)
    shown = {name: told[name] for name in ("completed", "total") if name in told}
    if errors:
        return StageStatus(state="failed", **common, **shown, **_error(errors))
    return StageStatus(state="stopped", **common, **shown)


def _error(errors: list[logs.ErrorRecord]) -> dict[str, Any]:
    if not errors:
        return {}
    cause = errors[0]
    return {"error": cause.message, "error_rank": cause.rank, "error_task": cause.task}


def _starts(directory: Path) -> int:
    try:
        return len((directory / "log" / "starts.log").read_text().splitlines())
    except OSError:
        return 0


def progress(directory: Path) -> dict[str, Any]:
    """What the stage last said that it does, and the seconds left at that speed."""
    try:
        state = json.loads((directory / "log" / "progress.json").read_text())
        completed, total, seconds = state["completed"], state["total"], state["seconds"]
        left = seconds * (total - completed) / completed if total and completed else None
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"doing": state["description"], "completed": completed, "total": total, "seconds_left": left}


def last_metrics(path: Path) -> dict[str, Any]:
    """Step, speed and loss from the file's end, as far as they are there."""
    found: dict[str, Any] = {}
    for line in reversed(logs.tail(path, lines=200, most_bytes=TAIL_BYTES)):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        found.setdefault("step", row["step"])
        if row.get("train/samples_per_s") is not None:
            found.setdefault("samples_per_s", row["train/samples_per_s"])
        if row.get("loss/total") is not None:
            found.setdefault("loss", row["loss/total"])
        if len(found) == 3:
            break
    return found
