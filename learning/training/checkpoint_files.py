"""The files of a checkpoint: written with their sha256, flushed to the disk, checked against the manifest."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learning.training import distributed, watchdog

MANIFEST = "manifest.json"
POSITION = "position.json"


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

    def save(self, state: Any, path: str | Path, *, constant: bool = False) -> None:
        """torch.save. `constant`: nothing changes `state` while the checkpoint is written."""
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


def problems(directory: Path) -> list[str]:
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


def sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
