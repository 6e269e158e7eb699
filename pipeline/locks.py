"""Locks on directories: one process works in one at a time, on any node, and the others can name it."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from stages.base import StageError

PATIENCE_S, PATIENCE_IN_A_JOB_S = 15.0, 180.0


@contextlib.contextmanager
def hold(directory: Path, wait_s: float | None = None) -> Iterator[None]:
    """Hold the directory (made if there is none) for this process. Raises StageError that names the holder.

    Waits a little: the processes of a run that was just killed may take a moment to go, and longer those of a
    node that SLURM gave up.
    """
    if wait_s is None:
        wait_s = PATIENCE_IN_A_JOB_S if "SLURM_JOB_ID" in os.environ else PATIENCE_S
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StageError(held_message(directory)) from None
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        job = os.environ.get("SLURM_JOB_ID")
        content = {"pid": os.getpid(), "host": socket.gethostname()} | ({"job": job} if job else {})
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        yield
    finally:
        os.close(descriptor)  # the lock goes with it


def holder(directory: Path) -> str | None:
    """Who works here now ('process 17 on host a'), or None."""
    path = directory / "lock"
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


def held_message(directory: Path) -> str:
    """What to say to a second one that wants to work here."""
    text = (directory / "lock").read_text(errors="replace")
    return (
        f"{directory}: {_holder_text(text)} works on this stage; wait for it (`tandem status` shows it), "
        "or stop it and run the same command again"
    )


def _holder_text(text: str) -> str:
    try:
        content = json.loads(text)
        job = f" (job {content['job']})" if "job" in content else ""
        return f"process {content['pid']} on host {content['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
