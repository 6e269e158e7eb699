"""What a stage's processes left behind when they failed: their log's end, an error record a rank or task."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ErrorRecord:
    """Why one rank or task ended, or (code 76) why the other ranks gave it up. `signal` is set when it was
    killed from outside and could say nothing itself."""

    rank: int
    code: int
    message: str
    time: float
    signal: int | None = None
    task: int | None = None  # of a stage that runs as an array of tasks

    @property
    def cause_order(self) -> tuple[bool, float]:
        """The smallest is the cause: a killed rank (its peers notice before we do), then the earliest."""
        return (self.signal is None, self.time)


def log_path(directory: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return directory / "log" / f"rank{rank}.log"


def tail(path: Path, lines: int = 20, most_bytes: int = 65536) -> list[str]:
    """The last lines of a text file; [] if there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - most_bytes))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.rstrip("\n").split("\n")][-lines:]


def write_error(directory: Path, record: ErrorRecord) -> None:
    """Keep a record. Never raises: it is called when something (the disk, say) has failed already."""
    try:
        path = error_path(directory, record.rank, record.task)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several ranks may name the same one
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(path)
    except OSError:
        pass  # the event channel and the exit code still say it


def read_errors(directory: Path) -> list[ErrorRecord]:
    """The records of the last start, the cause first."""
    records = []
    for path in _error_paths(directory):
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            records.append(ErrorRecord(**values))
        except (OSError, ValueError, TypeError):
            continue  # half written when the process was killed
    return sorted(records, key=lambda record: record.cause_order)


def clear_errors(directory: Path, rank: int | None = None, task: int | None = None) -> None:
    """Forget the records of an earlier start (of one rank, of one task, or of all)."""
    everyone = rank is None and task is None
    for path in _error_paths(directory) if everyone else [error_path(directory, rank or 0, task)]:
        path.unlink(missing_ok=True)


def error_path(directory: Path, rank: int, task: int | None = None) -> Path:
    """Where the record of a rank, or of a task of an array, is kept."""
    return directory / "log" / f"{f'rank{rank}' if task is None else f'task{task}'}.error.json"


def _error_paths(directory: Path) -> list[Path]:
    return [path for of in ("rank", "task") for path in (directory / "log").glob(f"{of}*.error.json")]
