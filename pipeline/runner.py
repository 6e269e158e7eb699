"""Runs a plan on this machine, stage after stage, each in processes of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import logs, plan, stop_time
from pipeline.fingerprint import absent_message
from pipeline.launch import Launcher, Outcome, StopRequest, environment, worker_command
from pipeline.mlflow_follow import Follower, tracking_uri
from pipeline.plan import Plan, StagePlan
from pipeline.progress import Display, duration, number
from pipeline.recipe import load
from pipeline.results import RunView, view
from pipeline.run_directory import RunDirectory
from pipeline.warden import Warden
from pipeline.worker import DONE, STOPPED
from stages.base import STALLED, StageError


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    recipe: Path
    root: Path
    overrides: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    tracking_uri: str | None = None
    stop_at: float | None = None  # unix seconds by which all must be saved


@dataclass
class Ran:
    """What a run did."""

    code: int
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    directories: dict[str, Path] = field(default_factory=dict)
    failed: str | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.code,
            "ran": self.ran,
            "reused": self.reused,
            "failed": self.failed,
            "error": self.error,
            "directories": {name: str(path) for name, path in self.directories.items()},
        }


def run(request: Request, console: Console) -> Ran:
    """Run what the plan says, in order, up to a stage that fails. Raises StageError for a bad request."""
    recipe = load(request.recipe, request.overrides)
    root = request.root.resolve()
    made = plan.make(recipe, root)
    chosen = made.between(request.first, request.last)
    absent = [absent_message(recipe, stage.identity) for stage in chosen if stage.identity.absent]
    if absent:
        raise StageError("\n".join(absent))
    for stage in chosen:
        if stage.action != "reuse":
            stage.directory.refuse_if_held()
    display = Display(console)
    tracking = recipe.head.tracking
    follower = Follower(
        tracking_uri(tracking, root, request.tracking_uri),
        tracking.experiment,
        root / recipe.name,
        lambda text: display.say(text, "yellow"),
    )
    with StopRequest().installed() as stop:
        result = Ran(DONE, directories={stage.name: stage.directory.path for stage in made.stages})
        try:
            follower.follow_behind([s.directory.path for s in made.stages if s.check.done])
            _run_stages(request, made, chosen, display, stop, follower, result)
        finally:
            follower.finish()
        if result.code == DONE and any(stage.kind == "evaluate" for stage in chosen):
            display.say(f"report: {refresh_report(request.recipe, request.root, request.overrides)}")
    return result


def _run_stages(
    request: Request,
    made: Plan,
    chosen: Sequence[StagePlan],
    display: Display,
    stop: StopRequest,
    follower: Follower,
    result: Ran,
) -> None:
    width = max(len(stage.name) for stage in chosen)
    runs_any = any(stage.action != "reuse" for stage in chosen)
    with Warden() if runs_any else _NoWarden() as warden:
        for k, stage in enumerate(chosen, start=1):
            head = f"[{k}/{len(chosen)}] {stage.name:<{width}}"
            if stage.action == "reuse":
                result.reused.append(stage.name)
                display.say(f"{head}  reused  {_counts(stage.check.content)}", "dim")
                continue
            if stop.count or stop_time.is_over(request.stop_at):
                result.code = STOPPED
                display.say(f"stopped before {stage.name}; run the same command to go on", "yellow")
                return
            assert warden is not None
            display.say(f"{head}  {'resumes' if stage.action == 'resume' else 'runs'}    {stage.why}")
            began = time.monotonic()
            outcome = _launch(request, made, stage, display, stop, warden, follower)
            if outcome.code == DONE:
                result.ran.append(stage.name)
                check = stage.directory.check()
                took = duration(time.monotonic() - began)
                display.say(f"{head}  done    {took}  {_counts(check.content)}", "green")
                continue
            result.code, result.failed = outcome.code, stage.name
            _tell_end(request, stage, outcome, display, result)
            return


class _NoWarden:
    """Where nothing runs, nothing is watched."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _launch(
    request: Request,
    made: Plan,
    stage: StagePlan,
    display: Display,
    stop: StopRequest,
    warden: Warden,
    follower: Follower,
) -> Outcome:
    launch = made.recipe.head.launch
    follower.follow(stage.directory.path)
    launcher = Launcher(
        command=worker_command(
            request.recipe, stage.name, made.root, request.overrides, stage.identity.fingerprint
        ),
        directory=stage.directory.path,
        processes=launch.processes if stage.distributed else 1,
        environment=environment(launch.threads_per_process, stage.distributed)
        | ({} if request.stop_at is None else {stop_time.VARIABLE: str(request.stop_at)}),
        display=display,
        stop=stop,
        warden=warden,
    )
    with display.stage():
        return launcher.run()


def _tell_end(request: Request, stage: StagePlan, outcome: Outcome, display: Display, result: Ran) -> None:
    """Say why the run ends here, and what to do."""
    if outcome.code == STOPPED:
        result.failed = None
        display.say(f"stopped in {stage.name}; run the same command to go on", "yellow")
        return
    error = outcome.error
    assert error is not None
    result.error = error.message
    rank_log = logs.log_path(stage.directory.path, error.rank)
    if error.code == 2:
        display.say(f"{stage.name}: {error.message}", "red")
        return
    lines = "\n".join(f"  | {line}" for line in outcome.log_tail)
    display.say(f"last lines of {rank_log}:\n{lines}")
    happened = "stalled" if error.code == STALLED else "failed"
    display.say(
        f"stage {stage.name} {happened}: rank {error.rank}, exit code {error.code}: {error.message}\n"
        "the stages before it are kept; run the same command to go on from the last checkpoint",
        "red",
    )


def _counts(content: dict[str, Any] | None) -> str:
    """The first few counts of a stage that are not zero: '4,812 kept, …'."""
    counts = (content or {}).get("counts", {})
    told = [(name, value) for name, value in counts.items() if value]
    return ", ".join(f"{number(value)} {name}" for name, value in told[:4])


def report_path(run_view: RunView) -> Path:
    return run_view.root / run_view.name / "report.html"


def refresh_report(recipe: Path, root: Path, overrides: Sequence[str]) -> Path:
    """Write the report, unless one is there that is newer than every stage's end."""
    run_view = view(recipe, root, overrides)
    path = report_path(run_view)
    newest = max(
        (RunDirectory(s.directory).done_path.stat().st_mtime for s in run_view.stages if s.done), default=0
    )
    shown = path.with_name(".report.json")  # of which directories the report is
    directories = "\n".join(str(stage.directory) for stage in run_view.stages)
    if not (
        path.is_file()
        and path.stat().st_mtime > newest
        and shown.is_file()
        and shown.read_text() == directories
    ):
        from pipeline.report import write_report  # it needs matplotlib

        path = write_report(run_view, path)
        shown.write_text(directories)
    return path
