"""One rank of `tandem doctor` in a job, a task a GPU; rank 0 writes DIRECTORY/doctor.json as it goes.

    srun --kill-on-bad-exit=0 … python -m pipeline.slurm.doctor_rank --directory SHARED_DIR

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say who it is and where rank 0 is. Every wait is
bounded: a rank that does not answer is named in doctor.json, and the others end. Exit codes: 0 all steps were
done (what they saw may still be bad: see doctor_findings), 2 a variable or an argument is wrong, 1 otherwise.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.durable import write_durably
from pipeline.slurm import doctor_probes as probes
from pipeline.slurm.meeting import Meeting, Outcome, RanksMissingError

REPORT = "doctor.json"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FILES_APPEAR_S = 10.0  # caches of network file systems hold names back for some seconds
GB = 1e9

Work = Callable[[], Any]


@dataclass
class Doctor:
    """The steps, the same on all ranks in the same order, and the report that they fill."""

    meeting: Meeting
    options: argparse.Namespace
    master: str
    local_rank: int
    report: dict[str, Any]
    hosts: list[str] = field(default_factory=list)  # of each rank

    @property
    def leaders(self) -> dict[str, int]:
        """The first rank of each node, by host, in rank order."""
        return {host: self.hosts.index(host) for host in dict.fromkeys(self.hosts)}

    @property
    def leads(self) -> bool:
        return self.meeting.rank in self.leaders.values()

    def examine(self) -> None:
        """All steps. Raises RanksMissingError and ConnectionError as `Meeting.together`."""
        self._hello()
        self._clocks()
        self.write()
        self._files()
        self.write()
        self._network()

    def _together(self, step: str, work: Work, limit_s: float | None = None) -> list[Outcome]:
        """One step; what went wrong in it goes to the report."""
        self.report["step"] = step
        try:
            outcomes = self.meeting.together(step, work, limit_s or self.options.patience_s)
        except RanksMissingError as missing:
            self._note_errors(step, missing.outcomes)
            raise
        self._note_errors(step, outcomes)
        return outcomes

    def _note_errors(self, step: str, outcomes: Sequence[Outcome | None]) -> None:
        for rank, outcome in enumerate(outcomes):
            if outcome is not None and outcome.error is not None:
                host = self.hosts[rank] if self.hosts else None
                error = {"step": step, "rank": rank, "host": host, "message": outcome.error}
                self.report["errors"].append(error)

    def _of_leaders(self, step: str, work: Work) -> dict[str, Any]:
        """A step of one rank a node: each host's value, less those where it failed."""
        outcomes = self._together(step, work if self.leads else _nothing)
        values = {host: outcomes[rank] for host, rank in self.leaders.items()}
        return {host: outcome.value for host, outcome in values.items() if outcome.error is None}

    def write(self) -> None:
        """Rank 0 keeps what is known so far."""
        if self.meeting.rank == 0:
            write_durably(self.options.directory / REPORT, json.dumps(self.report, indent=1))

    # ---- the steps

    def _hello(self) -> None:
        """Who is there, and what each sees. Without that of all there is nothing to compare."""
        options = self.options
        arrived = self._together("arrive", socket.gethostname, options.join_s)
        self.hosts = [str(outcome.value) for outcome in arrived]
        outcomes = self._together("look around", partial(probes.facts, options.directory, options.scratch))
        self.report["ranks"] = [
            {"rank": rank, "host": self.hosts[rank], **outcome.value}
            for rank, outcome in enumerate(outcomes)
            if outcome.error is None
        ]
        if _failed(outcomes):
            raise _EndedError

    def _clocks(self) -> None:
        with probes.time_server() if self.meeting.rank == 0 else nullcontext() as port:
            ports = self._together("clock server", lambda: port)
            patience_s = self.options.patience_s / 2  # an answer that never comes is an error, not a hang
            measure = partial(probes.clock_offset, self.master, ports[0].value, patience_s)
            self.report["clocks"] = self._of_leaders("clocks", measure)

    def _files(self) -> None:
        token = self._together("folder", lambda: uuid.uuid4().hex[:8])[0].value
        folder = self.options.directory / f"doctor-{token}"
        here, appear_s = self.hosts[self.meeting.rank], min(FILES_APPEAR_S, self.options.patience_s / 2)
        texts = self._of_leaders("write a file", partial(probes.write_own, folder, here))
        if not texts:
            return  # no node could write: the errors say why
        read = partial(probes.read_others, folder, texts, appear_s)
        self.report["files"] = self._of_leaders("read the files", read)
        self.report["locks"] = []
        for holder in list(self.leaders)[:2] if len(self.leaders) > 1 else ():
            self._lock(folder / f"lock-of-{holder}", holder)
        self._of_leaders("remove the files", partial(shutil.rmtree, folder, ignore_errors=True))

    def _lock(self, path: Path, holder: str) -> None:
        """`holder` takes a lock; do the other nodes see that?"""
        mine = self.hosts[self.meeting.rank] == holder
        held: list[probes.HeldLock] = []

        def take() -> None:
            held.append(probes.HeldLock(path))

        taken = self._together(f"{holder} locks a file", take if mine and self.leads else _nothing)
        if all(outcome.error is None for outcome in taken):
            see = _nothing if mine else partial(probes.lock_is_held, path)
            seen = self._of_leaders(f"see the lock of {holder}", see)
            seen.pop(holder, None)
            self.report["locks"].append({"holder": holder, "seen": seen})
        for lock in held:
            lock.release()

    def _network(self) -> None:
        device = self._device()
        self.report["backend"] = "nccl" if device.type == "cuda" else "gloo"
        network, meeting, options = probes.Network(device), self.meeting, self.options
        limit_s = options.patience_s

        def join() -> None:
            network.join(meeting.connect(limit_s), meeting.rank, meeting.ranks, limit_s)

        if _failed(self._together("join the network", join)):
            return
        outcomes = self._together("all-reduce", partial(network.all_reduce, options.bytes))
        if _failed(outcomes):
            return
        self.report["all_reduce"] = _all_reduce_report([outcome.value for outcome in outcomes], options.bytes)
        self.write()
        self._pairs(network)
        self._together("leave the network", network.leave)

    def _device(self) -> torch.device:
        """A GPU if every rank has one of its own, else the CPU on all."""
        shown = [(rank["host"], len(rank["gpus"])) for rank in self.report["ranks"]]
        each_has_one = all(gpus == 1 or gpus >= self.hosts.count(host) for host, gpus in shown)
        if not each_has_one or any(rank["cpu_asked_for"] for rank in self.report["ranks"]):
            return torch.device("cpu")
        gpus = len(self.report["ranks"][self.meeting.rank]["gpus"])
        return torch.device("cuda", 0 if gpus == 1 else self.local_rank)

    def _pairs(self, network: probes.Network) -> None:
        """Each pair of nodes by their first ranks, or, on one node, of ranks; as many pairs at once as go."""
        by_node = len(self.leaders) > 1
        names = {rank: host for host, rank in self.leaders.items()}
        if not by_node:
            names = {rank: f"rank {rank}" for rank in range(self.meeting.ranks)}
        self.report["pairs"] = []
        rounds = probes.tournament(list(names)) if len(names) > 1 else []
        for number, pairs in enumerate(rounds, 1):
            peer = {a: b for pair in pairs for a, b in (pair, pair[::-1])}.get(self.meeting.rank)
            exchange = _nothing if peer is None else partial(network.exchange, peer, self.options.bytes)
            outcomes = self._together(f"pairs, round {number} of {len(rounds)}", exchange)
            for a, b in pairs:
                took_s = outcomes[a].value
                if outcomes[a].error is None and outcomes[b].error is None:
                    rate = 2 * self.options.bytes / took_s / GB
                    self.report["pairs"].append({"a": names[a], "b": names[b], "gb_per_s": rate})
            if _failed(outcomes):
                return  # the group may be broken: later rounds would blame the wrong ones


class _EndedError(Exception):
    """A step failed that the others stand on; the report has the error."""


def _nothing() -> None:
    return None


def _failed(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.error is not None for outcome in outcomes)


def _all_reduce_report(values: Sequence[Mapping[str, Any]], size_bytes: int) -> dict[str, Any]:
    """The slowest rank's time. On the bus: what each rank's link carries, comparable over rank counts."""
    seconds, ranks = max(value["seconds"] for value in values), len(values)
    return {
        "bytes": size_bytes,
        "wrong_ranks": [rank for rank, value in enumerate(values) if not value["right"]],
        "seconds": seconds,
        "gb_per_s": size_bytes / seconds / GB,
        "bus_gb_per_s": 2 * (ranks - 1) / ranks * size_bytes / seconds / GB,
    }


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.slurm.doctor_rank", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="a folder that all nodes share")
    parser.add_argument("--bytes", type=int, default=2**24, help="of a message; default 16 MiB")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()),
        help="a folder on the node's own disk; default: SLURM_TMPDIR, TMPDIR",
    )
    parser.add_argument("--join-s", type=float, default=180.0, help="how long ranks may take to start")
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long one step may take")
    options = parser.parse_args(arguments)
    if options.bytes < 1:
        parser.error(f"--bytes {options.bytes}: give 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part as this rank; returns the exit code."""
    options = _arguments(arguments)
    try:
        rank, ranks, local_rank, port = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        master = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        print(f"doctor: {error}: set {', '.join(VARIABLES)} from SLURM's variables", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"complete": False, "world_size": ranks, "missing": [], "errors": []}
    report["started_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        if rank == 0:
            options.directory.mkdir(parents=True, exist_ok=True)
            (options.directory / REPORT).unlink(
                missing_ok=True
            )  # an earlier one must not pass for this one's
        meeting = Meeting(rank, ranks, master, port, options.join_s)
    except OSError as error:  # ConnectionError is one too
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    doctor = Doctor(meeting, options, master, local_rank, report)
    try:
        doctor.examine()
        report["complete"] = True
    except RanksMissingError as error:
        known = dict(enumerate(doctor.hosts))
        report["missing"] = [{"rank": r, "host": known.get(r), "step": error.step} for r in error.ranks]
    except _EndedError:
        pass
    except ConnectionError as error:
        print(f"doctor: rank {rank}: {error}", file=sys.stderr)
        return 1
    doctor.write()
    meeting.leave()
    return 0 if report["complete"] else 1


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a step that hangs must not hold the process
