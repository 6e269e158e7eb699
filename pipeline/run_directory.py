"""One stage's directory: what it holds, who works in it, and the DONE.json that is written last."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import locks
from pipeline.durable import write_durably
from pipeline.fingerprint import Identity, file_hashes
from stages.base import Report, StageError

PARTS = ("tasks", "checkpoints", "out", "log")


@dataclass(frozen=True)
class Check:
    """Whether a stage is done, and if not: why."""

    done: bool
    why: str
    content: dict[str, Any] | None = None  # of a valid DONE.json


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@dataclass(frozen=True)
class RunDirectory:
    """`<root>/<recipe>/<stage>/<fingerprint>/`."""

    path: Path

    @classmethod
    def of(cls, root: Path, recipe_name: str, identity: Identity) -> "RunDirectory":
        return cls(root / recipe_name / identity.stage / identity.short)

    @classmethod
    def find(
        cls, root: Path, recipe_name: str, reuse: Sequence[str], stage: str, short: str
    ) -> "RunDirectory":
        """Where a stage is done: the recipe's own directory, or else that of a recipe in `reuse`.

        Its own where it is done in none: there it is to be made. A fingerprint is the same in every recipe.
        """
        own, *others = (cls(root / name / stage / short) for name in (recipe_name, *reuse))
        if own.done_path.is_file():
            return own
        return next((other for other in others if other.check().done), own)

    @property
    def done_path(self) -> Path:
        return self.path / "DONE.json"

    def check(self) -> Check:
        """Read DONE.json and see that every file it lists is there with its size."""
        try:
            content = json.loads(self.done_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Check(False, "not run yet" if not self.started else "was not finished")
        except (OSError, ValueError) as error:
            return Check(False, f"DONE.json cannot be read ({error})")
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not str(content.get("fingerprint", "")).startswith(self.path.name):
            return Check(False, "DONE.json is not of this directory")
        for name, listed in files.items():
            path = self.path / "out" / name
            try:
                size = path.stat().st_size
            except OSError:
                return Check(False, f"out/{name} is missing")
            if size != listed["bytes"]:
                return Check(False, f"out/{name} has {size:,} bytes, DONE.json says {listed['bytes']:,}")
        return Check(True, "done", content)

    @property
    def started(self) -> bool:
        """Whether a process has worked here before."""
        return (self.path / "config.yaml").is_file()

    def prepare(self, identity: Identity, recipe_name: str) -> None:
        """Make the directories and config.yaml. What an earlier start left in them stays: stages resume."""
        self.done_path.unlink(missing_ok=True)  # one that did not hold: nothing may read it any more
        self.describe(identity, recipe_name)

    def describe(self, identity: Identity, recipe_name: str) -> None:
        """The directories and config.yaml alone: a task may not touch DONE.json."""
        for part in PARTS:
            (self.path / part).mkdir(parents=True, exist_ok=True)
        content = {
            "recipe": recipe_name,
            "stage": identity.stage,
            "kind": identity.kind,
            "version": identity.version,
            "fingerprint": identity.fingerprint,
            "seed": identity.seed,
            "inputs": {
                role: {"stage": stage, "fingerprint": identity.inputs[role][:12]}
                for role, stage in identity.input_stages.items()
            },
            "files": dict(identity.files),
            "config": dict(identity.config),
        }
        write_durably(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def commit(self, identity: Identity, report: Report, seconds: float) -> dict[str, Any]:
        """Write DONE.json with the checksums of out/. From here on the stage is done."""
        content = {
            "stage": identity.stage,
            "kind": identity.kind,
            "fingerprint": identity.fingerprint,
            "inputs": dict(identity.inputs),
            "counts": dict(report.counts),
            "metrics": finite(dict(report.metrics)),
            "files": file_hashes(self.path / "out"),
            "seconds": round(seconds, 3),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_durably(self.done_path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
        return content

    def config(self) -> dict[str, Any] | None:
        """config.yaml's content, or None where there is none (or half of one)."""
        try:
            content = yaml.load(
                (self.path / "config.yaml").read_text(encoding="utf-8"),
                Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
            )
        except (OSError, yaml.YAMLError):
            return None
        return content if isinstance(content, dict) else None

    def lock(self, wait_s: float | None = None) -> AbstractContextManager[None]:
        """Hold the directory for this process. Raises StageError that names the holder."""
        return locks.hold(self.path, wait_s)

    def holder(self) -> str | None:
        """Who works here now ('process 17 on host a'), or None."""
        return locks.holder(self.path)

    def refuse_if_held(self) -> None:
        """Raise StageError when another run works here: said before anything is started."""
        if self.holder() is not None:
            raise StageError(locks.held_message(self.path))
