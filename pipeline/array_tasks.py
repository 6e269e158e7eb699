"""A stage as an array of tasks: how many there are, which are done, and how SLURM is to number the rest.

tasks/count.json   the number of tasks, fixed by the first start
tasks/17/          where task 17 works: lock, log/, out/
tasks/17.json      written last: task 17 is done
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline import locks
from pipeline.durable import write_durably
from pipeline.run_directory import finite
from stages.base import Report, StageError, task_directory

FIRST_START_WAIT_S = 60.0  # all tasks of an array start at once; one of them describes the stage
_LONGEST_LIST = 4000  # characters of an array's indices: slurmctld refuses more than 4096
_RECORD = re.compile(r"(\d+)\.json")


def count(directory: Path) -> int | None:
    """The number of tasks of the stage in this directory; None while it has not begun as an array."""
    path = directory / "tasks" / "count.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["tasks"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: cannot be read ({error}); remove {path.parent} to start over") from error


def begin(directory: Path, tasks: int, describe: Callable[[], None]) -> None:
    """At the start of each task: fix the number of tasks. Only the first of them calls `describe`.

    Raises StageError when the stage began with another number: its tasks' shares would not fit together.
    """
    if count(directory) is None:
        with locks.hold(directory / "tasks", FIRST_START_WAIT_S):
            if count(directory) is None:
                describe()
                write_durably(directory / "tasks" / "count.json", json.dumps({"tasks": tasks}))
    require_count(directory, tasks)


def require_count(directory: Path, tasks: int) -> None:
    """Raise StageError unless the stage began as so many tasks."""
    known = count(directory)
    if known is None:
        raise StageError(f"{directory}: none of its {tasks} tasks has begun; run them before --finish")
    if known != tasks:
        raise StageError(
            f"{directory}: this stage began as {known} tasks, not {tasks}; go on with {known}, or remove "
            f"{directory / 'tasks'} to start over with {tasks}"
        )


def done(directory: Path) -> set[int]:
    """The tasks that are committed, by the names of their records alone."""
    try:
        with os.scandir(directory / "tasks") as entries:
            found = [_RECORD.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:
        return set()
    return {int(match[1]) for match in found if match}


def missing(directory: Path, tasks: int) -> list[int]:
    """The tasks that are not committed, in order."""
    return sorted(set(range(tasks)) - done(directory))


def progress(directory: Path) -> tuple[int, int]:
    """How many tasks are committed, of how many; (0, 0) for a stage that has not begun as an array."""
    total = count(directory)
    return (0, 0) if total is None else (len(done(directory)), total)


def commit(directory: Path, index: int, tasks: int, report: Report, seconds: float) -> None:
    """Write a task's record, once all that it made is on the disk. From here on the task is done."""
    out = task_directory(directory, index) / "out"
    files = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            files[path.relative_to(out).as_posix()] = os.fstat(stream.fileno()).st_size
    content = {
        "task": index,
        "tasks": tasks,
        "counts": dict(report.counts),
        "metrics": finite(dict(report.metrics)),
        "files": files,
        "seconds": round(seconds, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_durably(_record_path(directory, index), json.dumps(content, indent=1, allow_nan=False))


def record(directory: Path, index: int) -> dict[str, Any] | None:
    """What a task left when it was done; None if it is not, or if a file is gone or has another size."""
    try:
        content: dict[str, Any] = json.loads(_record_path(directory, index).read_text(encoding="utf-8"))
        out = task_directory(directory, index) / "out"
        whole = all((out / name).stat().st_size == size for name, size in content["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if whole else None


def forget(directory: Path, indices: Iterable[int]) -> None:
    """Take back that these tasks are done: they run again."""
    for index in indices:
        _record_path(directory, index).unlink(missing_ok=True)


def require_all(directory: Path, tasks: int) -> float:
    """See that each task is committed and its files whole; the seconds that they took, added up.

    Raises StageError that names those that are not. A task whose files are not whole counts as not done from
    then on.
    """
    require_count(directory, tasks)
    records = {index: record(directory, index) for index in range(tasks)}
    lost = [index for index, content in records.items() if content is None]
    damaged = sorted(set(lost) & done(directory))
    forget(directory, damaged)
    if lost:
        of_damage = f" ({_spoken(damaged)}: done before, but files are gone or cut short)" if damaged else ""
        raise StageError(
            f"{directory}: of {tasks} tasks these are not done: {_spoken(lost)}{of_damage}. "
            "Run them again; the others are kept."
        )
    return sum(float(content["seconds"]) for content in records.values() if content is not None)


def ranges(indices: Iterable[int]) -> str:
    """In SLURM's array syntax: "0-3,7,9-11"."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def chunks(indices: Sequence[int], most: int) -> list[tuple[int, list[int]]]:
    """The fewest arrays that hold these tasks where MaxArraySize is `most`: (offset, tasks) of each.

    An array's indices must be under MaxArraySize, so task i is index i - offset of its array. The offset is 0
    where all tasks are small enough: an index is the task's own number then. Scattered tasks make a long list
    of indices; one that slurmctld would refuse is cut.
    """
    if most < 1:
        raise ValueError(f"MaxArraySize {most}: must be 1 or more")
    wanted = sorted(set(indices))
    found: list[tuple[int, list[int]]] = [(0, wanted)] if wanted and wanted[-1] < most else []
    for index in [] if found else wanted:
        if not found or index - found[-1][0] >= most:
            found.append((index, []))
        found[-1][1].append(index)
    return [part for offset, tasks in found for part in _cut(offset, tasks)]


def _cut(offset: int, tasks: list[int]) -> list[tuple[int, list[int]]]:
    """In halves until the list of indices of each is short enough."""
    if len(ranges(task - offset for task in tasks)) <= _LONGEST_LIST:
        return [(offset, tasks)]
    middle = len(tasks) // 2
    return _cut(offset, tasks[:middle]) + _cut(tasks[middle], tasks[middle:])


def _spoken(indices: Iterable[int]) -> str:
    return ranges(indices).replace(",", ", ")


def _record_path(directory: Path, index: int) -> Path:
    return directory / "tasks" / f"{index}.json"
