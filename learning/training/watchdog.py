"""Names who stands still: each rank notes where it is, keeps a heartbeat file, and ends a job that got stuck.

The main thread notes its place (`enter`, `alive`): an assignment, no more. A thread of each rank writes it to
`heartbeat_rank<r>.json`, and watches. When no rank has noted anything new for the limit, each rank that still
runs compares all heartbeats, says who is behind, leaves the Python stacks of its threads in the log, and ends
its process. All ranks walk through the same phases in the same order, so the one behind is the one that has
entered the fewest; one whose heartbeat no longer beats is frozen or dead.
"""

import contextlib
import faulthandler
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from learning.training import distributed

logger = logging.getLogger(__name__)

START = "start"
FIRST_STEP_FACTOR = 3  # the start and the first step may take longer: kernels are chosen and compiled
MOST_BEAT_S = 5.0  # between two heartbeats, at most
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # in the paths of code that waits for other ranks


@dataclass(frozen=True)
class Place:
    """Where a rank's main thread is; `entered` counts the phases that it has begun."""

    phase: str = START
    step: int = 0
    keys: tuple[str, ...] = ()  # the first and the last sample of this rank's batch
    entered: int = 0
    first_step: int | None = None


_place = Place()  # replaced as a whole, so that the watching thread never reads half of a change
_signs = 0  # what got done within phases


def enter(phase: str, step: int | None = None, keys: Sequence[str] | None = None) -> None:
    """The main thread begins `phase`; step and sample keys stay as they were where they are not given."""
    global _place
    old = _place
    if step is None:
        step = old.step
    ends = old.keys if keys is None else tuple(dict.fromkeys((*keys[:1], *keys[-1:])))
    first = step if old.first_step is None and phase != START else old.first_step
    _place = Place(phase, step, ends, old.entered + 1, first)


def alive() -> None:
    """Something got done within a long phase: a block of a validation, a part of a file."""
    global _signs
    _signs += 1


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself."""

    rank: int
    host: str
    beat: int
    place: Place
    signs: int
    frame: str  # where its main thread is in the code
    in_collective: bool  # it waits for other ranks, as far as its Python stack shows

    @property
    def progress(self) -> tuple[int, int]:
        return self.place.entered, self.signs

    def describe(self) -> str:
        samples = f", samples {' … '.join(self.place.keys)}" if self.place.keys else ""
        return f"phase '{self.place.phase}' of step {self.place.step} (at {self.frame}{samples})"


class Watchdog:
    """Watches over this process from `__enter__` to `__exit__`.

    `stalled(rank, message)` ends the process: it is called in the watching thread, with the rank that is to
    blame. `limit_s` None: heartbeats are written, and nobody watches.
    """

    def __init__(
        self,
        directory: Path,
        limit_s: float | None,
        stalled: Callable[[int, str], None],
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.directory, self.limit_s, self.stalled = directory, limit_s, stalled
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.beat_s = MOST_BEAT_S if limit_s is None else min(MOST_BEAT_S, limit_s / 8)
        self._main = threading.get_ident()
        self._beats = 0
        self._idle_s = 0.0
        self._seen: tuple[int, int] | None = None
        self._before: dict[int, Heartbeat] | None = None  # all heartbeats, when half the limit was over
        self._last_tick = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        global _place
        _place = Place()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(MOST_BEAT_S)  # it may hang in a file system that is away
        with contextlib.suppress(OSError):
            heartbeat_path(self.directory, self.rank).unlink()

    def _watch(self) -> None:
        while not self._end.wait(self.beat_s):
            own = self.beat()
            named = self.tick(own, time.monotonic())
            if named is not None and not self._end.is_set():
                logger.error("rank %d: %s", *named)
                faulthandler.dump_traceback(all_threads=True)
                self.stalled(*named)

    def beat(self) -> Heartbeat:
        """Write this rank's heartbeat; a disk that is full or away must not end a training that runs."""
        self._beats += 1
        frame, waits = _where(sys._current_frames().get(self._main))
        own = Heartbeat(self.rank, socket.gethostname(), self._beats, _place, _signs, frame, waits)
        path = heartbeat_path(self.directory, self.rank)
        temporary = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(own) | {"unix_s": round(time.time(), 3)}))
            temporary.replace(path)
        return own

    def tick(self, own: Heartbeat, now: float) -> tuple[int, str] | None:
        """One look at monotonic time `now`: None, or the rank that is behind, and what to say.

        Only the time in which this thread itself ran counts: a job that was suspended as a whole goes on.
        """
        awake, self._last_tick = min(now - self._last_tick, 2 * self.beat_s), now
        if own.progress != self._seen:
            self._seen, self._idle_s, self._before = own.progress, 0.0, None
            return None
        self._idle_s += awake
        if self.limit_s is None:
            return None
        first = own.place.phase == START or own.place.step == own.place.first_step
        limit = self.limit_s * (FIRST_STEP_FACTOR if first else 1)
        if self._before is None:
            if self._idle_s >= limit / 2:
                self._before = self._all(own)
            return None
        if self._idle_s < limit:
            return None
        now_all = self._all(own)
        if any(now_all[r].progress != b.progress for r, b in self._before.items() if r in now_all):
            self._idle_s, self._before = limit / 2, now_all  # a rank works, and the others wait for it
            return None
        return self._verdict(self._before, now_all, limit)

    def _all(self, own: Heartbeat) -> dict[int, Heartbeat]:
        found = {rank: read_heartbeat(self.directory, rank) for rank in range(self.world_size)}
        return {r: beat for r, beat in found.items() if beat is not None} | {self.rank: own}

    def _verdict(
        self, before: Mapping[int, Heartbeat], now: Mapping[int, Heartbeat], limit_s: float
    ) -> tuple[int, str]:
        waited = f"no rank has got on for {limit_s:g} s"
        silent = [r for r in range(self.world_size) if r not in now]
        if silent:
            return silent[0], f"{waited}; rank {_list(silent)} left no heartbeat in {self.directory}"
        frozen = [r for r in before if r != self.rank and before[r].beat == now[r].beat]
        if frozen:
            one = min((now[r] for r in frozen), key=lambda beat: beat.progress)
            more = f" (so do ranks {_list(sorted({*frozen} - {one.rank}))})" if len(frozen) > 1 else ""
            return one.rank, (
                f"on host {one.host} gives no sign of life{more}: it is frozen or dead; last seen in "
                f"{one.describe()}; {waited}; {_others(now, frozen)}"
            )
        fewest = min(beat.place.entered for beat in now.values())
        behind = [r for r in sorted(now) if now[r].place.entered == fewest]
        if len(behind) > 1:  # the one that does not wait for the others keeps them waiting
            behind = [r for r in behind if not now[r].in_collective] or behind
        one = now[behind[0]]
        if len(behind) == self.world_size and self.world_size > 1:
            return one.rank, (
                f"on host {one.host} stands in {one.describe()}, and so do all {self.world_size} ranks: none "
                f"is behind, so look at the network and at the storage; {waited}"
            )
        more = f", and so do ranks {_list(behind[1:])}" if len(behind) > 1 else ""
        return one.rank, (
            f"on host {one.host} stands still in {one.describe()}{more}; {waited}; {_others(now, behind)}"
        )


def heartbeat_path(directory: Path, rank: int) -> Path:
    return directory / f"heartbeat_rank{rank}.json"


def read_heartbeat(directory: Path, rank: int) -> Heartbeat | None:
    """A rank's last heartbeat; None if there is none that can be read."""
    try:
        told = json.loads(heartbeat_path(directory, rank).read_text())
        place = Place(**told["place"] | {"keys": tuple(told["place"]["keys"])})
        del told["unix_s"]
        return Heartbeat(**told | {"place": place})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place of a stack that is no library's, and whether a collective is on the stack."""
    inner, waits = "", False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or any(part in name for part in COLLECTIVES)
        library = "site-packages" in name or name.startswith((sys.base_prefix, "<"))
        if not inner and not library:
            inner = f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return inner or "no Python code", waits


def _others(now: Mapping[int, Heartbeat], named: Sequence[int]) -> str:
    rest = [r for r in sorted(now) if r not in named]
    if not rest:
        return "there is no other rank"
    place = now[rest[0]].place
    return f"rank {rest[0]} waits in phase '{place.phase}' of step {place.step}" + (
        f", with {len(rest) - 1} more" if len(rest) > 1 else ""
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
