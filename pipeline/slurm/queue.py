"""What SLURM is asked and told: sbatch, squeue, scancel, scontrol and, where there is one, sacct."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.base import StageError

TIMEOUT_S = 60.0
# Of a job that may still do something.
_LIVE = (
    "PENDING CONFIGURING RUNNING SUSPENDED COMPLETING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT "
    "RESIZING SIGNALING STAGE_OUT STOPPED"
)
LIVE = frozenset(_LIVE.split())
# SLURM's commands take options from variables too. Those of the shell, or of a job that this runs in, would
# change what a job is given, hide jobs, or go on to the job's own srun. These say which cluster it is:
_ITS_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SACCT_", "SCONTROL_")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_FORMAT = "%A|%F|%K|%T|%r|%S|%e|%N|%k"  # the comment last: it alone may hold a '|'


class QueueError(StageError):
    """SLURM refused, or could not be asked."""


@dataclass(frozen=True)
class QueuedJob:
    """A job, or one task of an array, as squeue shows it."""

    id: int
    array_id: int  # of the whole array; the job's own where it is none
    tasks: str | None  # '17', or '3-9,12' of tasks that wait together; None: no array
    state: str
    reason: str  # why it waits
    starts_at: str  # SLURM's own estimate, or N/A
    ends_at: str
    nodes: str
    comment: str

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    def task_numbers(self) -> list[int]:
        """The array indices that this row stands for."""
        if self.tasks is None:
            return []
        found: list[int] = []
        for part in self.tasks.partition("%")[0].split(","):
            first, _, last = part.partition("-")
            last, _, step = last.partition(":")
            found += range(int(first), int(last or first) + 1, int(step or 1))
        return found


@dataclass(frozen=True)
class Ended:
    """How a job ended that squeue may not know any more."""

    state: str
    exit_code: str  # '2:0': exit code and signal
    reason: str = ""


def ask(*command: str | Path, timeout_s: float = TIMEOUT_S) -> str:
    """The output of one of SLURM's commands. Raises QueueError with what it said."""
    name = str(command[0])
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # other jobs of the user may have any bytes in their comments
            timeout=timeout_s,
            check=False,
            env=_environment(),
        )
    except FileNotFoundError:
        raise QueueError(f"{name} is not there: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{name} gave no answer within {timeout_s:g} s: is slurmctld up?") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise QueueError(f"{name}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_ITS_VARIABLES) or name in _OF_THE_CLUSTER
    }
    return kept | {"SLURM_BITSTR_LEN": "0"}  # task lists are to come whole


def jobs(ids: Sequence[int] = ()) -> list[QueuedJob]:
    """This user's jobs that SLURM still knows, those that ended lately too; or those with the ids."""
    which = ["--jobs", ",".join(map(str, ids))] if ids else ["--me"]
    text = ask("squeue", "--noheader", "--states=all", "--array-unique", *which, "--format", _FORMAT)
    return [_job(line) for line in text.splitlines() if line.count("|") >= _FORMAT.count("|")]


def _job(line: str) -> QueuedJob:
    id_, array, tasks, state, reason, starts, ends, nodes, comment = line.split("|", _FORMAT.count("|"))
    return QueuedJob(
        int(id_),
        int(array),
        None if tasks == "N/A" else tasks,
        state,
        reason,
        starts,
        ends,
        nodes,
        comment.strip(),
    )


def submit(script: Path, after: Iterable[int] = ()) -> int:
    """The id of the job that sbatch makes of the script; it starts once those of `after` ended well."""
    which = ":".join(map(str, after))
    dependency = [f"--dependency=afterok:{which}"] if which else []
    text = ask("sbatch", "--parsable", *dependency, script)
    return int(text.strip().partition(";")[0])


def cancel(ids: Iterable[int]) -> None:
    """scancel, a few hundred at a time; jobs that ended meanwhile are no error."""
    waiting = [str(id_) for id_ in ids]
    for start in range(0, len(waiting), 200):
        ask("scancel", "--quiet", *waiting[start : start + 200])


def ended(id_: int) -> Ended | None:
    """How a job ended: from scontrol while it knows it, else from sacct; None where neither does."""
    try:
        found = of_controller(ask("scontrol", "show", "job", str(id_)))
    except QueueError:
        found = None  # slurmctld forgets a job after MinJobAge
    if found is not None:
        return found
    try:
        job = f"--jobs={id_}"
        return of_accounting(ask("sacct", "-X", "--noheader", "--parsable2", "--format=State,ExitCode", job))
    except QueueError:
        return None  # no accounting on this cluster


def of_controller(text: str) -> Ended | None:
    """What `scontrol show job` says. The name of the job, which may have any words, is not on these lines."""
    state = re.search(r"^ +JobState=(\S+) Reason=(.*) Dependency=", text, re.MULTILINE)
    code = re.search(r"^ +Requeue=.* ExitCode=(\S+)$", text, re.MULTILINE)
    return Ended(state[1], code[1], state[2]) if state and code else None


def of_accounting(text: str) -> Ended | None:
    """What sacct says, a row a start of the job. Its reason is why the job waited: it is left out."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    return Ended(rows[-1][0].partition(" ")[0], rows[-1][1]) if rows else None  # "CANCELLED by 1000"


def max_array_size() -> int:
    """The cluster's MaxArraySize: one more than the largest index."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise QueueError("scontrol show config: no MaxArraySize in what it says")
    return int(found[1])
