"""Progress: a stage's bars, kept in progress.json, told to the runner, shown as bars or as lines."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from pipeline.events import Channel
from pipeline.run_directory import finite

EVENT_EVERY_S = 0.2
FILE_EVERY_S = 2.0
LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """'0.4 s', '41 s', '3:05', '2:07:09'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: Any) -> str:
    """A number as a person reads it; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def shown_text(shown: dict[str, Any]) -> str:
    return "  ".join(f"{name.rpartition('/')[2]} {number(value)}" for name, value in shown.items())


class WorkerTask:
    """One bar of a stage. `advance` is cheap: it may be called for every row."""

    def __init__(self, owner: "WorkerProgress", number_: int, description: str, total: float | None):
        self._owner, self._number = owner, number_
        self.description, self.total = description, total
        self.completed: float = 0
        self.shown: dict[str, Any] = {}
        self.began = time.time()

    def advance(self, n: float = 1, **shown: Any) -> None:
        self.completed += n
        if shown:
            self.shown.update(shown)
        self._owner.changed(self)

    def state(self) -> dict[str, Any]:
        return {
            "task": self._number,
            "description": self.description,
            "total": self.total,
            "completed": self.completed,
            "shown": {name: finite(value) for name, value in self.shown.items()},
            "seconds": round(time.time() - self.began, 1),
        }


class WorkerProgress:
    """The stage's side. Rank 0 tells the runner and keeps `log/progress.json`; other ranks keep quiet."""

    def __init__(self, directory: Path, channel: Channel, speaks: bool = True):
        self._path = directory / "log" / "progress.json"
        self._channel, self._speaks = channel, speaks
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._sent = self._written = self._printed = 0.0

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[WorkerTask]:
        task = WorkerTask(self, next(self._numbers), description, total)
        self._printed = time.monotonic()
        self.changed(task, now=True)
        try:
            yield task
        finally:
            self.changed(task, now=True, ended=True)

    def changed(self, task: WorkerTask, now: bool = False, ended: bool = False) -> None:
        """Tell of a change, unless the last telling was a moment ago."""
        clock = time.monotonic()
        if not self._speaks or not (now or clock - self._sent >= EVENT_EVERY_S):
            return
        with self._lock:
            self._sent = clock
            state = task.state()
            self._channel.send("progress", patience_s=0.5 if ended else 0.0, ended=ended, **state)
            if now or clock - self._written >= FILE_EVERY_S:
                self._written = clock
                self._keep(state | {"time": time.time()})
            if ended or clock - self._printed >= LINE_EVERY_S:
                self._printed = clock
                print(line_of(state), flush=True)

    def _keep(self, state: dict[str, Any]) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, default=str))
        temporary.replace(self._path)


def line_of(state: dict[str, Any]) -> str:
    """One bar as a line of text."""
    total, completed, seconds = state.get("total"), state["completed"], state.get("seconds", 0.0)
    count = f"{number(completed)}/{number(total)}" if total else number(completed)
    left = ""
    if total and completed and completed < total:
        left = f"  {duration(seconds * (total - completed) / completed)} left"
    shown = shown_text(state.get("shown", {}))
    return f"{state['description']}  {count}{'  ' + shown if shown else ''}{left}"


class Display:
    """The runner's side: rich bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = console.is_terminal
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._printed = 0.0

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Around one stage's run."""
        self._tasks, self._printed = {}, time.monotonic()
        if not self.bars:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[shown]}", style="dim", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            yield
        self._progress = None

    def show(self, state: dict[str, Any]) -> None:
        """One progress message of the stage."""
        if self._progress is None:
            clock = time.monotonic()
            if clock - self._printed >= LINE_EVERY_S:
                self._printed = clock
                self.console.print(f"      {line_of(state)}", markup=False, highlight=False)
            return
        total, completed = state.get("total"), state["completed"]
        fields: dict[str, Any] = {
            "count": f"{number(completed)}/{number(total)}" if total else number(completed),
            "shown": shown_text(state.get("shown", {})),
        }
        key = state["task"]
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(state["description"], total=total, **fields)
        self._progress.update(self._tasks[key], completed=completed, total=total, **fields)
        if state.get("ended"):
            self._progress.remove_task(self._tasks.pop(key))

    def say(self, text: str, style: str = "") -> None:
        """A line above the bars."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
