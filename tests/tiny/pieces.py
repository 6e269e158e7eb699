"""A data stage that splits: each task squares its share of the numbers; tasks named in `broken` fail."""

from pathlib import Path
from typing import ClassVar

from stages.base import Job, Report, StageConfig


class Config(StageConfig):
    splits: ClassVar[bool] = True
    cosmetic: ClassVar[frozenset[str]] = frozenset({"broken"})

    kind: str = "tests.tiny.pieces"
    count: int = 100
    broken: Path | None = None  # a file of task numbers; beside the recipe


def run(config: Config, job: Job) -> Report:
    return _write(config, job, [number**2 for number in range(config.count)])


def run_task(config: Config, job: Job) -> Report:
    if config.broken is not None and (job.recipe_directory / config.broken).exists():
        broken = (job.recipe_directory / config.broken).read_text().split()
        if str(job.task_index) in broken:
            raise RuntimeError(f"task {job.task_index} is told to fail")
    numbers = range(job.task_index, config.count, job.task_count)
    return _write(config, job, [number**2 for number in numbers])


def finish(config: Config, job: Job) -> Report:
    found = [int(line) for out in job.task_outs for line in (out / "squares.txt").read_text().split()]
    return _write(config, job, sorted(found))


def _write(config: Config, job: Job, squares: list[int]) -> Report:
    (job.out / "squares.txt").write_text("\n".join(map(str, squares)))
    return Report({"squares": len(squares)})
