"""Starts one stage's processes on this machine, passes signals on, finds out which rank failed and why."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import events, logs
from pipeline.progress import Display
from pipeline.warden import Warden
from pipeline.worker import CRASHED, DONE, PARENT_VARIABLE, STOPPED, USER_ERROR
from stages.base import STALLED

GRACE_S = 10.0  # after one rank failed: the others wait for it in a collective, and are killed
STOP_GRACE_S = 120.0  # after one rank stopped: all stop at the same step, and save


class StopRequest:
    """What Ctrl-C and SIGTERM ask of the runner: once to stop cleanly, twice to stop at once."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Listen to the signals; the handlers from before come back at the end."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1


@dataclass(frozen=True)
class Outcome:
    """How the processes of a stage ended. `error` is the cause's record when the code is not 0 or 75."""

    code: int
    error: logs.ErrorRecord | None = None
    log_tail: tuple[str, ...] = ()


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    ended_at: float = 0.0
    ended_by_us: bool = False  # after we had begun to end all ranks


@dataclass
class Launcher:
    """One stage's processes, from start to end."""

    command: list[str]
    directory: Path  # the stage's
    processes: int
    environment: Mapping[str, str]
    display: Display
    stop: StopRequest
    warden: Warden
    _ranks: list[_Rank] = field(default_factory=list)
    _errors: list[logs.ErrorRecord] = field(default_factory=list)
    _ending: bool = False

    def run(self) -> Outcome:
        """Start all ranks and wait for them."""
        (self.directory / "log").mkdir(parents=True, exist_ok=True)
        logs.clear_errors(self.directory)
        inbox = events.Inbox()
        try:
            self._start(inbox)
            self._watch(inbox)
        finally:
            self._kill()  # nothing is left of it unless this process fails here
            for rank in self._ranks:
                self.warden.forget(rank.process.pid)
            inbox.close()
        return self._outcome()

    def _start(self, inbox: events.Inbox) -> None:
        # One port for all, from under the range that outgoing connections take theirs from.
        distributed = (
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if self.processes > 1 else {}
        )
        for number in range(self.processes):
            ranks = {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(self.processes),
                "LOCAL_WORLD_SIZE": str(self.processes),
            }
            environment = {
                **os.environ,
                **self.environment,
                **ranks,
                **distributed,
                PARENT_VARIABLE: str(os.getpid()),
                events.VARIABLE: str(inbox.write_end),
            }
            with logs.log_path(self.directory, number).open("ab") as log:
                process = subprocess.Popen(
                    self.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(inbox.write_end,),
                    start_new_session=True,  # Ctrl-C is for the runner, which passes it on once
                )
            self.warden.watch(process.pid)
            self._ranks.append(_Rank(number, process))

    def _watch(self, inbox: events.Inbox) -> None:
        """Show what arrives until every rank has ended; end the others when one failed."""
        signalled, told_others, deadline = 0, False, None
        while True:
            running = self._running()
            for message in inbox.messages(wait_s=0.1 if running else 0.0):
                self._receive(message)
            if not running:
                return
            if self.stop.count > signalled:
                signalled = self.stop.count
                if signalled == 1:
                    self.display.say(
                        "stopping after this step, and saving; once more to stop at once", "yellow"
                    )
                    self._signal(signal.SIGTERM)
                else:
                    self._signal(signal.SIGKILL)
            ended = [rank.code for rank in self._ranks if rank.code not in (None, DONE)]
            if ended and deadline is None:
                only_stopped = all(code == STOPPED for code in ended)
                deadline = time.monotonic() + (STOP_GRACE_S if only_stopped else GRACE_S)
                if not only_stopped and not told_others:
                    told_others = True
                    self._signal(signal.SIGTERM)
            if deadline is not None and time.monotonic() >= deadline:
                self._signal(signal.SIGKILL)

    def _running(self) -> bool:
        for rank in self._ranks:
            if rank.code is None:
                rank.code = rank.process.poll()
                if rank.code is not None:
                    rank.ended_at, rank.ended_by_us = time.time(), self._ending
        return any(rank.code is None for rank in self._ranks)

    def _receive(self, message: dict[str, object]) -> None:
        kind = message.pop("event", None)
        if kind == "progress":
            self.display.show(message)
        elif kind == "notice":
            self.display.say(f"      {message['message']}", "yellow")
        elif kind == "error":
            self._errors.append(logs.ErrorRecord(**message))  # type: ignore[arg-type]

    def _signal(self, number: signal.Signals) -> None:
        self._ending = True
        for rank in self._ranks:
            if rank.code is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def _kill(self) -> None:
        """Kill what is left of the ranks' process groups: after a failure, what they had started too."""
        failed = any(rank.code != DONE for rank in self._ranks)
        for rank in self._ranks:
            if failed:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()

    def _outcome(self) -> Outcome:
        codes = [rank.code for rank in self._ranks]
        if all(code == DONE for code in codes):
            return Outcome(DONE)
        asked = (-signal.SIGTERM,) if self.stop.count else ()  # it came before the rank listened to it
        if self.stop.count > 1 or all(code in (DONE, STOPPED, *asked) for code in codes):
            return Outcome(STOPPED)
        records = list(self._errors)
        spoke = {record.rank for record in records}
        for rank in self._ranks:
            spoke_of_another = rank.code == STALLED and bool(records)
            if rank.code not in (None, DONE, STOPPED) and rank.number not in spoke and not spoke_of_another:
                records.append(self._silent(rank))
        cause = min(records, key=lambda record: record.cause_order)
        if cause.code == STALLED:
            logs.write_error(self.directory, cause)  # a rank that starts late clears what names it
        code = cause.code if cause.code in (USER_ERROR, STALLED) else CRASHED
        lines = logs.tail(logs.log_path(self.directory, cause.rank))
        return Outcome(code, cause, tuple(lines))

    def _silent(self, rank: _Rank) -> logs.ErrorRecord:
        """The record of a rank that ended without a word."""
        assert rank.code is not None
        killed_by = None
        message = f"ended with exit code {rank.code}"
        if rank.code < 0:
            name = signal.Signals(-rank.code).name
            message = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
            killed_by = None if rank.ended_by_us else -rank.code
        record = logs.ErrorRecord(rank.number, rank.code, message, rank.ended_at, killed_by)
        if not rank.ended_by_us:
            logs.write_error(self.directory, record)
        return record


def environment(threads: int, distributed: bool) -> dict[str, str]:
    """What a stage's process finds set: nothing asks the network for news, threads do not crowd the cores.

    What the user has set stays, but for the number of threads, which the recipe gives.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    chosen = {name: value for name, value in quiet.items() if name not in os.environ}
    if not has_gpu():
        chosen["DS_ACCELERATOR"] = "cpu"
    if distributed:
        chosen["OMP_NUM_THREADS"] = str(threads)
    return chosen


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is to be used, found without importing torch."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def worker_command(
    recipe: Path, stage: str, root: Path, overrides: tuple[str, ...], fingerprint: str
) -> list[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pipeline.worker",
        str(recipe),
        "--stage",
        stage,
        "--root",
        str(root),
    ]
    for override in overrides:
        command += ["--set", override]
    return [*command, "--fingerprint", fingerprint]


def _free_port() -> int:
    for _ in range(200):
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free TCP port between 20000 and 32000 on 127.0.0.1")
