"""`tandem submit` and `tandem cancel`: one job a stage, chained; what is done or under way is not sent."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import array_tasks, leaks, logs
from pipeline.recipe import load_head
from pipeline.recipe_source import nearest
from pipeline.results import RunView, StageRun, view
from pipeline.run_directory import RunDirectory
from pipeline.slurm import queue
from pipeline.slurm.attempt import Ledger
from pipeline.slurm.cluster import Cluster, DataPlacement, TrainPlacement, load
from pipeline.slurm.queue import QueuedJob, QueueError
from pipeline.slurm.script import JobSpec, render
from stages.base import StageError

USUAL_MAX_ARRAY_SIZE = 1001  # SLURM's default, for a --dry-run where there is no SLURM
LOCK_WAIT_S = 60.0
SETTLE_S = 90.0
Part = Literal["whole", "tasks", "finish"]


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    recipe: Path
    root: Path
    cluster: Path
    overrides: tuple[str, ...] = ()
    first: str | None = None
    dry_run: bool = False
    python: str = "python"  # that the jobs use where the cluster file gives none


@dataclass
class Sent:
    """What became of one stage: its jobs, the new ones with their scripts."""

    stage: str
    action: Literal["done", "live", "submitted"]
    jobs: list[int] = field(default_factory=list)  # that a later stage waits for
    what: str = ""
    scripts: dict[str, str] = field(default_factory=dict)  # file name: text

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "action": self.action,
            "jobs": self.jobs,
            "what": self.what,
            "scripts": self.scripts,
        }


def marker(run: RunView, stage: StageRun | None = None) -> str:
    """The comment by which a job is found: recipe, root and, of a stage, its directory."""
    root = hashlib.sha256(str(run.root).encode()).hexdigest()[:8]
    of_stage = "" if stage is None else f"{stage.name}/{stage.directory.name}"
    return f"tandem:{run.name}@{root}/{of_stage}"


@dataclass(frozen=True)
class StageJobs:
    """The jobs of one stage that SLURM knows, by what they do."""

    whole: tuple[QueuedJob, ...] = ()
    tasks: tuple[tuple[int, QueuedJob], ...] = ()  # (offset, job)
    finish: tuple[QueuedJob, ...] = ()

    @property
    def all(self) -> tuple[QueuedJob, ...]:
        return (*self.whole, *(job for _, job in self.tasks), *self.finish)

    def live_tasks(self) -> set[int]:
        return {offset + index for offset, job in self.tasks if job.live for index in job.task_numbers()}


def jobs_of(run: RunView, stage: StageRun, known: Sequence[QueuedJob]) -> StageJobs:
    """Found by their comment; one that was sent by hand, by the stage's own record of its starts."""
    base = marker(run, stage)
    starts = {str(row.get("job")) for row in Ledger(stage.directory).rows()[-2:]}
    whole, tasks, finish = [], [], []
    for job in known:
        rest = job.comment.removeprefix(base)
        if not job.comment.startswith(base):
            if not job.comment.startswith("tandem:") and str(job.id) in starts:
                whole.append(job)
        elif rest.startswith("/tasks+"):
            tasks.append((int(rest.removeprefix("/tasks+")), job))
        elif rest == "/finish":
            finish.append(job)
        else:
            whole.append(job)
    return StageJobs(tuple(whole), tuple(tasks), tuple(finish))


def submit(request: Request) -> list[Sent]:
    """Send what is missing. Raises StageError for bad input, QueueError with what was sent before."""
    cluster = load(request.cluster)
    run = view(request.recipe, request.root, request.overrides)
    head, source = load_head(request.recipe, request.overrides)
    leaks.check(source, head.stages)
    cluster.check_stages({stage.name: stage.distributed for stage in run.stages}, request.cluster)
    chosen = _chosen(run, request.first)
    _check_ranks(chosen, cluster, request.cluster)
    absent = [stage.absent for stage in chosen if stage.absent and not stage.done]
    if absent:
        raise StageError("\n".join(absent))
    if request.dry_run:
        return _Submission(request, run, cluster).send()
    folder = place(run)
    (folder / "log").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "submit.lock", timeout=LOCK_WAIT_S):
            return _Submission(request, run, cluster).send()
    except Timeout:
        raise StageError(f"{folder}: another `tandem submit` of this recipe is at work") from None


def _check_ranks(chosen: Sequence[StageRun], cluster: Cluster, path: Path) -> None:
    """A batch that does not fit the ranks is told now, not when the job starts, days later."""
    for stage in chosen:
        if stage.done or not stage.distributed or stage.ranks_wanted is None:
            continue
        placement = cluster.train_placement(stage.name)
        ranks = placement.nodes * placement.gpus_per_node
        if ranks != stage.ranks_wanted:
            raise StageError(
                f"{path}: stage '{stage.name}' would have {placement.nodes} nodes × "
                f"{placement.gpus_per_node} GPUs = {ranks} ranks; its contrastive_batch / batch_per_gpu is "
                f"{stage.ranks_wanted}: change the recipe, or nodes and gpus_per_node of `train` or of this "
                "stage"
            )


def place(run: RunView) -> Path:
    """Where a recipe's scripts, their logs and the list of jobs are kept."""
    return run.root / run.name / "slurm"


def sent_jobs(run: RunView) -> list[dict[str, Any]]:
    """The list of jobs ever sent for the recipe, in order."""
    try:
        text = (place(run) / "jobs.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # cut short by a power cut or a full disk
            found.append(json.loads(line))
    return found


def cancel(run: RunView) -> list[QueuedJob]:
    """Cancel every live job of the recipe under its root, those that wait first. What runs saves and ends."""
    known = queue.jobs()
    live = [job for job in known if job.live and job.comment.startswith(marker(run))]
    by_hand = [job for stage in run.stages for job in jobs_of(run, stage, known).whole if job.live]
    live += [job for job in by_hand if job.id not in {one.id for one in live}]
    live.sort(key=lambda job: not job.waits)
    queue.cancel(dict.fromkeys(job.array_id for job in live))
    return live


def _chosen(run: RunView, first: str | None) -> list[StageRun]:
    names = [stage.name for stage in run.stages]
    if first is None:
        return run.stages
    if first not in names:
        raise StageError(
            f"--from: there is no stage '{first}'{nearest(first, names)}; stages: {', '.join(names)}"
        )
    return run.stages[names.index(first) :]


def _settled_jobs(own: str) -> list[QueuedJob]:
    """This user's jobs, once none whose comment begins with `own` is on its way out: it may still save."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        known = queue.jobs()
        leaving = [job for job in known if job.comment.startswith(own) and job.state == "COMPLETING"]
        if not leaving or time.monotonic() > deadline:
            return known
        time.sleep(0.5)


class _Submission:
    """One call of `submit`."""

    def __init__(self, request: Request, run: RunView, cluster: Cluster):
        self.request, self.cluster = request, cluster
        self.folder = place(run)
        self.known: list[QueuedJob] = []
        self.most = USUAL_MAX_ARRAY_SIZE
        try:
            self.known = _settled_jobs(marker(run))
            if any(stage.array for stage in run.stages):
                self.most = queue.max_array_size()
        except QueueError:
            if not request.dry_run:
                raise
        # After the jobs: a stage whose job ends in between is then seen as done
        self.run = view(request.recipe, request.root, request.overrides)
        self.sent: dict[str, Sent] = {}
        self._imagined = 0

    def send(self) -> list[Sent]:
        chosen = _chosen(self.run, self.request.first)
        inside = {stage.name for stage in chosen}
        for stage in self.run.stages:
            if stage.name not in inside:
                self._check_outside(stage, chosen)
        for stage in chosen:
            try:
                self.sent[stage.name] = self._stage(stage)
            except QueueError as error:
                new = [f"{one.stage} (job {one.jobs[-1]})" for one in self.sent.values() if one.scripts]
                before = f" Submitted before that: {', '.join(new)}." if new else ""
                raise QueueError(f"stage {stage.name}: {error}.{before} Mend it and submit again.") from error
        return [self.sent[stage.name] for stage in chosen]

    def _check_outside(self, stage: StageRun, chosen: Sequence[StageRun]) -> None:
        """A stage before --from that a chosen one reads is done or has live jobs."""
        readers = [reader.name for reader in chosen if stage.name in reader.reads]
        if not readers:
            return
        live = [job.id for job in jobs_of(self.run, stage, self.known).all if job.live]
        if not stage.done and not live:
            raise StageError(
                f"--from: stage '{readers[0]}' reads '{stage.name}', which is not done and has no job; "
                f"submit from '{stage.name}' or earlier"
            )
        self.sent[stage.name] = Sent(stage.name, "done" if stage.done else "live", [] if stage.done else live)

    def _stage(self, stage: StageRun) -> Sent:
        if stage.done:
            return Sent(stage.name, "done", what="done")
        found = jobs_of(self.run, stage, self.known)
        upstream = [self.sent[name] for name in stage.reads]
        after = [job for one in upstream for job in one.jobs]
        renewed = any(one.action == "submitted" for one in upstream)
        tasks = self._tasks(stage)
        if tasks is not None:
            return self._array(stage, found, after, renewed, tasks)
        live = [job for job in found.all if job.live]
        if renewed:  # what waits for the old job of an earlier stage would never start
            live = self._cancel_waiting(live)
        if live:
            return Sent(stage.name, "live", [job.id for job in live], _shown(live))
        holder = RunDirectory(stage.directory).holder()
        if holder is not None and "(job " not in holder:  # of a job that just ended, the new one waits
            raise StageError(
                f"stage '{stage.name}': {holder} works on it without SLURM; wait for it, or stop it and "
                "submit again"
            )
        sent = Sent(stage.name, "submitted")
        self._send(stage, sent, "whole", after)
        return sent

    def _tasks(self, stage: StageRun) -> int | None:
        """Of how many tasks the stage is made; None: one job."""
        if not stage.array or stage.distributed:
            return None
        begun = array_tasks.count(stage.directory)
        tasks = begun if begun is not None else self.cluster.data_placement(stage.name).tasks
        return tasks if tasks > 1 or begun is not None else None

    def _array(self, stage: StageRun, found: StageJobs, after: list[int], renewed: bool, tasks: int) -> Sent:
        """Tasks that are neither done nor under way, and the job that joins them all."""
        live_arrays = [job for _, job in found.tasks if job.live]
        live_finish = [job for job in found.finish if job.live]
        if renewed:
            live_arrays = self._cancel_waiting(live_arrays)
        kept = {job.id for job in live_arrays}
        under_way = StageJobs(tasks=tuple(one for one in found.tasks if one[1].id in kept)).live_tasks()
        missing = [task for task in array_tasks.missing(stage.directory, tasks) if task not in under_way]
        if not missing and not renewed and live_finish:
            return Sent(
                stage.name, "live", [job.id for job in live_finish], _shown([*live_arrays, *live_finish])
            )
        sent = Sent(stage.name, "submitted")
        if not self.request.dry_run:
            for task in missing:  # what they said before is no news while they wait
                logs.clear_errors(stage.directory, task=task)
        pieces = array_tasks.chunks(missing, self.most)
        waits_for = [] if not live_arrays else sorted({job.array_id for job in live_arrays})
        for offset, indices in pieces:
            array = array_tasks.ranges(index - offset for index in indices)
            limit = self.cluster.data_placement(stage.name).tasks_at_once
            if limit is not None:
                array += f"%{max(1, limit // len(pieces))}"
            waits_for.append(self._send(stage, sent, "tasks", after, tasks, array, offset))
        self._cancel_waiting(live_finish)
        finish = self._send(stage, sent, "finish", waits_for or after, tasks)
        sent.jobs = [finish]
        last = "a job" if self.request.dry_run else f"job {finish}"
        sent.what = f"{len(missing)} of {tasks} tasks in {len(pieces)} array(s), then {last} that joins them"
        return sent

    def _cancel_waiting(self, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
        """Cancel those that wait; the others."""
        waiting = [job for job in jobs if job.waits]
        if waiting and not self.request.dry_run:
            queue.cancel(dict.fromkeys(job.array_id for job in waiting))
        return [job for job in jobs if not job.waits]

    def _send(
        self,
        stage: StageRun,
        sent: Sent,
        part: Part,
        after: Sequence[int],
        tasks: int | None = None,
        array: str | None = None,
        offset: int = 0,
    ) -> int:
        """Write the script and hand it to sbatch; the job's id."""
        spec = self._spec(stage, part, tasks, array, offset)
        text = render(spec, self.cluster)
        suffix = {"whole": "", "tasks": f"-tasks-{offset}", "finish": "-finish"}[part]
        path = self.folder / f"{stage.name}-{stage.directory.name}{suffix}.sbatch"
        sent.scripts[path.name] = text
        if self.request.dry_run:
            self._imagined -= 1
            job = self._imagined
        else:
            path.write_text(text, encoding="utf-8")
            job = queue.submit(path, after)
            self._note(stage, part, job, spec.log)
        sent.jobs.append(job)
        sent.what = f"job {job}" if job > 0 else "a job"
        return job

    def _spec(
        self, stage: StageRun, part: Part, tasks: int | None, array: str | None, offset: int
    ) -> JobSpec:
        options = ["--root", str(self.run.root), "--fingerprint", stage.directory.name]
        for override in self.request.overrides:
            options += ["--set", override]
        if tasks is not None:
            options += ["--tasks", str(tasks)] + (["--finish"] if part == "finish" else [])
        placement: TrainPlacement | DataPlacement = (
            self.cluster.train_placement(stage.name)
            if stage.distributed
            else self.cluster.data_placement(stage.name)
        )
        what = {"whole": "", "tasks": f"/tasks+{offset}", "finish": "/finish"}[part]
        return JobSpec(
            name=f"{self.run.name}.{stage.name}",
            comment=marker(self.run, stage) + what,
            log=self.folder / "log" / f"{stage.name}-{'%A_%a' if array else '%j'}.log",
            arguments=(str(self.request.recipe.resolve()), stage.name, *options),
            placement=placement,
            working_directory=self.run.root,
            python=self.request.python,
            array=array,
            task_offset=offset,
        )

    def _note(self, stage: StageRun, part: Part, job: int, log: Path) -> None:
        row: Mapping[str, Any] = {
            "job": job,
            "stage": stage.name,
            "directory": stage.directory.name,
            "part": part,
            "log": str(log),
            "cluster": self.cluster.name,
            "time": time.time(),
        }
        with (self.folder / "jobs.jsonl").open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps(row) + "\n")  # in front too: half a line may be there


def _shown(jobs: Sequence[QueuedJob]) -> str:
    return ", ".join(f"job {job.id} {job.state.lower()}" for job in jobs[:3]) + (
        f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
    )
