"""Checkpoints: written aside, hashed, committed by one rename that all ranks agree on; damaged ones skipped.

checkpoints/step_00000100/   position.json, manifest.json (bytes and sha256 a file), engine/…, rank_<r>.pt
checkpoints/*.tmp            unfinished, or being deleted: never read, removed at the next start
The directory is on a file system that all ranks see.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from learning.training import distributed, watchdog

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POSITION = "position.json"
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


class Writer:
    """Writes files with their sha256, each flushed to the disk.

    The first error is kept, not raised, and nothing is written after it: other ranks are waiting in a
    collective, and all must come to the agreement.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, dict[str, Any]] = {}
        self.error: str | None = None

    def make_directory(self, path: str | Path) -> None:
        self._guarded(lambda: Path(path).mkdir(parents=True, exist_ok=True))

    def save(self, state: Any, path: str | Path) -> None:
        """torch.save."""
        self._guarded(lambda: self._write(Path(path), lambda file: torch.save(state, file)))

    def text(self, content: str, path: str | Path) -> None:
        self._guarded(lambda: self._write(Path(path), lambda file: file.write(content.encode())))

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError for a failed write
            self.error = str(error)

    def _write(self, path: Path, content: Callable[[Any], Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as raw:
            file = _Hashing(raw)
            content(file)
            os.fsync(raw.fileno())
        name = path.relative_to(self.directory).as_posix()
        self.files[name] = {"bytes": file.count, "sha256": file.digest.hexdigest()}


class _Hashing:
    """A file that counts and hashes what is written to it."""

    def __init__(self, raw: Any):
        self._raw, self.count, self.digest = raw, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.count += len(view)
        done = 0
        while done < len(view):  # an unbuffered write may take a part
            done += self._raw.write(view[done:])
            watchdog.alive()
        return len(view)

    def flush(self) -> None:
        """Unbuffered."""


@dataclass(frozen=True)
class Found:
    """A complete, undamaged checkpoint."""

    directory: Path
    step: int
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training stage. All ranks call every method together."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep
        self._last_bytes = 0

    def newest(self) -> Found | None:
        """The newest complete, undamaged checkpoint; leftovers are removed, damaged ones named in the log.

        Rank 0 lists them; all ranks share the hashing, and agree.
        """
        if distributed.rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.tmp"):
                shutil.rmtree(leftover)
        found = [path.name for path in self._complete()] if distributed.rank() == 0 else []
        for name in distributed.broadcast_object(found):
            directory = self.directory / name
            problems = [p for each in distributed.gather_objects(_problem(directory)) for p in each]
            if not problems:
                position = json.loads((directory / POSITION).read_text(encoding="utf-8"))
                return Found(directory, int(name.removeprefix("step_")), position)
            if distributed.rank() == 0:
                logger.warning("checkpoint %s is damaged and skipped: %s", directory, "; ".join(problems))
        return None

    def save(
        self,
        step: int,
        position: Mapping[str, Any],
        write: Callable[[Path, Writer], None],
        expected_bytes: int,
    ) -> str | None:
        """Write and commit a checkpoint; None when all ranks did, else why not, on every rank.

        `write(directory, writer)` puts this rank's files there. What was complete before stays when it fails.
        """
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_suffix(".tmp")
        problem = self._prepare(temporary, max(expected_bytes, self._last_bytes))
        if problem is None:
            writer = Writer(temporary)
            if distributed.rank() == 0:
                writer.text(json.dumps(dict(position) | {"step": step}, indent=2), temporary / POSITION)
            write(temporary, writer)
            told = distributed.gather_objects((writer.error, writer.files))
            problem = self._commit(temporary, final, told)
        if problem is None:
            self._retain()
        elif distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return problem

    def _prepare(self, temporary: Path, expected: int) -> str | None:
        """Rank 0 makes the directory and looks for space; what is wrong, on every rank."""
        problem = None
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
                        _sync(directory)
                    if (
                        final.exists()
                    ):  # the same step again, after damage or a rewind: the new one replaces it
                        final.rename(final.with_suffix(".old.tmp"))
                        shutil.rmtree(final.with_suffix(".old.tmp"))
                    temporary.rename(final)
                    _sync(self.directory)
                    self._last_bytes = sum(int(facts["bytes"]) for facts in files.values())
                except OSError as error:
                    problem = str(error)
        return distributed.broadcast_object(problem)

    def _retain(self) -> None:
        if distributed.rank() == 0:
            for old in self._complete()[self.keep :]:
                doomed = old.with_suffix(".tmp")
                try:
                    old.rename(doomed)  # so that a kill in between leaves no half checkpoint
                    shutil.rmtree(doomed)
                except OSError as error:
                    logger.warning("checkpoint %s could not be deleted: %s", old, error)

    def _complete(self) -> list[Path]:
        """Newest first. What has its final name was complete when it got it."""
        return sorted((p for p in self.directory.glob("step_*") if p.suffix != ".tmp"), reverse=True)


def _problem(directory: Path) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {error}"] if distributed.rank() == 0 else []
    found = (
        [] if POSITION in manifest["files"] or distributed.rank() else [f"{POSITION} is not in {MANIFEST}"]
    )
    for name, facts in files[distributed.rank() :: distributed.world_size()]:
        path = directory / name
        try:
            size = path.stat().st_size
            if size != facts["bytes"]:
                found.append(f"{name}: {size} bytes, the manifest says {facts['bytes']}")
            elif _sha256(path) != facts["sha256"]:
                found.append(f"{name}: its sha256 is not the manifest's")
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(count: int) -> int:
    return count // 2**20
