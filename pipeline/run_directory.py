"""One stage's directory: what it holds, who works in it, and the DONE.json that is written last."""

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
        for part in PARTS:
            (self.path / part).mkdir(parents=True, exist_ok=True)
        self.done_path.unlink(missing_ok=True)  # one that did not hold: nothing may read it any more
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

    @contextlib.contextmanager
    def lock(self, wait_s: float = 15.0) -> Iterator[None]:
        """Hold the directory for this process. Raises StageError that names the holder.

        Waits a little: the processes of a run that was just killed may take a moment to go.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StageError(self._held_by(path.read_text(errors="replace"))) from None
                    time.sleep(0.1)
            os.ftruncate(descriptor, 0)
            job = os.environ.get("SLURM_JOB_ID")
            holder = {"pid": os.getpid(), "host": socket.gethostname()} | ({"job": job} if job else {})
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)  # the lock goes with it

    def holder(self) -> str | None:
        """Who works here now ('process 17 on host a'), or None."""
        path = self.path / "lock"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder_text(path.read_text(errors="replace"))
        finally:
            os.close(descriptor)
        return None

    def refuse_if_held(self) -> None:
        """Raise StageError when another run works here: said before anything is started."""
        if self.holder() is not None:
            raise StageError(self._held_by((self.path / "lock").read_text(errors="replace")))

    def _held_by(self, text: str) -> str:
        return (
            f"{self.path}: {_holder_text(text)} works on this stage; wait for it (`tandem status` shows it), "
            "or stop it and run the same command again"
        )


def _holder_text(text: str) -> str:
    try:
        holder = json.loads(text)
        job = f" (job {holder['job']})" if "job" in holder else ""
        return f"process {holder['pid']} on host {holder['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
