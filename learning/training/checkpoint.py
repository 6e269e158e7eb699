"""Checkpoints: written aside, hashed, committed by one rename that all ranks agree on; damaged ones skipped.

checkpoints/step_00000100/   position.json, layout.json, engine/…, rank_<r>.pt, manifest.json (sha256 a file)
checkpoints/*.tmp            unfinished, or being deleted: never read, removed at the next start
The directory is on a file system that all ranks see.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from learning.training import distributed
from learning.training.background import LaterWriter, Staging
from learning.training.checkpoint_files import MANIFEST, POSITION, Writer, problems, sync

logger = logging.getLogger(__name__)

SPARE = 1.05  # free space asked for, as a multiple of what is expected to be written


class CheckpointConfig(BaseModel):
    """When to save, and how many checkpoints to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int | None = Field(
        default=None, ge=1, description="null: at the end of each epoch; the end always has one"
    )
    keep: int = Field(
        default=2, ge=1, description="the newest ones; older ones are deleted once a new one is complete"
    )
    milestone_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="the first checkpoint at or after each multiple is never deleted; null: none is spared",
    )
    background: bool = Field(
        default=True,
        description="write while training goes on: a copy of each rank's own state waits in CPU memory; the "
        "last one, and one at a stop, are waited for",
    )


@dataclass(frozen=True)
class Found:
    """A complete, undamaged checkpoint."""

    directory: Path
    step: int
    position: dict[str, Any]


@dataclass(frozen=True)
class Settled:
    """How a checkpoint ended: `problem` is None when all ranks committed it, else why not, on every rank."""

    step: int
    problem: str | None


@dataclass
class _Begun:
    """A checkpoint that is being written."""

    step: int
    final: Path
    problem: str | None  # the same on every rank
    writer: Writer
    written: Future[None]

    @property
    def temporary(self) -> Path:
        return self.final.with_suffix(".tmp")


class Checkpoints:
    """The checkpoints of one training stage. All ranks call every method together, but for `close`."""

    def __init__(
        self, directory: Path, keep: int, milestone_every_steps: int | None = None, background: bool = False
    ):
        self.directory, self.keep, self.milestone_every_steps = directory, keep, milestone_every_steps
        self.background = background
        self._last_bytes = 0
        self._staging = Staging()
        self._begun: _Begun | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def newest(self) -> Found | None:
        """The newest complete, undamaged checkpoint; leftovers are removed, damaged ones named in the log.

        Rank 0 lists them; all ranks share the hashing, and agree.
        """
        assert self._begun is None, "settle what was begun: its files are among the leftovers"
        self._idle()
        if distributed.rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.tmp"):
                shutil.rmtree(leftover)
        found = [path.name for path in self._complete()] if distributed.rank() == 0 else []
        for name in distributed.broadcast_object(found):
            directory = self.directory / name
            damage = [p for each in distributed.gather_objects(problems(directory)) for p in each]
            if not damage:
                position = json.loads((directory / POSITION).read_text(encoding="utf-8"))
                return Found(directory, _step(directory), position)
            if distributed.rank() == 0:
                logger.warning("checkpoint %s is damaged and skipped: %s", directory, "; ".join(damage))
        return None

    def begin(
        self,
        step: int,
        position: Mapping[str, Any],
        write: Callable[[Path, Writer], None],
        expected_bytes: int,
    ) -> None:
        """Begin a checkpoint of the state as it is now; `settle` says how it ended.

        `write(directory, writer)` puts this rank's files there: in the background the writer takes copies,
        and a thread writes them. What was complete before stays when it fails.
        """
        assert self._begun is None, "settle what was begun first"
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_suffix(".tmp")
        writer = LaterWriter(temporary, self._staging) if self.background else Writer(temporary)
        problem = self._prepare(writer.directory, max(expected_bytes, self._last_bytes))
        written: Future[None] = Future()
        self._begun = _Begun(step, final, problem, writer, written)
        if problem is None:
            if distributed.rank() == 0:
                text = json.dumps(dict(position) | {"step": step}, indent=2)
                writer.text(text, writer.directory / POSITION)
            write(writer.directory, writer)
        if isinstance(writer, LaterWriter):
            self._begun.written = self._thread.submit(writer.run)
        else:
            written.set_result(None)

    def settle(self, wait: bool) -> Settled | None:
        """Commit what was begun, once all ranks have written; None while one has not, or if none was begun.

        `wait`: until they have.
        """
        begun = self._begun
        if begun is None:
            return None
        if not wait and begun.problem is None and distributed.all_reduce_max(not begun.written.done()):
            return None
        begun.written.result()
        self._begun = None
        problem = begun.problem
        if problem is None:
            told = distributed.gather_objects((begun.writer.error, begun.writer.files))
            problem = self._commit(begun.temporary, begun.final, told)
        if problem is None:
            self._retain()
        elif distributed.rank() == 0:
            shutil.rmtree(begun.temporary, ignore_errors=True)
        return Settled(begun.step, problem)

    def close(self) -> None:
        """Let go of what was begun and not settled: training ended with an error. Each rank for itself."""
        if self._begun is not None and isinstance(self._begun.writer, LaterWriter):
            self._begun.writer.give_up()
        self._begun = None
        self._idle()

    def _idle(self) -> None:
        """Wait until the thread has written and deleted what it was given."""
        self._thread.submit(int).result()

    def _prepare(self, temporary: Path, expected: int) -> str | None:
        """Rank 0 makes the directory and looks for space; what is wrong, on every rank."""
        problem = None
        self._idle()  # what is deleted makes room
        if distributed.rank() == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                free = shutil.disk_usage(temporary).free
                if free < expected * SPARE:
                    problem = f"{_mib(free)} MiB are free, about {_mib(int(expected * SPARE))} MiB are needed"
            except OSError as error:
                problem = str(error)
        return distributed.broadcast_object(problem)

    def _commit(
        self, temporary: Path, final: Path, told: list[tuple[str | None, dict[str, Any]]]
    ) -> str | None:
        failed = [f"rank {r}: {error}" for r, (error, _) in enumerate(told) if error is not None]
        problem = "; ".join(failed) or None
        if problem is None and distributed.rank() == 0:
            files = {name: facts for _, own in told for name, facts in own.items()}
            writer = Writer(temporary)
            writer.text(json.dumps({"ranks": len(told), "files": files}, indent=2), temporary / MANIFEST)
            problem = writer.error
            if problem is None:
                try:
                    for directory in sorted({(temporary / name).parent for name in files} | {temporary}):
                        sync(directory)
                    # the same step again, after damage or a rewind: the new one replaces it
                    if final.exists():
                        final.rename(final.with_suffix(".old.tmp"))
                        shutil.rmtree(final.with_suffix(".old.tmp"))
                    temporary.rename(final)
                    sync(self.directory)
                    self._last_bytes = sum(int(facts["bytes"]) for facts in files.values())
                except OSError as error:
                    problem = str(error)
        return distributed.broadcast_object(problem)

    def _retain(self) -> None:
        if distributed.rank() == 0:
            for old in self._outdated():
                doomed = old.with_suffix(".tmp")
                try:
                    old.rename(doomed)  # so that a kill in between leaves no half checkpoint
                except OSError as error:
                    logger.warning("checkpoint %s could not be deleted: %s", old, error)
                    continue
                if self.background:
                    self._thread.submit(_delete, doomed)
                else:
                    _delete(doomed)

    def _outdated(self) -> list[Path]:
        """Older than the newest `keep`, and no milestone."""
        complete = self._complete()
        milestones: dict[int, Path] = {}
        if self.milestone_every_steps is not None:
            for path in complete:  # from the newest on: the earliest of each stretch stays
                milestones[_step(path) // self.milestone_every_steps] = path
            milestones.pop(0, None)
        return [path for path in complete[self.keep :] if path not in milestones.values()]

    def _complete(self) -> list[Path]:
        """Newest first. What has its final name was complete when it got it."""
        return sorted((p for p in self.directory.glob("step_*") if p.suffix != ".tmp"), reverse=True)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def _delete(doomed: Path) -> None:
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("checkpoint %s could not be deleted: %s", doomed, error)


def _mib(count: int) -> int:
    return count // 2**20
