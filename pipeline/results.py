"""What a recipe's stages gave: a view of the run directories, and their metrics."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stages
from pipeline.fingerprint import absent_message, identities, is_glob, stage_files
from pipeline.recipe import load, load_head
from pipeline.run_directory import RunDirectory
from stages.base import KINDS


@dataclass(frozen=True)
class StageRun:
    """One stage of the recipe. `done` is DONE.json's content, None while it is not done."""

    name: str
    kind: str
    directory: Path
    done: dict[str, Any] | None
    distributed: bool = False  # one process a GPU
    array: bool = False  # may run as an array of tasks
    ranks_wanted: int | None = None  # that its config is written for; None: any number
    reads: tuple[str, ...] = ()  # the stages that it reads
    absent: str = ""  # what to say of files that it needs and that are not there


@dataclass(frozen=True)
class RunView:
    """A recipe's stages under a root, in order: what the report and the tables read."""

    name: str
    recipe_path: Path
    root: Path
    stages: list[StageRun]
    truth: Path | None
    reuse: tuple[str, ...] = ()  # recipes whose finished stages are taken


def view(recipe_path: Path, root: Path, overrides: Sequence[str] = ()) -> RunView:
    """The run directories of a recipe. Quick: stage modules are imported only when something changed."""
    root = root.resolve()
    head, source = load_head(recipe_path, overrides)
    truth = None if head.truth is None else source.path.resolve().parent / head.truth
    runs = []
    for entry in _stages(recipe_path, root, overrides, head.name, source.values):
        found = RunDirectory.find(root, head.name, head.reuse, entry["stage"], entry["short"])
        directory, check = found.path, found.check()
        runs.append(
            StageRun(
                entry["stage"],
                entry["kind"],
                directory,
                check.content if check.done else None,
                entry["distributed"],
                entry["array"],
                entry["ranks_wanted"],
                tuple(entry["reads"]),
                entry["absent"],
            )
        )
    return RunView(head.name, recipe_path, root, runs, truth, head.reuse)


def as_json(run: RunView) -> dict[str, Any]:
    """What `tandem results --json` prints: each stage's metrics, and all by name (a later stage wins)."""
    done = {stage.name: stage.done.get("metrics", {}) for stage in run.stages if stage.done}
    metrics: dict[str, Any] = {}
    for values in done.values():
        metrics |= values
    return {
        "recipe": run.name,
        "complete": all(stage.done for stage in run.stages),
        "stages": done,
        "counts": {stage.name: stage.done.get("counts", {}) for stage in run.stages if stage.done},
        "directories": {stage.name: str(stage.directory) for stage in run.stages},
        "metrics": metrics,
    }


def _stages(
    recipe_path: Path, root: Path, overrides: Sequence[str], name: str, values: dict[str, Any]
) -> list[dict[str, Any]]:
    """What StageRun says of each stage. Remembered: a fingerprint needs the stages' modules (torch)."""
    cache = root / name / ".directories.json"
    key = _key(recipe_path, values)
    try:
        remembered = json.loads(cache.read_text()).get(key)
        if remembered and all(_stamp(Path(p)) == stamp for p, stamp in remembered["files"].items()):
            known: list[dict[str, Any]] = remembered["stages"]
            return known
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # nothing remembered, or not readable: look again
    recipe = load(recipe_path, overrides)
    found = identities(recipe, root)
    files = [p for config in recipe.stages.values() for p in stage_files(config, recipe.directory).values()]
    stages_found = [
        {
            "stage": stage,
            "kind": identity.kind,
            "short": identity.short,
            "distributed": type(recipe.stages[stage]).distributed,
            "array": type(recipe.stages[stage]).array,
            "ranks_wanted": recipe.stages[stage].ranks_wanted(),
            "reads": list(dict.fromkeys(identity.input_stages.values())),
            "absent": absent_message(recipe, identity),
        }
        for stage, identity in found.items()
    ]
    own_kinds = {identity.kind for identity in found.values()} - set(
        KINDS
    )  # their code is not among the stamps
    addresses = any(config.addresses() for config in recipe.stages.values())  # they have no stamp
    if (
        not own_kinds and not addresses and not any(path.is_dir() or is_glob(path) for path in files)
    ):  # a directory's stamp says little of its content, and a glob has none
        _remember(cache, key, {"files": {str(p): _stamp(p) for p in files}, "stages": stages_found})
    return stages_found


def _key(recipe_path: Path, values: dict[str, Any]) -> str:
    """Of everything but the files' contents: the resolved recipe, its place, and the code that reads it."""
    house = Path(next(iter(stages.__path__))).parent
    code = [*house.glob("stages/*.py"), *house.glob("learning/methods/*.py")]
    stamps = [[path.name, *(_stamp(path) or [])] for path in sorted(code)]
    text = json.dumps([5, str(recipe_path.resolve()), values, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _remember(cache: Path, key: str, entry: dict[str, Any]) -> None:
    """Keep the newest twenty. Only where the run directory is there already."""
    if not cache.parent.is_dir():
        return
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    known.pop(key, None)
    known = dict([*list(known.items())[-19:], (key, entry)])
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(known))
        temporary.replace(cache)
    except OSError:
        temporary.unlink(missing_ok=True)  # a cache only
