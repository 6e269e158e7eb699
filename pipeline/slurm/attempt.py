"""One start of a job: `begin` notes it, `end` finds out how it ended and whether the job shall start again.

`python -m pipeline.slurm.attempt begin|end [--failures N] [--starts N] [--code C] -- <arguments of
pipeline.worker>`: slurm/stage.sbatch calls both, before and after srun. `begin` prints the stage's directory;
nothing where the stage is done, as when a node died between its end and the job's.
`end` prints the verdict; its exit code is 0 (done), 75 (start again) or what the job shall end with.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import array_tasks, logs, worker
from pipeline.results import view
from pipeline.run_directory import RunDirectory
from pipeline.status import last_metrics
from pipeline.tracking import METRICS
from stages.base import STALLED, StageError

STOPPED_FILE = "stopped.json"  # in log/: this start was asked to stop, and saved
_DIED = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<tasks>[0-9,-]+): (?P<how>.+)")
_SIGNALS = {  # as srun words them
    "Killed": signal.SIGKILL,
    "Out Of Memory": signal.SIGKILL,
    "Terminated": signal.SIGTERM,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
}


@dataclass(frozen=True)
class Start:
    """Which start of which job: a requeued job keeps its id."""

    job: str
    restart: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Start":
        return cls(environment.get("SLURM_JOB_ID", "0"), int(environment.get("SLURM_RESTART_COUNT", "0")))


@dataclass(frozen=True)
class Limits:
    """Of failures (crashes and stalls) of a job, and of its starts for whatever reason."""

    failures: int = 5
    starts: int = 1000


@dataclass(frozen=True)
class Verdict:
    """How a start ended. `code`: 0 done, 75 start again, else what the job ends with."""

    code: int
    how: str  # done, stopped, failed
    message: str
    rank: int | None = None
    step: int | None = None


class Ledger:
    """The starts of a stage (or of one task of it), a line each for begin and end, in its log folder."""

    def __init__(self, directory: Path, task: int | None = None):
        self.path = directory / "log" / ("attempts.jsonl" if task is None else f"task{task}.attempts.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # cut short by a power cut
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def add(self, event: str, start: Start, values: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"event": event, **asdict(start), "time": time.time(), **values}
        with self.path.open("a", encoding="utf-8") as stream:
            # in front too: a power cut may have left half a line
            stream.write("\n" + json.dumps(row, ensure_ascii=False) + "\n")


def is_done(directory: Path, task: int | None) -> bool:
    """Whether the stage, or this task of it, is done."""
    if task is not None and array_tasks.record(directory, task) is not None:
        return True
    return RunDirectory(directory).check().done


def begin(directory: Path, task: int | None, start: Start, limits: Limits) -> None:
    """Note the start. Raises StageError when the job has started too often."""
    if start.restart >= limits.starts:
        raise StageError(
            f"the job has started {start.restart} times, restarts.total is {limits.starts}: raise it in the "
            "cluster file, or find out in its log why it does not stay"
        )
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    Ledger(directory, task).add("begin", start, {"nodes": nodes})
    (directory / "log" / STOPPED_FILE).unlink(missing_ok=True)
    if task is None:
        logs.clear_errors(directory)


def end(directory: Path, task: int | None, start: Start, limits: Limits, srun_code: int) -> Verdict:
    """Judge this start, and note the verdict."""
    ledger = Ledger(directory, task)
    verdict = judge(directory, task, ledger.rows(), start, limits, srun_code)
    try:
        ledger.add("end", start, asdict(verdict))
    except OSError as error:  # a full disk must not take the verdict along
        print(f"tandem: {ledger.path}: the verdict could not be noted: {error}", file=sys.stderr)
    return verdict


def judge(
    directory: Path,
    task: int | None,
    before: Sequence[Mapping[str, Any]],
    start: Start,
    limits: Limits,
    srun_code: int,
) -> Verdict:
    """How this start ended, from what it left; `before`: the ledger's rows so far."""
    if is_done(directory, task):
        return Verdict(worker.DONE, "done", "done")
    step = last_metrics(directory / "log" / METRICS).get("step") if task is None else None
    # Of this job: whoever submits again starts afresh
    ends = [row for row in before if row.get("event") == "end" and row.get("job") == start.job]
    failures = sum(row.get("how") == "failed" for row in ends)
    # srun tells the others to stop when one rank fails: that is no stop
    stopped = _stopped(directory, start) if srun_code == 0 else None
    if stopped is not None:
        got_on = not ends or ends[-1].get("how") != "stopped" or ends[-1].get("step") != step
        if got_on:
            return Verdict(worker.STOPPED, "stopped", f"{stopped}; it goes on from there", step=step)
        cause = logs.ErrorRecord(0, worker.STOPPED, "stopped twice at the same step", time.time())
    else:
        cause = _cause(directory, task, start, srun_code)
    failed = Verdict(cause.code, "failed", cause.message, cause.rank, step)
    if cause.code == worker.USER_ERROR:
        return failed
    code = STALLED if cause.code == STALLED else worker.CRASHED
    if stopped is None and _same(ends, failed):
        message = f"the same as at the start before, at step {step}: {cause.message}"
        return Verdict(code, "failed", message, cause.rank, step)
    if failures >= limits.failures:
        message = f"failure {failures + 1}, restarts.failures is {limits.failures}: {cause.message}"
        return Verdict(code, "failed", message, cause.rank, step)
    return Verdict(worker.STOPPED, "failed", cause.message, cause.rank, step)


def _stopped(directory: Path, start: Start) -> str | None:
    """What a rank said of a stop that was asked for, in this start."""
    try:
        content = json.loads((directory / "log" / STOPPED_FILE).read_text())
        return str(content["message"]) if content["start"] == asdict(start) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_stopped(directory: Path, start: Start, message: str) -> None:
    """Called by rank 0 when the stage stopped because it was asked to."""
    path = directory / "log" / STOPPED_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"start": asdict(start), "message": message}))
    temporary.replace(path)


def _cause(directory: Path, task: int | None, start: Start, srun_code: int) -> logs.ErrorRecord:
    """The first error: a killed rank comes before the peers that noticed it."""
    records = [record for record in logs.read_errors(directory) if record.task == task]
    records += died(srun_log(directory, start))
    if records:
        cause = min(records, key=lambda record: record.cause_order)
        if task is None and cause.signal is not None:
            logs.write_error(directory, cause)  # it could say nothing itself
        return cause
    return logs.ErrorRecord(0, worker.CRASHED, f"srun ended with exit code {srun_code}", time.time())


def srun_log(directory: Path, start: Start) -> Path:
    """Where slurm/stage.sbatch keeps what srun itself says."""
    return directory / "log" / f"srun.{start.job}.{start.restart}.log"


def died(path: Path) -> list[logs.ErrorRecord]:
    """The task that ended first, if srun reports that a signal killed it: it could leave no record.

    Those that srun names after the first are mostly the ones that it killed itself.
    """
    lines = (_DIED.match(line) for line in logs.tail(path, lines=1000, most_bytes=1 << 20))
    first = next((found for found in lines if found), None)
    number = (
        None
        if first is None
        else next((n for how, n in _SIGNALS.items() if first["how"].startswith(how)), None)
    )
    if first is None or number is None:
        return []
    rank = int(re.split("[,-]", first["tasks"])[0])
    memory = " (out of memory?)" if number == signal.SIGKILL else ""
    message = f"killed on {first['host']}: {first['how']}{memory}"
    return [logs.ErrorRecord(rank, -number, message, path.stat().st_mtime, number)]


def _same(ends: Sequence[Mapping[str, Any]], failed: Verdict) -> bool:
    """Whether the start before failed with the same words at the same step, numbers in the words apart."""
    if not ends or ends[-1].get("how") != "failed" or ends[-1].get("step") != failed.step:
        return False
    return _words(str(ends[-1].get("message"))) == _words(failed.message)


def _words(message: str) -> str:
    return re.sub(r"[0-9]+", "#", re.sub(r"\bon \S+:", "on a node:", message))


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.slurm.attempt", description=__doc__)
    parser.add_argument("what", choices=["begin", "end"])
    parser.add_argument("--failures", type=int, default=Limits.failures)
    parser.add_argument("--starts", type=int, default=Limits.starts)
    parser.add_argument("--code", type=int, default=0, help="srun's")
    return parser.parse_args(given)


def stage_directory(options: argparse.Namespace) -> Path:
    """Of the stage that the worker's options name. Raises StageError if the recipe became another one."""
    runs = view(options.recipe, options.root, options.overrides).stages
    run = next((run for run in runs if run.name == options.stage), None)
    if run is None:
        raise StageError(
            f"{options.recipe}: there is no stage '{options.stage}'; stages: "
            f"{', '.join(run.name for run in runs)}"
        )
    if options.fingerprint is not None and not options.fingerprint.startswith(run.directory.name):
        raise StageError(
            f"{options.recipe}: it, or a file that it names, changed since stage '{options.stage}' was "
            "submitted: submit it again"
        )
    return run.directory


def main(given: Sequence[str]) -> int:
    """Returns the exit code."""
    middle = given.index("--")
    options, own = _arguments(given[:middle]), worker.arguments(given[middle + 1 :])
    limits, start = Limits(options.failures, options.starts), Start.of(os.environ)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the batch script reads the directory and nothing else
            directory = stage_directory(own)
            done_before = options.what == "begin" and is_done(directory, own.task)
            if options.what == "begin" and not done_before:
                begin(directory, own.task, start, limits)
    except (StageError, OSError) as error:
        full = worker.disk_full_message(error, own.root)
        print(f"tandem: {full or error}", file=sys.stderr)
        return worker.USER_ERROR if full or isinstance(error, StageError) else worker.CRASHED
    if options.what == "begin":
        print("" if done_before else directory)
        return worker.DONE
    verdict = end(directory, own.task, start, limits, options.code)
    rank = "" if verdict.rank is None else f" (rank {verdict.rank})"
    what = {worker.DONE: "done", worker.STOPPED: "starts again"}.get(verdict.code, "given up")
    print(f"tandem: {own.stage}: {what}: {verdict.message}{rank}")
    return verdict.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
