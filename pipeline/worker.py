"""One process of one stage: `python -m pipeline.worker RECIPE --stage S --root R`; rank 0 commits.

With --task 3 --tasks 200 it is one task of an array, which commits itself; with --finish --tasks 200 it joins
what the tasks made. Ranks come from RANK, WORLD_SIZE and LOCAL_RANK; TANDEM_STOP_AT is the unix time by which
it must have saved and ended. Exit codes: 0 done, 2 a mistake that the user can mend (or a full disk), 75
stopped and resumable, 76 ended because a rank stood still (resumable too), 1 a crash.
"""

import argparse
import ctypes
import errno
import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline import array_tasks, locks, logs, stop_time
from pipeline.events import Channel
from pipeline.fingerprint import Identity, absent_message, identities
from pipeline.progress import WorkerProgress
from pipeline.recipe import Recipe, load
from pipeline.run_directory import PARTS, RunDirectory
from pipeline.tracking import FileTracker, QuietTracker
from stages.base import (
    STALLED,
    Job,
    Report,
    SpoiltTasks,
    StageError,
    Stopped,
    end_stalled,
    stage_module,
    task_directory,
)

DONE, CRASHED, USER_ERROR, STOPPED = 0, 1, 2, 75
PARENT_VARIABLE = "TANDEM_PARENT_PID"
PROCESSES_VARIABLE = "TANDEM_PROCESSES"  # of a data stage: what a batch job has, in place of launch.processes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """Set by a signal, or by the clock at `stop_at` (unix seconds); the stage asks it between steps."""

    def __init__(self) -> None:
        self.set = False
        self.stop_at: float | None = None

    def install(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.set = True

    def __call__(self) -> bool:
        return self.set or stop_time.is_over(self.stop_at)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the process that started it dies."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(CRASHED)  # it died before the kernel was asked


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.worker", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--stage", required=True, metavar="S")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--fingerprint", help="refuse to run if the recipe has become another one")
    parser.add_argument("--tasks", type=int, metavar="N", help="of a stage that runs as an array")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=int, metavar="I", help="run task I of the array, from 0 on")
    part.add_argument("--finish", action="store_true", help="join what all the tasks made")
    options = parser.parse_args(given)
    if (options.tasks is not None) != (options.task is not None or options.finish):
        parser.error("--tasks goes with --task or with --finish")
    if options.tasks is not None and options.tasks < 1:
        parser.error(f"--tasks {options.tasks}: must be 1 or more")
    if options.task is not None and not 0 <= options.task < options.tasks:
        parser.error(f"--task {options.task}: must be from 0 to {options.tasks - 1}")
    return options


class _Notices(logging.Handler):
    """Warnings of Tandem's own modules go to the runner too, which shows them."""

    def __init__(self, channel: Channel):
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send("notice", patience_s=0.2, message=record.getMessage())


def _configure_logging(channel: Channel, rank: int) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    for package in ("pipeline", "stages", "learning", "data_tools"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        if rank == 0:
            logger.addHandler(_Notices(channel))


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage in this process; returns the exit code."""
    die_with_parent()
    should_stop = StopFlag().install()
    channel = Channel.from_environment()
    rank = int(os.environ.get("RANK", "0"))
    _configure_logging(channel, rank)
    options = arguments(given)
    directory: list[Path] = []
    try:
        should_stop.stop_at = stop_time.stop_at()
        _work(options, rank, channel, should_stop, directory)
        return DONE
    except Stopped as stopped:
        print(f"stopped: {stopped}", flush=True)
        return STOPPED
    except BaseException as error:
        return _failed(error, options, rank, channel, directory)


def _failed(
    error: BaseException, options: argparse.Namespace, rank: int, channel: Channel, directory: list[Path]
) -> int:
    """Say what happened where it will be looked for: the log, the rank's error record and the runner."""
    full = disk_full_message(error, directory[0] if directory else options.root)
    if isinstance(error, StageError):
        code, message = USER_ERROR, str(error)
    elif full is not None:
        code, message = USER_ERROR, full
    else:
        code, message = CRASHED, f"{type(error).__name__}: {error}"
    record = logs.ErrorRecord(rank, code, message, time.time(), task=options.task)
    channel.send("error", patience_s=2.0, rank=rank, code=code, message=message, time=record.time)
    if directory:
        logs.write_error(directory[0], record)
    try:
        if code == CRASHED:
            traceback.print_exception(error, file=sys.stdout)
        print(f"error: {message}", flush=True)
    except OSError:
        pass  # the log's disk is full; the runner has the message
    return code


def _stalled(channel: Channel, directory: Path, rank: int, message: str) -> NoReturn:
    """Say which rank stands still where it will be looked for, and end this process at once."""
    record = logs.ErrorRecord(rank, STALLED, message, time.time())
    channel.send("error", patience_s=2.0, rank=rank, code=STALLED, message=message, time=record.time)
    logs.write_error(directory, record)
    end_stalled(rank, message)


def disk_full_message(error: BaseException, near: Path) -> str | None:
    """A message if the cause (or its cause …) is a full disk or quota; else None."""
    seen: BaseException | None = error
    while seen is not None:
        number = getattr(seen, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(seen):
            name = getattr(seen, "filename", None)
            place = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else near
            free = _free_space(place)
            return f"no disk space left: {place} could not be written{free}; make room and run again"
        seen = seen.__cause__ or seen.__context__
    return None


def _free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return ""
    return f" ({free / 2**20:,.1f} MiB free at {path})"


def _work(
    options: argparse.Namespace, rank: int, channel: Channel, should_stop: StopFlag, directory: list[Path]
) -> None:
    recipe = load(options.recipe, options.overrides, until=options.stage)
    root = options.root.resolve()
    known = identities(recipe, root)
    identity = known[options.stage]
    if options.fingerprint is not None and not identity.fingerprint.startswith(options.fingerprint):
        raise StageError(
            f"{recipe.path}: it, or a file that it names, changed since the run began; run it again"
        )
    if identity.absent:
        raise StageError(absent_message(recipe, identity))
    run_directory = RunDirectory.of(root, recipe.name, identity)
    inputs = _inputs(recipe, known, identity, root)
    start = _Start(recipe, identity, run_directory, inputs, rank, channel, should_stop)
    if options.tasks is not None and not recipe.stages[options.stage].array:
        raise StageError(f"stages.{options.stage}: a {identity.kind} stage does not run as an array of tasks")
    if options.task is not None:
        _work_task(start, options.task, options.tasks, directory)
    elif options.finish or rank == 0:
        _work_whole(start, options.tasks, directory)
    elif not run_directory.check().done:  # rank 0 would not come to meet this one
        directory.append(run_directory.path)
        logs.clear_errors(run_directory.path, rank)
        _run(start, run_directory.path)


@dataclass(frozen=True)
class _Start:
    """What this process works on."""

    recipe: Recipe
    identity: Identity
    run_directory: RunDirectory
    inputs: dict[str, Path]
    rank: int
    channel: Channel
    should_stop: StopFlag


def _work_whole(start: _Start, tasks: int | None, directory: list[Path]) -> None:
    """The whole stage; or, once its `tasks` are done, what joins them."""
    run_directory = start.run_directory
    with run_directory.lock():
        if run_directory.check().done:
            return  # another run finished it while this one was starting
        directory.append(run_directory.path)
        began = time.monotonic()
        before_s = 0.0 if tasks is None else array_tasks.require_all(run_directory.path, tasks)
        run_directory.prepare(start.identity, start.recipe.name)
        logs.clear_errors(run_directory.path, start.rank)
        _note_start(run_directory.path)
        report = _run(start, run_directory.path) if tasks is None else _finish(start, tasks)
        content = run_directory.commit(start.identity, report, before_s + time.monotonic() - began)
        start.channel.send("done", patience_s=1.0, seconds=content["seconds"])


def _work_task(start: _Start, index: int, tasks: int, directory: list[Path]) -> None:
    """One task of an array. It holds its own directory: tasks run side by side."""
    stage_path = start.run_directory.path
    if start.run_directory.check().done:
        return
    describe = partial(start.run_directory.describe, start.identity, start.recipe.name)
    array_tasks.begin(stage_path, tasks, describe)
    own = task_directory(stage_path, index)
    with locks.hold(own):
        if array_tasks.record(stage_path, index) is not None:
            return
        array_tasks.forget(stage_path, [index])
        directory.append(stage_path)
        logs.clear_errors(stage_path, task=index)
        began = time.monotonic()
        _note_start(own)
        report = _run(start, own, "run_task", index, tasks)
        array_tasks.commit(stage_path, index, tasks, report, time.monotonic() - began)


def _finish(start: _Start, tasks: int) -> Report:
    try:
        return _run(start, start.run_directory.path, "finish", 0, tasks)
    except SpoiltTasks as error:
        array_tasks.forget(start.run_directory.path, error.tasks)
        raise


def _inputs(recipe: Recipe, known: dict[str, Identity], identity: Identity, root: Path) -> dict[str, Path]:
    """The input stages' directories. Raises StageError when one is not done."""
    inputs = {}
    for role, stage in identity.input_stages.items():
        upstream = RunDirectory.find(root, recipe.name, recipe.head.reuse, stage, known[stage].short)
        check = upstream.check()
        if not check.done:
            raise StageError(
                f"stages.{identity.stage}.inputs.{role}: stage '{stage}' is not done "
                f"({check.why}: {upstream.path}); run it first: tandem run {recipe.path} --until {stage}"
            )
        inputs[role] = upstream.path
    return inputs


def _note_start(directory: Path) -> None:
    """One line a start: so that restarts can be counted."""
    (directory / "log").mkdir(exist_ok=True)
    with (directory / "log" / "starts.log").open("a") as stream:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stream.write(f"{when} process {os.getpid()} host {socket.gethostname()}\n")


def _run(
    start: _Start, directory: Path, function: str = "run", task_index: int = 0, task_count: int = 1
) -> Report:
    """The stage itself, as this rank, or its part as this task; `directory` is the stage's or the task's."""
    config, head = start.recipe.stages[start.identity.stage], start.recipe.head
    for part in ("out", "log") if function == "run_task" else PARTS:
        (directory / part).mkdir(parents=True, exist_ok=True)
    job = Job(
        directory=directory,
        inputs=start.inputs,
        tracker=FileTracker(directory / "log") if start.rank == 0 else QuietTracker(),
        progress=WorkerProgress(directory, start.channel, speaks=start.rank == 0),
        should_stop=start.should_stop,
        seed=head.seed,
        recipe_directory=start.recipe.directory,
        task_index=task_index,
        task_count=task_count,
        processes=int(os.environ.get(PROCESSES_VARIABLE, head.launch.processes)),
        stop_at=start.should_stop.stop_at,
        stalled=partial(_stalled, start.channel, start.run_directory.path),
    )
    report: Any = getattr(stage_module(config.kind), function)(config, job)
    if not isinstance(report, Report):
        raise TypeError(
            f"stage kind '{config.kind}': {function}() returned {type(report).__name__}, not a Report"
        )
    return report


def leave(code: int) -> NoReturn:
    """End this process with the code."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or USER_ERROR
    if code != DONE:
        os._exit(code)  # threads of a failed stage must not keep the process
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
