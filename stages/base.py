"""The contract between the pipeline and a stage: `run(config, job) -> Report`.

A stage never knows whether a laptop or SLURM started it. It reads its inputs' directories, writes under
`job.out`, reports counts and metrics, and returns. The caller writes DONE.json.

A stage with `Config.array` may run as an array of tasks too: `run_task(config, job)` for each, side by side,
and then `finish(config, job)`, once. A task does the share of `job.task_index` of `job.task_count`, told by a
hash of the key, in a `job.directory` of its own; `finish` joins what lies in `job.task_outs` into the stage's
`job.out`. What the stages after it make of that, and its counts, must be the same for any number of tasks as
after `run`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict, Field

KINDS = (
    *("filter", "ingest", "crawl", "clean", "shard", "benchmark", "regions"),
    *("pretrain", "finetune", "evaluate"),
)


class StageError(Exception):
    """Something a user can mend: the message names the file, the field and the remedy. Exit code 2."""


class SpoiltTasks(StageError):
    """`finish` cannot use what these tasks made: they are to run again."""

    def __init__(self, message: str, tasks: Iterable[int]):
        super().__init__(message)
        self.tasks = tuple(tasks)


class Frozen(BaseModel):
    """A frozen model that refuses unknown keys: the base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(Frozen):
    """What every stage's config has. `inputs` maps a role (say `corpus`) to the name of an earlier stage."""

    cosmetic: ClassVar[frozenset[str]] = frozenset()  # fields that cannot change what the stage makes
    roles: ClassVar[tuple[str, ...]] = ()  # inputs it must have
    optional_roles: ClassVar[tuple[str, ...]] = ()  # inputs it may have
    array: ClassVar[bool] = False  # may run as an array of tasks, and `finish`
    distributed: ClassVar[bool] = False  # one process a GPU (or a laptop's `launch.processes`)
    version: ClassVar[int] = 1  # raise when the same config makes something else: a default changes, say

    kind: str
    inputs: dict[str, str] = Field(default_factory=dict, description="role: name of an earlier stage")

    def files(self) -> dict[str, Path]:
        """Files outside the run directory that shape the result; their contents enter the fingerprint."""
        return {}

    def addresses(self) -> dict[str, str]:
        """The same for files at addresses (http://…, s3://…)."""
        return {}

    def named_elsewhere(self) -> frozenset[str]:
        """Roles that need no input, as a field names what they read."""
        return frozenset()

    def roles_named(self) -> frozenset[str]:
        """Inputs that a field of the config names, beside `roles` and `optional_roles`."""
        return frozenset()

    def ranks_wanted(self) -> int | None:
        """How many ranks the config is written for; None: any number."""
        return None

    def what_counts(self, field: str, path: Path) -> str | None:
        """Of a file of `files()`: what enters the fingerprint in place of its content; None: the content."""
        return None


@dataclass(frozen=True)
class Report:
    """What a stage says when it is done: row counts, and metrics by `group/name`."""

    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Tracker(Protocol):
    """Where numbers go. Never raises for a tracking server that is down."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed stage calls it with the step it goes on from."""


class Task(Protocol):
    """One progress bar."""

    def advance(self, n: float = 1, **shown: Any) -> None: ...


class Progress(Protocol):
    """Progress bars on a terminal, lines elsewhere."""

    def task(self, description: str, total: float | None) -> AbstractContextManager[Task]: ...


class Stopped(Exception):
    """The stage stopped because it was asked to; what it saved is complete. Exit code 75: run it again."""


STALLED = 76  # exit code of a process that ends itself because a rank stands still: run it again


def end_stalled(rank: int, message: str) -> NoReturn:
    """Say which rank stands still, and end this process at once: its main thread waits for that rank."""
    print(f"error: rank {rank}: {message}", flush=True)
    os._exit(STALLED)


@dataclass
class Job:
    """Where a stage runs: its directory, its inputs, its share of the work and the means to report."""

    directory: Path  # of the stage; of the task, in `run_task`
    inputs: Mapping[str, Path]  # role → the input stage's directory (its `out/` holds the result)
    tracker: Tracker
    progress: Progress
    should_stop: Callable[[], bool]
    seed: int = 0
    recipe_directory: Path = Path()  # relative paths in the recipe are relative to this
    task_index: int = 0
    task_count: int = 1
    processes: int = 1  # how many worker processes a data stage may use
    stop_at: float | None = None  # unix seconds by which the stage must have saved and ended
    stalled: Callable[[int, str], None] = end_stalled  # ends the process, in any of its threads

    @property
    def out(self) -> Path:
        return self.directory / "out"

    @property
    def task_outs(self) -> list[Path]:
        """For `finish`: each task's out/, in order."""
        return [task_directory(self.directory, index) / "out" for index in range(self.task_count)]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def log(self) -> Path:
        return self.directory / "log"


def task_directory(stage_directory: Path, index: int) -> Path:
    """Where one task of an array works."""
    return stage_directory / "tasks" / str(index)


def stage_module(kind: str) -> Any:
    """The module of a kind of stage: a `Config`, a `run(config, job)` and what `Config.array` asks for.

    A kind with a dot is the import path of a stage of your own (`kind: my_package.caption`). Raises
    StageError for a kind that is neither.
    """
    if kind in KINDS:
        return import_module(f"stages.{kind}")
    if "." not in kind:
        raise StageError(f"stage kind: '{kind}' is unknown; allowed: {', '.join(KINDS)}")
    try:
        module = import_module(kind)
    except ModuleNotFoundError as error:
        if error.name is None or not (kind == error.name or kind.startswith(f"{error.name}.")):
            raise  # the module is there; something that it imports is not
        raise StageError(f"stage kind: no module '{kind}' can be imported; is it on PYTHONPATH?") from error
    if not (hasattr(module, "Config") and hasattr(module, "run")):
        raise StageError(f"stage kind: module '{kind}' has no `Config` or no `run(config, job)`")
    if module.Config.array and not (hasattr(module, "run_task") and hasattr(module, "finish")):
        raise StageError(
            f"stage kind: module '{kind}' has `Config.array`, but no `run_task(config, job)` or no "
            "`finish(config, job)`"
        )
    return module


def iter_kinds() -> Iterator[tuple[str, type[StageConfig]]]:
    for kind in KINDS:
        yield kind, stage_module(kind).Config
