"""The plan: which stages will run, which are reused, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import leaks
from pipeline.fingerprint import ABSENT, Identity, identities
from pipeline.recipe import Recipe
from pipeline.run_directory import Check, RunDirectory
from pipeline.tracking import flatten
from stages.base import StageError

Action = Literal["reuse", "run", "resume", "blocked"]


@dataclass(frozen=True)
class StagePlan:
    """What will happen to one stage."""

    name: str
    kind: str
    identity: Identity
    directory: RunDirectory
    action: Action
    why: str
    check: Check
    distributed: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "kind": self.kind,
            "action": self.action,
            "why": self.why,
            "fingerprint": self.identity.fingerprint,
            "directory": str(self.directory.path),
            "absent_files": [str(path) for path in self.identity.absent],
        }


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe under a root, in order."""

    recipe: Recipe
    root: Path
    stages: tuple[StagePlan, ...]

    def __getitem__(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def between(self, first: str | None, last: str | None) -> tuple[StagePlan, ...]:
        """The stages from `first` to `last`, both included; what else they read must be done."""
        names = [stage.name for stage in self.stages]
        start = names.index(self.recipe.need(first, "--from")) if first else 0
        end = names.index(self.recipe.need(last, "--until")) if last else len(names) - 1
        if start > end:
            raise StageError(f"--from {first} --until {last}: '{first}' stands after '{last}'")
        chosen = self.stages[start : end + 1]
        inside = {stage.name for stage in chosen}
        for stage in chosen:
            for role, other in stage.identity.input_stages.items():
                if other not in inside and self[other].action != "reuse":
                    raise StageError(
                        f"--from {first}: stage '{stage.name}' reads '{other}' ({role}), which is not done "
                        f"({self[other].check.why}); start from '{other}' or earlier"
                    )
        return chosen


def make(recipe: Recipe, root: Path) -> Plan:
    """Look at what is there. Nothing is written (but remembered hashes of big files), nothing is started.

    Raises StageError for a recipe that trains on what it evaluates on, or does not check (see leaks.py).
    """
    leaks.check(recipe.source, recipe.head.stages)
    root = root.resolve()
    planned: dict[str, StagePlan] = {}
    for name, identity in identities(recipe, root).items():
        directory = RunDirectory.find(root, recipe.name, recipe.head.reuse, name, identity.short)
        check = directory.check()
        rerun = [other for other in identity.input_stages.values() if planned[other].action != "reuse"]
        action, why = _action(identity, directory, check, rerun, planned)
        config = recipe.stages[name]
        planned[name] = StagePlan(
            name, config.kind, identity, directory, action, why, check, type(config).distributed
        )
    return Plan(recipe, root, tuple(planned.values()))


def _action(
    identity: Identity,
    directory: RunDirectory,
    check: Check,
    rerun: Sequence[str],
    planned: Mapping[str, StagePlan],
) -> tuple[Action, str]:
    if check.done and not identity.absent:
        return "reuse", "nothing that shapes it changed"
    if identity.absent:
        return (
            "blocked",
            f"{', '.join(path.name for path in identity.absent)} is not there: {identity.absent[0]}",
        )
    holder = directory.holder()
    if holder:
        return "resume", f"{holder} works on it now"
    if directory.started:
        why = "an earlier run did not finish it" if check.why == "was not finished" else check.why
        return "resume", why
    blocked = [name for name in rerun if planned[name].action == "blocked"]
    if blocked:
        return "blocked", f"waits for {', '.join(dict.fromkeys(blocked))}"
    changes = changed(identity, directory)
    return "run", changes or "not run yet"


def changed(identity: Identity, directory: RunDirectory) -> str:
    """What differs from the newest other run of this stage: 'epochs 12 → 14; input crawl changed'."""
    others = [
        other
        for other in directory.path.parent.glob("*")
        if other.name != identity.short and (other / "config.yaml").is_file()
    ]
    # the newest of those that are done; an unfinished attempt is compared with only where there is no other
    others.sort(key=lambda path: ((path / "DONE.json").is_file(), (path / "config.yaml").stat().st_mtime))
    before = RunDirectory(others[-1]).config() if others else None
    if before is None:
        return ""
    return "; ".join(differences(before, identity)) or "its code changed"


def differences(before: Mapping[str, Any], now: Identity) -> list[str]:
    """One phrase a difference between a config.yaml and an identity."""
    phrases = []
    if before.get("kind") != now.kind:
        phrases.append(f"kind {before.get('kind')} → {now.kind}")
    if before.get("version") != now.version:
        phrases.append(f"the stage's version {before.get('version')} → {now.version}")
    if before.get("seed") != now.seed:
        phrases.append(f"seed {before.get('seed')} → {now.seed}")
    old, new = flatten(before.get("config") or {}), flatten(now.config)
    for name in dict.fromkeys([*old, *new]):
        if name not in old:
            phrases.append(f"{name} is new: {_short(new[name])}")
        elif name not in new:
            phrases.append(f"{name} is gone (was {_short(old[name])})")
        elif old[name] != new[name]:
            phrases.append(f"{name} {_short(old[name])} → {_short(new[name])}")
    old_files = before.get("files") or {}
    for name, digest in now.files.items():
        if old_files.get(name) != digest:
            phrases.append(f"the content of {name} changed" if digest != ABSENT else f"{name} is not there")
    old_inputs = {role: value.get("fingerprint") for role, value in (before.get("inputs") or {}).items()}
    for role, fingerprint in now.inputs.items():
        if old_inputs.get(role) != fingerprint[:12]:
            phrases.append(f"input {now.input_stages[role]} changed")
    return phrases


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
