"""What the tests of the data stages share: a Job without a pipeline, click logs, pictures."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from stages.base import Job

COLUMNS = ("query", "url", "title", "content", "show", "click")


class NoTracker:
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...


class CountingTask:
    def __init__(self) -> None:
        self.done = 0.0

    def advance(self, n: float = 1, **shown: Any) -> None:
        self.done += n


class CountingProgress:
    """Remembers how far each bar went, and to what total."""

    def __init__(self) -> None:
        self.bars: dict[str, tuple[CountingTask, float | None]] = {}

    @contextmanager
    def task(self, description: str, total: float | None) -> Iterator[CountingTask]:
        bar = CountingTask()
        self.bars[description] = (bar, total)
        yield bar


def never() -> bool:
    return False


def make_job(directory: Path, *, should_stop: Callable[[], bool] = never, **inputs: Path) -> Job:
    return Job(
        directory=directory,
        inputs=inputs,
        tracker=NoTracker(),
        progress=CountingProgress(),
        should_stop=should_stop,
        recipe_directory=directory.parent,
        processes=2,
    )


def row(**changes: Any) -> dict[str, Any]:
    """A row of a click log that breaks no rule, but for what is changed."""
    good = {
        "query": "red panda",
        "url": "http://site.example/a.webp",
        "title": "a red panda",
        "content": "about red pandas",
        "show": 100,
        "click": 30,
    }
    return good | changes


def write_log(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    separator = "\t" if path.suffix == ".tsv" else ","
    names = list(columns or rows[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=separator, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(
    width: int = 128,
    height: int = 128,
    color: Any = (200, 30, 30),
    format: str = "WEBP",
    mode: str = "RGB",
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, format)
    return buffer.getvalue()
