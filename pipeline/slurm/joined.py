"""`tandem status` on a cluster: what the run directories say, joined with what SLURM says of the jobs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import array_tasks, logs
from pipeline.results import RunView, StageRun
from pipeline.slurm import queue
from pipeline.slurm.attempt import Ledger
from pipeline.slurm.queue import QueuedJob, QueueError
from pipeline.slurm.submit import StageJobs, jobs_of, sent_jobs
from pipeline.status import StageStatus, progress

TAIL_LINES = 8  # of the log of what failed
# Reasons for which a job will never start by itself.
STUCK = (
    "DependencyNeverSatisfied",
    "JobHeldUser",
    "JobHeldAdmin",
    "BadConstraints",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "InvalidAccount",
    "InvalidQOS",
    "AccountNotAllowed",
    "QOSNotAllowed",
)


def join(run: RunView, rows: Sequence[StageStatus]) -> tuple[list[StageStatus], str | None]:
    """The rows with their jobs, and why SLURM could not be asked (None: it was, or no job was ever sent)."""
    sent = sent_jobs(run)
    by_hand = any((stage.directory / "log" / "attempts.jsonl").is_file() for stage in run.stages)
    if not sent and not by_hand:
        return list(rows), None
    try:
        known = queue.jobs()
        problem = None
    except QueueError as error:
        known, problem = [], str(error)
    joined = []
    for stage, row in zip(run.stages, rows, strict=True):
        of_stage = [one for one in sent if one["stage"] == stage.name]
        own = [one for one in of_stage if one["directory"] == stage.directory.name]
        row = _joined(stage, row, jobs_of(run, stage, known), own, asked=problem is None)
        if row.state == "waiting" and of_stage and not own:
            row = replace(row, doing=_of_earlier(of_stage[-1], known))
        joined.append(row)
    return joined, problem


def _of_earlier(sent: dict[str, Any], known: Sequence[QueuedJob]) -> str:
    """The stage was sent, and then the recipe, or a file that it names, became another one."""
    job = next((one for one in known if one.id == sent["job"] and one.live), None)
    if job is None:
        return f"the recipe changed after job {sent['job']}: submit it again"
    return f"job {job.id} ({job.state.lower()}) is of the recipe before it changed: cancel it, submit again"


def _joined(
    stage: StageRun, row: StageStatus, jobs: StageJobs, sent: Sequence[dict[str, Any]], asked: bool
) -> StageStatus:
    row = replace(row, **_tasks(stage), **_restarts(stage))
    if row.state == "done":
        return row
    live = [job for job in jobs.all if job.live]
    if live:
        return _of_live(row, live)
    if not asked or not (jobs.all or sent):
        return row
    return _of_ended(stage, row, sent)


def _tasks(stage: StageRun) -> dict[str, Any]:
    done, total = array_tasks.progress(stage.directory)
    return {"tasks_done": done, "tasks": total} if total else {}


def _restarts(stage: StageRun) -> dict[str, Any]:
    begins = [one for one in Ledger(stage.directory).rows() if one.get("event") == "begin"]
    return {"starts": len(begins)} if begins else {}


def _of_live(row: StageStatus, live: Sequence[QueuedJob]) -> StageStatus:
    """Queued or running, whatever the directory says: its lock may not be seen from the login node."""
    running = [job for job in live if not job.waits]
    first = (running or list(live))[0]
    shown = str(first.id) if len(live) == 1 else f"{first.array_id} (+{len(live) - 1})"
    reason = first.reason if first.reason not in ("None", "") and not running else ""
    if running:
        if row.state != "running":
            row = replace(row, **progress(Path(row.directory)))
        return replace(row, state="running", job=shown, error=None, holder=first.nodes or row.holder)
    starts = "" if first.starts_at in ("N/A", "") else f", to start {first.starts_at}"
    stuck = f"SLURM will not start it: {reason}" if reason in STUCK else None
    return replace(row, state="queued", job=shown, doing=f"{reason}{starts}", error=stuck, completed=None)


def _of_ended(stage: StageRun, row: StageStatus, sent: Sequence[dict[str, Any]]) -> StageStatus:
    """No job is left and the stage is not done: how the last one ended, and the end of the right log."""
    last = sent[-1] if sent else None
    job = None if last is None else int(last["job"])
    how = None if job is None else queue.ended(job)
    ends = [one for one in Ledger(stage.directory).rows() if one.get("event") == "end"]
    verdict: dict[str, Any] = ends[-1] if ends else {}
    if row.state == "waiting" and how is not None and how.state.startswith("CANCELLED"):
        return replace(row, state="cancelled", job=str(job), doing="it waits for a stage before it")
    if verdict.get("how") == "failed":
        row = replace(row, error=str(verdict["message"]), error_rank=verdict.get("rank"))
    if row.error is None and how is not None and how.state not in ("COMPLETED", "CANCELLED"):
        why = f", {how.reason}" if how.reason not in ("", "None") else ""
        row = replace(row, error=f"job {job} ended as {how.state} (exit code {how.exit_code}{why})")
    state = "failed" if row.error else row.state
    log = None if last is None else Path(str(last["log"]).replace("%j", str(job)))
    return replace(row, state=state, job=None if job is None else str(job), last_lines=_tail(stage, row, log))


def _tail(stage: StageRun, row: StageStatus, job_log: Path | None) -> tuple[str, ...]:
    """Of the log of the rank or task that failed; of the job's own where that one said nothing."""
    if not row.error:
        return ()
    paths = [] if row.error_rank is None else [logs.log_path(stage.directory, row.error_rank)]
    if row.error_task is not None:
        paths = [stage.directory / "log" / f"task{row.error_task}.log"]
    for path in [*paths, *([job_log] if job_log else [])]:
        lines = logs.tail(path, lines=TAIL_LINES)
        if lines:
            return tuple(lines)
    return ()
