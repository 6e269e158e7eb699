"""Runs side by side: their metrics, and the settings in which they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.results import RunView
from pipeline.run_directory import RunDirectory
from pipeline.tracking import flatten


@dataclass(frozen=True)
class Column:
    """One run: the stages that lead to a result, their settings and their metrics."""

    title: str
    settings: dict[str, Any]  # stage.field
    metrics: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Rows of equal length: one value a column; None where a run has none."""

    titles: list[str]
    metrics: dict[str, list[float | None]]
    settings: dict[str, list[Any]]  # those that differ alone

    def as_json(self) -> dict[str, Any]:
        return {"runs": self.titles, "metrics": self.metrics, "settings": self.settings}


def of_recipe(run: RunView) -> Column:
    """A recipe as it is now: its stages' current directories."""
    return _column(run.name, [stage.directory for stage in run.stages], [stage.name for stage in run.stages])


def of_all_runs(run: RunView) -> list[Column]:
    """Every finished run of the recipe's last stage, oldest first, each with what it was made from."""
    last = run.stages[-1].name
    ends = [p for p in (run.root / run.name / last).glob("*") if RunDirectory(p).check().done]
    ends.sort(key=lambda path: (path / "DONE.json").stat().st_mtime)
    columns = []
    for end in ends:
        chain = _chain(run, last, end.name)
        columns.append(_column(f"{last}/{end.name[:6]}", list(chain.values()), list(chain)))
    return columns


def compare(columns: Sequence[Column]) -> Comparison:
    """Metrics by name; settings that are not the same everywhere."""
    titles = [column.title for column in columns]
    for i, title in enumerate(titles):
        if titles.count(title) > 1:
            titles[i] = f"{title} ({titles[: i + 1].count(title)})"
    names = dict.fromkeys(name for column in columns for name in column.metrics)
    settings = {}
    for key in dict.fromkeys(key for column in columns for key in column.settings):
        values = [column.settings.get(key) for column in columns]
        if any(value != values[0] for value in values):
            settings[key] = values
    return Comparison(
        titles, {name: [column.metrics.get(name) for column in columns] for name in names}, settings
    )


def _column(title: str, directories: Sequence[Path], names: Sequence[str]) -> Column:
    settings: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    for name, path in zip(names, directories, strict=True):
        directory = RunDirectory(path)
        config = directory.config()
        if config:
            settings["seed"] = config.get("seed")
            settings |= {f"{name}.{key}": value for key, value in flatten(config.get("config") or {}).items()}
            settings |= {f"{name}.{key} (content)": d[:12] for key, d in (config.get("files") or {}).items()}
        check = directory.check()
        if check.done and check.content:
            metrics |= check.content.get("metrics", {})
    return Column(title, settings, metrics)


def _chain(run: RunView, stage: str, short: str) -> dict[str, Path]:
    """The stage's directory and all that it was made from, the earliest first."""
    directory = RunDirectory.find(run.root, run.name, run.reuse, stage, short).path
    found: dict[str, Path] = {}
    config = RunDirectory(directory).config() or {}
    for upstream in (config.get("inputs") or {}).values():
        found |= _chain(run, upstream["stage"], upstream["fingerprint"])
    return found | {stage: directory}
