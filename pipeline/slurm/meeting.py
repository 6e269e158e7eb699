"""How the ranks of `tandem doctor` go step by step: every wait is bounded, and who does not come is named."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

GRACE_S = 5.0  # ranks begin a step at slightly different times


@dataclass(frozen=True)
class Outcome:
    """What one rank's part of a step gave: a value that JSON can say, or the error."""

    value: Any = None
    error: str | None = None


class RanksMissingError(Exception):
    """Some ranks did not answer in a step: `outcomes` has None for them."""

    def __init__(self, step: str, outcomes: list[Outcome | None], waited_s: float):
        self.step, self.outcomes = step, outcomes
        self.ranks = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        named = ", ".join(map(str, self.ranks))
        super().__init__(f"step '{step}': no answer from rank {named} in {waited_s:g} s")


class Meeting:
    """All ranks, joined by a TCPStore that rank 0 serves; they need no process group that works.

    Each rank calls `together` for the same steps in the same order. The work of a step runs in a thread, so
    that work which hangs (a dead network file system, a collective with a dead rank) does not hold up this
    rank: it is an error, and the process has to end by os._exit.
    """

    def __init__(self, rank: int, ranks: int, host: str, port: int, join_s: float):
        """Join; raises ConnectionError when rank 0 cannot be reached, or cannot serve, in `join_s`."""
        self.rank, self.ranks = rank, ranks
        self._host, self._port = host, port
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._stuck = False
        try:
            self._store = self._connect(join_s, serves=rank == 0)
        except (RuntimeError, ValueError) as error:
            what = "cannot serve at" if rank == 0 else "does not reach rank 0 at"
            raise ConnectionError(
                f"rank {rank} {what} {host}:{port} in {join_s:g} s ({error}); see that rank 0 lives, that "
                "nodes may talk to each other at any port, and that MASTER_PORT is free"
            ) from None

    def connect(self, timeout_s: float) -> TCPStore:
        """A connection of its own to rank 0's store, for a process group."""
        return self._connect(timeout_s, serves=False)

    def _connect(self, timeout_s: float, serves: bool) -> TCPStore:
        return TCPStore(
            self._host,
            self._port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )

    def together(self, step: str, work: Callable[[], Any], limit_s: float) -> list[Outcome]:
        """Do this rank's work, then wait for all: their outcomes in rank order, the same on every rank.

        Work that raises, or takes longer than `limit_s`, is an outcome with an error. Raises
        RanksMissingError, on all ranks, when some do not answer, and ConnectionError when rank 0 does not.
        """
        mine = self._bounded(work, limit_s)
        waited_s = limit_s + GRACE_S
        try:
            self._store.set(f"{step}/{self.rank}", json.dumps(asdict(mine)))
            if self.rank == 0:
                self._store.set(f"{step}/all", json.dumps(self._collect(step, waited_s)))
            # rank 0 may work for a whole limit, and then wait `waited_s` for the others
            self._store.wait([f"{step}/all"], timedelta(seconds=2 * waited_s))
            content = json.loads(self._store.get(f"{step}/all"))
        except RuntimeError as error:
            raise ConnectionError(f"step '{step}': rank 0 is gone ({error})") from None
        outcomes = [None if outcome is None else Outcome(**outcome) for outcome in content]
        if None in outcomes:
            raise RanksMissingError(step, outcomes, waited_s)
        return [outcome for outcome in outcomes if outcome is not None]

    def leave(self) -> None:
        """Say that this rank needs nothing more; rank 0, which serves the others, waits for that a moment."""
        try:
            self._store.set(f"leave/{self.rank}", "true")
            if self.rank == 0:
                self._collect("leave", GRACE_S)
        except RuntimeError:
            return  # rank 0 went first: it had all answers

    def _bounded(self, work: Callable[[], Any], limit_s: float) -> Outcome:
        if self._stuck:
            return Outcome(error="not tried: this rank hangs in an earlier step")
        future = self._worker.submit(work)
        if not wait([future], limit_s).done:  # result(limit_s) would not tell this from a TimeoutError in it
            self._stuck = True
            return Outcome(error=f"not done in {limit_s:g} s")
        error = future.exception()
        if error is not None:
            return Outcome(error=f"{type(error).__name__}: {error}")
        return Outcome(value=future.result())

    def _collect(self, step: str, wait_s: float) -> list[Any]:
        """Each rank's answer; None where none came in time."""
        keys = [f"{step}/{rank}" for rank in range(self.ranks)]
        try:
            self._store.wait(keys, timedelta(seconds=wait_s))
        except RuntimeError:  # a timeout; what came is still worth reading
            return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        return [json.loads(self._store.get(key)) for key in keys]
