"""How much other limits would leave of a corpus, told from a finished filter's measures without a new run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.log.what_if import counts_under
from pipeline.fingerprint import identities
from pipeline.recipe import load, load_head
from pipeline.run_directory import RunDirectory
from stages.base import StageError
from stages.filter import Config

LIMITS = frozenset(
    {
        "min_show",
        "min_ctr",
        "ctr_bound",
        "best_per_query",
        "min_words",
        "max_words",
        "min_side_px",
        "max_aspect",
    }
)


@dataclass(frozen=True)
class WhatIf:
    """Counts of one filter stage: `now` of its run, `then` under the changed settings (old value, new
    value)."""

    stage: str
    changes: dict[str, tuple[Any, Any]]
    now: dict[str, int]
    then: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        changes = {name: {"now": old, "then": new} for name, (old, new) in self.changes.items()}
        difference = {name: self.then[name] - self.now.get(name, 0) for name in self.then}
        counts = {"now": self.now, "then": self.then, "difference": difference}
        return {"stage": self.stage, "changes": changes, **counts}


def what_if(recipe: Path, root: Path, overrides: Sequence[str]) -> list[WhatIf]:
    """One answer a filter stage that `overrides` ('filter.min_ctr=0.02') name. Raises StageError for settings
    that the measures cannot answer, and for a stage that is not done."""
    head, _ = load_head(recipe)
    filters = [name for name, values in head.stages.items() if values and values["kind"] == "filter"]
    named = {override: override.removeprefix("stages.").partition(".")[0] for override in overrides}
    for override, stage in named.items():
        if stage not in filters:
            raise StageError(
                f"--set {override}: whatif answers for the rules of a filter stage ({', '.join(filters)}); "
                "say --set filter.min_ctr=0.02"
            )
    if not named:
        raise StageError("corpus whatif: nothing is changed; say --set filter.min_ctr=0.02")
    answers = []
    for stage in dict.fromkeys(named.values()):
        own = [f"stages.{o.removeprefix('stages.')}" for o, name in named.items() if name == stage]
        answers.append(_answer(recipe, root.resolve(), stage, own))
    return answers


def _answer(path: Path, root: Path, stage: str, overrides: Sequence[str]) -> WhatIf:
    recipe = load(path, until=stage)
    changed = load(path, overrides, until=stage)
    before, after = recipe.stages[stage], changed.stages[stage]
    assert isinstance(before, Config) and isinstance(after, Config)
    _check_answerable(stage, before, after)
    short = identities(recipe, root)[stage].short
    directory = RunDirectory.find(root, recipe.name, recipe.head.reuse, stage, short)
    check = directory.check()
    measures = directory.path / "out" / "measures.parquet"
    if check.content is None or not measures.is_file():
        raise StageError(f"stage '{stage}': {check.why}; `tandem run {path} --until {stage}` runs it")
    now = {name: count for name, count in check.content["counts"].items() if name != "rows"}
    then = counts_under(measures, after.rules(recipe.directory), after.memory_limit)
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    changes = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    return WhatIf(stage, changes, now, then)


def _check_answerable(stage: str, before: Config, after: Config) -> None:
    """Limits are compared anew; a word list or a subset can be left out, a subset's share changed."""
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if old == new or name in LIMITS | before.cosmetic:
            continue
        if name == "listed_words" and new is None:
            continue
        if name == "subset" and (new is None or (old is not None and old.seed == new.seed)):
            continue
        raise StageError(
            f"{stage}.{name}: the measures of the run do not tell what {new} in place of {old} would leave; "
            f"`tandem run` with --set stages.{stage}.{name}=… does"
        )
