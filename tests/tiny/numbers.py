"""A data stage: writes the numbers from 1 to `count`, and those of a file."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from stages.base import Job, Report, StageConfig


class Config(StageConfig):
    cosmetic: ClassVar[frozenset[str]] = frozenset({"note"})

    kind: str = "tests.tiny.numbers"
    count: int = Field(3, ge=0)
    source: Path | None = None
    note: str = ""

    def files(self) -> dict[str, Path]:
        return {} if self.source is None else {"source": self.source}


def run(config: Config, job: Job) -> Report:
    numbers = [*range(1, config.count + 1)]
    if config.source is not None:
        numbers += [int(line) for line in (job.recipe_directory / config.source).read_text().split()]
    with job.progress.task("numbers", len(numbers)) as task:
        task.advance(len(numbers))
    (job.out / "numbers.txt").write_text("\n".join(map(str, numbers)))
    return Report({"numbers": len(numbers)}, {"numbers/sum": float(sum(numbers))})
