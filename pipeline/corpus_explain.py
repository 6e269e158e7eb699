"""What became of the rows of a URL or a query: through the filter, and through each data stage after it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.log.explain import Row, dropped_later, find_rows
from pipeline.recipe import load
from pipeline.results import StageRun, view
from stages.base import StageError
from stages.filter import Config


@dataclass(frozen=True)
class Fate:
    """One row of the log. `stage` is where it was dropped, or the last stage that kept it."""

    row: Row
    stage: str
    kept: bool
    reason: str | None
    detail: str

    def as_json(self) -> dict[str, Any]:
        told = {"stage": self.stage, "kept": self.kept, "reason": self.reason, "detail": self.detail}
        return {k: v for k, v in asdict(self.row).items() if k not in told} | told


@dataclass(frozen=True)
class Explained:
    """The rows of one filter stage, and the stages that were asked; `waiting`: those not done yet."""

    filter: str
    asked: tuple[str, ...]
    waiting: tuple[str, ...]
    fates: tuple[Fate, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "filter": self.filter,
            "asked": list(self.asked),
            "waiting": list(self.waiting),
            "rows": [fate.as_json() for fate in self.fates],
        }


def explain(recipe: Path, root: Path, overrides: Sequence[str], text: str) -> list[Explained]:
    """One answer a filter stage of the recipe that is done. Raises StageError when none is."""
    run = view(recipe, root, overrides)
    filters = [stage for stage in run.stages if stage.kind == "filter"]
    done = [stage for stage in filters if stage.done]
    if not done:
        names = ", ".join(stage.name for stage in filters) or "the recipe has no filter stage"
        raise StageError(f"corpus explain: no filter stage is done ({names}). `tandem run {recipe}` runs it.")
    return [_follow(stage, _after(stage, run.stages), recipe, overrides, text) for stage in done]


def _after(first: StageRun, stages: Sequence[StageRun]) -> list[StageRun]:
    """The stages that read `first`, directly or through others, and tell what they dropped once done."""
    reached = {first.name}
    for stage in stages:
        if reached & set(stage.reads):
            reached.add(stage.name)
    after = [stage for stage in stages if stage.name in reached - {first.name}]
    return [stage for stage in after if stage.done is None or _tells_urls(stage)]


def _tells_urls(stage: StageRun) -> bool:
    path = stage.directory / "out" / "dropped.parquet"
    return path.is_file() and {"url", "reason"} <= set(pq.read_schema(path).names)


def _follow(
    stage: StageRun, after: Sequence[StageRun], recipe: Path, overrides: Sequence[str], text: str
) -> Explained:
    loaded = load(recipe, overrides, until=stage.name)
    config = loaded.stages[stage.name]
    assert isinstance(config, Config)
    rows = find_rows(stage.directory / "out", config.rules(loaded.directory), text)
    fates = [Fate(row, stage.name, row.reason is None, row.reason, row.detail) for row in rows]
    asked, waiting = [stage.name], []
    for later in after:
        if later.done is None:
            waiting.append(later.name)
            continue
        asked.append(later.name)
        dropped = dropped_later(later.directory / "out", sorted({f.row.url for f in fates if f.kept}))
        fates = [_at(later.name, fate, dropped.get(fate.row.url)) if fate.kept else fate for fate in fates]
    return Explained(stage.name, tuple(asked), tuple(waiting), tuple(fates))


def _at(stage: str, fate: Fate, dropped: tuple[str, str] | None) -> Fate:
    if dropped is None:
        return Fate(fate.row, stage, True, None, fate.detail)
    return Fate(fate.row, stage, False, *dropped)
