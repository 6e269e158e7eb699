"""A stage that may run as an array: the squares of the numbers under `count`, a file each.

`made.log` beside the recipe has a line for each square made. A file `fail_3` there makes task 3 fail with the
error that it names.
"""

import os
import time
import zlib
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from stages.base import Job, Report, SpoiltTasks, StageConfig, StageError, Stopped


class Config(StageConfig):
    cosmetic: ClassVar[frozenset[str]] = frozenset({"step_s"})
    array: ClassVar[bool] = True

    kind: str = "tests.tiny.squares"
    count: int = Field(20, ge=0)
    step_s: float = 0.0


def run(config: Config, job: Job) -> Report:
    run_task(config, job)
    return _total([job.out / f"{n}.txt" for n in range(config.count)], job)


def run_task(config: Config, job: Job) -> Report:
    mine = [n for n in range(config.count) if zlib.crc32(str(n).encode()) % job.task_count == job.task_index]
    print(f"task {job.task_index} works", flush=True)
    for n in mine:
        path = job.out / f"{n}.txt"
        if path.exists():
            continue
        if job.should_stop():
            raise Stopped(f"before {n}")
        fail = job.recipe_directory / f"fail_{job.task_index}"
        if fail.exists():
            raise {"user": StageError, "crash": ValueError}[fail.read_text()](f"{n} cannot be squared")
        time.sleep(config.step_s)
        with (job.recipe_directory / "made.log").open("a") as log:
            log.write(f"{n} by {os.getpid()}\n")
        path.with_suffix(".tmp").write_text(str(n * n))
        path.with_suffix(".tmp").replace(path)
    return Report({"squares": len(mine)})


def finish(config: Config, job: Job) -> Report:
    for index, out in enumerate(job.task_outs):
        if (out / "spoilt").exists():
            (out / "spoilt").unlink()
            raise SpoiltTasks(f"{out}: spoilt", [index])
    return _total([path for out in job.task_outs for path in out.glob("*.txt")], job)


def _total(paths: list[Path], job: Job) -> Report:
    squares = sorted(int(path.read_text()) for path in paths)
    (job.out / "squares.txt").write_text("\n".join(map(str, squares)))
    return Report({"squares": len(squares)}, {"squares/sum": float(sum(squares))})
