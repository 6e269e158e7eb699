"""`tandem doctor`: what SLURM says on the login node, then a job of one task a GPU that looks for itself."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline import logs
from pipeline.slurm import queue
from pipeline.slurm.cluster import Cluster, Placement, TrainPlacement, seconds_of
from pipeline.slurm.doctor_checks import FAILURE, WARNING, Finding, Wanted, login_checks
from pipeline.slurm.doctor_findings import job_findings
from pipeline.slurm.script import TEMPLATE, JobSpec, render
from stages.base import StageError

DOCTOR_TEMPLATE = TEMPLATE.with_name("doctor.sbatch")
JOB_LIMIT = "00:30:00"
POLL_S = 1.0
STYLES = {WARNING: "yellow", FAILURE: "red"}


def wanted(cluster: Cluster) -> dict[str, Wanted]:
    """What the file's jobs ask of each partition that it names: of several jobs, the most."""
    placements: list[Placement] = [cluster.train, cluster.data]
    found: dict[str, Wanted] = {}
    for placement in placements:
        if placement.partition is None:
            continue
        one = _wanted(placement)
        before = found.get(placement.partition)
        found[placement.partition] = one if before is None else _most((before, one))
    return found


def _wanted(placement: Placement) -> Wanted:
    limit_s = seconds_of(placement.time_limit)
    if isinstance(placement, TrainPlacement):
        cpus = placement.cpus_per_gpu * placement.gpus_per_node
        return Wanted(placement.nodes, placement.gpus_per_node, cpus, limit_s)
    return Wanted(1, 0, int(getattr(placement, "cpus", 1)), limit_s)


def _most(both: Sequence[Wanted]) -> Wanted:
    return Wanted(
        max(one.nodes for one in both),
        max(one.gpus_per_node for one in both),
        max(one.cpus_per_node for one in both),
        max(one.time_limit_s for one in both),
    )


def examine(
    cluster: Cluster, root: Path, python: str, say: Callable[[str], None], *, wait_s: float, login_only: bool
) -> list[Finding]:
    """All findings; a job is sent only where the login node found nothing that would stop it."""
    findings = login_checks(wanted(cluster))
    if login_only or any(finding.state == FAILURE for finding in findings):
        return findings
    directory = root.resolve() / "doctor" / time.strftime("%Y%m%d-%H%M%S")
    return findings + _from_job(cluster, directory, python, say, wait_s)


def _from_job(
    cluster: Cluster, directory: Path, python: str, say: Callable[[str], None], wait_s: float
) -> list[Finding]:
    directory.mkdir(parents=True)
    arguments = ["--directory", str(directory)]
    if cluster.scratch is not None:
        arguments += ["--scratch", cluster.scratch]
    spec = JobSpec(
        name="tandem-doctor",
        comment="tandem-doctor",
        log=directory / "job-%j.log",
        arguments=tuple(arguments),
        placement=cluster.train.model_copy(update={"time_limit": JOB_LIMIT}),
        working_directory=directory,
        python=python,
    )
    script = directory / "doctor.sbatch"
    script.write_text(render(spec, cluster, DOCTOR_TEMPLATE), encoding="utf-8")
    job = queue.submit(script)
    tasks = cluster.train.nodes * cluster.train.gpus_per_node
    say(f"job {job}: {tasks} tasks on {cluster.train.nodes} nodes look around; log and report: {directory}")
    try:
        state = _wait(job, wait_s, say)
    except BaseException:
        queue.cancel([job])
        raise
    report = _report(directory / "doctor.json")
    if report is None:
        tail = logs.tail(directory / f"job-{job}.log", lines=5)
        seen = f"job {job} ended as {state} without a report" + (f": {' | '.join(tail)}" if tail else "")
        return [Finding("job", FAILURE, seen, f"read {directory}/job-{job}.log")]
    return job_findings(report)


def _wait(job: int, wait_s: float, say: Callable[[str], None]) -> str:
    """Until the job ended; its state."""
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        known = queue.jobs([job])
        state = known[0].state if known else "gone"
        if not known or not known[0].live:
            return state
        now = f"job {job}: {state.lower()}" + (f" ({known[0].reason})" if known[0].waits else "")
        if now != shown:
            say(now)
            shown = now
        if time.monotonic() > deadline:
            raise StageError(f"job {job} did not end within {wait_s:.0f} s ({now}); it is cancelled")
        time.sleep(POLL_S)


def _report(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def table(findings: Iterable[Finding]) -> Table:
    """What was seen, and what to do where it is not well."""
    made = Table("check", "", "seen", "what to do", box=box.SIMPLE_HEAD)
    for one in findings:
        style = STYLES.get(one.state, "green")
        made.add_row(Text(one.check), Text(one.state, style=style), Text(one.seen), Text(one.remedy))
    return made
