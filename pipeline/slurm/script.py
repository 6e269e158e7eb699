"""Renders slurm/stage.sbatch for one job: the cluster file's options and settings, every value quoted.

Two parsers read a script. sbatch reads the `#SBATCH` lines: spaces, quotes and `#` are text between double
quotes alone, a backslash takes the next character as it is, and `%` begins a pattern in names of logs. bash
reads the rest: `shlex.quote`.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.slurm.cluster import Cluster, DataPlacement, Environment, Placement, TrainPlacement
from stages.base import StageError

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "stage.sbatch"
SETTINGS, END = "# ---- settings\n", "# ---- end of settings\n"
_SAFE = re.compile(r"[A-Za-z0-9_./=:,@%+\[\]-]*")


@dataclass(frozen=True)
class JobSpec:
    """One job of one stage, as submit wants it."""

    name: str  # demo.pretrain_1
    comment: str  # by which the job is found again
    log: Path  # its output, with SLURM's %j
    arguments: tuple[str, ...]  # of the script: RECIPE STAGE --root …
    placement: TrainPlacement | DataPlacement
    working_directory: Path
    python: str  # that Tandem was submitted with; used where the cluster file gives none
    array: str | None = None  # 0-9,12%4
    task_offset: int = 0  # task = offset + SLURM_ARRAY_TASK_ID


def render(job: JobSpec, cluster: Cluster, template: Path = TEMPLATE) -> str:
    """The whole script. Raises StageError for a value that no line of a script can hold."""
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise StageError(f"{template}: {error.strerror}; run Tandem from its own folder") from error
    body = text[text.index(END) + len(END) :]
    options = "".join(f"#SBATCH {option}\n" for option in _options(job, cluster))
    title = f"{_one_line('job name', job.name)} on {cluster.name}"
    head = f"# {title}: rendered by Tandem from slurm/{template.name}."
    return (
        f"#!/bin/bash\n{head}\n{options}\nset -euo pipefail\n\n{SETTINGS}{_settings(job, cluster)}{END}{body}"
    )


def _options(job: JobSpec, cluster: Cluster) -> Iterator[str]:
    yield from _quoted("job-name", job.name)
    yield from _quoted("comment", job.comment)
    yield from _quoted("account", cluster.account)
    yield from _placement(job.placement)
    yield from _quoted("array", job.array)
    yield f"--signal=B:USR2@{cluster.save_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield "--kill-on-invalid-dep=yes"
    yield from _quoted("chdir", str(job.working_directory))
    yield from _quoted("output", _pattern(job.log))
    for option in cluster.sbatch_options:
        name, equals, value = option.removeprefix("--").partition("=")
        yield from _quoted(name, value) if equals else [option]


def _placement(placement: Placement) -> Iterator[str]:
    for name in ("partition", "qos", "constraint", "exclude", "reservation"):
        yield from _quoted(name, getattr(placement, name))
    yield f"--time={placement.time_limit}"
    if isinstance(placement, TrainPlacement):
        kind = f"{placement.gpu_type}:" if placement.gpu_type else ""
        yield f"--nodes={placement.nodes}"
        yield f"--ntasks-per-node={placement.gpus_per_node}"
        yield f"--gres=gpu:{kind}{placement.gpus_per_node}"
        yield f"--cpus-per-task={placement.cpus_per_gpu}"
        yield from _quoted("mem", placement.memory_per_node)
    else:
        assert isinstance(placement, DataPlacement)
        yield "--nodes=1"
        yield "--ntasks-per-node=1"
        yield f"--cpus-per-task={placement.cpus}"
        yield from _quoted("mem", placement.memory)


def _quoted(name: str, value: str | None) -> Iterator[str]:
    """An option as sbatch reads it; none for None."""
    if value is not None:
        whole = _one_line(name, value)
        if _SAFE.fullmatch(whole) is None:
            whole = '"' + whole.replace("\\", r"\\").replace('"', r"\"") + '"'
        yield f"--{name}={whole}"


def _one_line(what: str, text: str) -> str:
    """The text, if a line of a script can hold it byte for byte; `what` it is, for the error."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise StageError(f"{what}: {text!r}: a job's script cannot hold line breaks and control characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StageError(f"{what}: {text!r}: a job's script cannot hold a name that is not UTF-8") from None
    return text


def _pattern(log: Path) -> str:
    """SLURM's pattern for the file: its own %j stays, other per cent signs are meant."""
    if "\\" in str(log):
        raise StageError(f"--root: {log.parent}: SLURM cannot write logs below a folder with a backslash")
    return f"{str(log.parent).replace('%', '%%')}/{log.name}"


def _settings(job: JobSpec, cluster: Cluster) -> str:
    environment = cluster.environment
    lines = [*_setup(environment, cluster.scratch)]
    python, step_options = _python(environment, cluster.scratch, _one_line("python", job.python))
    lines.append(f"python=({shlex.join(python)})")
    lines.append(f"step_options=({shlex.join(step_options)})")
    limits = ["--failures", str(cluster.restarts.failures), "--starts", str(cluster.restarts.total)]
    lines.append(f"limits=({shlex.join(limits)})")
    lines.append(f"save_s={cluster.save_s}")
    lines.append(f"set -- {shlex.join(_arguments(job.arguments))}")
    if job.array is not None:
        lines.append(f'set -- "$@" --task $(({job.task_offset} + SLURM_ARRAY_TASK_ID))')
    return "".join(f"{line}\n" for line in lines)


def _arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The script's own: the recipe, the stage, options."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        what = before if before.startswith("--") else "the recipe's path"
        yield _one_line(what, argument)


def _setup(environment: Environment, scratch: str | None) -> Iterator[str]:
    """What is loaded and set before Python starts. Code from elsewhere may use unset variables."""
    foreign = [f"module load {shlex.quote(module)}" for module in environment.modules]
    if environment.source is not None:
        foreign.append(f". {shlex.quote(environment.source)}")
    if environment.conda is not None:
        foreign.append(f". {shlex.quote(f'{environment.conda.root}/etc/profile.d/conda.sh')}")
        foreign.append(f"conda activate {shlex.quote(environment.conda.name)}")
    if foreign:
        yield from ("set +u", *foreign, "set -u")
    for name, value in environment.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    if scratch is not None:
        yield f"export TMPDIR={shlex.quote(scratch)}"


def _python(
    environment: Environment, scratch: str | None, submitted_with: str
) -> tuple[list[str], list[str]]:
    """How Python is started, and srun's options for it."""
    container = environment.container
    if environment.conda is not None:
        return ["python"], []
    if environment.venv is not None:
        return [f"{environment.venv}/bin/python"], []
    if container is None:
        return [submitted_with], []
    mounts = list(container.mounts)
    if scratch is not None and all(mount.rpartition(":")[2] != scratch for mount in mounts):
        mounts.append(scratch)  # TMPDIR must be there in the container too
    if container.kind == "apptainer":
        binds = [part for mount in mounts for part in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", *binds, container.image, container.python], []
    given = [f"--container-mounts={','.join(_both_sides(mounts))}"] if mounts else []
    return [container.python], [f"--container-image={container.image}", *given]


def _both_sides(mounts: Sequence[str]) -> list[str]:
    """pyxis wants the place outside and the place inside."""
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
