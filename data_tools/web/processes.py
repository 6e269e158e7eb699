"""The worker processes of a crawl: given pieces, watched, and replaced when they stand still or die.

A process that gives no sign of life for `stall_limit_s` sits in native code (a decoder, say) and is killed;
so is one whose threads do not come back. What it had under way is given to another. A picture in whose
decoding two processes ended gets the status `stuck`.
"""

import logging
import multiprocessing
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data_tools.errors import DataError
from data_tools.web.plan import NO_LANE
from data_tools.web.settings import FetchSettings
from data_tools.workers import die_with_parent

AT_ONCE = 4  # pieces that a process has under way: while a slow host holds one up, others go on
MOST_LOSSES = 3  # processes in a row that end before any piece is done
MOST_LOSSES_BY_PICTURES = 20  # the same, of those that end while they decode
_TICK_S = 0.2
_START_S = 120.0  # what the imports of a process may take beyond the limit of its standing still

logger = logging.getLogger(__name__)


class CrawlError(DataError):
    """A crawl that cannot go on."""


class _Worker:
    """One process, the pieces that it has, and what it tells."""

    def __init__(self, settings: FetchSettings, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.pieces: set[int] = set()
        self.beat = context.Value("d", time.time() + _START_S, lock=False)
        self.looking = context.Array("q", [-1, -1], lock=False)
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, settings, self.beat, self.looking)
        self.process = context.Process(target=_main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Workers:
    """Fetches pieces in processes until all are done, or no more shall begin."""

    def __init__(self, settings: FetchSettings, processes: int, stall_limit_s: float) -> None:
        self._settings, self._stall_limit_s = settings, stall_limit_s
        self._workers = [_Worker(settings, number) for number in range(processes)]
        self._suspects: Counter[tuple[int, int]] = Counter()  # (piece, place): processes that it ended
        self._losses = 0
        self._own: list[deque[int]] = [deque() for _ in range(processes)]
        self._anybodys: deque[int] = deque()

    def run(
        self,
        todo: Iterable[tuple[int, int]],
        url_list: Callable[[int], Path],
        on_done: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Fetch the pieces, each (piece, lane); whether all were, and no stop came before.

        Raises:
            CrawlError: processes die one after the other.
            OSError: the disk is full; what was done before stays.
        """
        turns: dict[int, deque[int]] = {NO_LANE: self._anybodys}
        for piece, lane in todo:
            if lane not in turns:
                turns[lane] = self._own[(len(turns) - 1) % len(self._own)]
            turns[lane].append(piece)
        try:
            stopping = False
            while True:
                stopping = stopping or self._hand_out(url_list, should_stop)
                if not any(worker.pieces for worker in self._workers):
                    return not (self._anybodys or any(self._own))
                self._listen(on_done)
        finally:
            for worker in self._workers:
                worker.end()

    def _hand_out(self, url_list: Callable[[int], Path], should_stop: Callable[[], bool]) -> bool:
        """Give pieces to the processes that have room, in turns; whether no more shall begin."""
        given = True
        while given:
            given = False
            for worker in self._workers:
                waiting = self._own[worker.number] or self._anybodys
                if not waiting or len(worker.pieces) >= AT_ONCE:
                    continue
                if should_stop():
                    return True
                piece = waiting.popleft()
                stuck = [key for (of, key), ends in self._suspects.items() if of == piece and ends > 1]
                order = (piece, url_list(piece), stuck)
                worker.pieces.add(piece)
                with suppress(OSError):  # the process is gone: `_listen` finds that, and the piece with it
                    worker.pipe.send(order)
                given = True
        return False

    def _listen(self, on_done: Callable[[int], None]) -> None:
        """Hear what the processes tell within a moment; replace those that tell nothing any more."""
        ready = connection.wait([worker.pipe for worker in self._workers], _TICK_S)
        for worker in list(self._workers):
            if worker.pipe not in ready:
                if time.time() - worker.beat.value > self._stall_limit_s:
                    self._replace(worker, f"gave no sign of life for {self._stall_limit_s:g} s")
                continue
            try:
                told = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                self._replace(worker, f"ended with code {worker.process.exitcode}")
                continue
            if isinstance(told, Exception):
                raise told
            worker.pieces.remove(told)
            self._losses = 0
            on_done(told)

    def _replace(self, worker: _Worker, why: str) -> None:
        """Another process in place of one that is gone or stands still; its pieces begin again."""
        piece, key = worker.looking
        worker.end()
        said = f"{self._settings.folder}: a crawl process {why}"
        most = MOST_LOSSES
        if piece >= 0:
            self._suspects[piece, key] += 1
            most = MOST_LOSSES_BY_PICTURES
            said += f" at the picture of URL {key} of piece {piece}"
        self._losses += 1
        if self._losses >= most:
            raise CrawlError(
                f"{said}; {self._losses} ended so, and no piece was done meanwhile (out of memory?). "
                "Finished pieces are kept: run again, with fewer `processes` or `threads`."
            )
        logger.warning("crawl: %s; another one begins its %d pieces again", said, len(worker.pieces))
        self._own[worker.number].extendleft(sorted(worker.pieces, reverse=True))
        self._workers[worker.number] = _Worker(self._settings, worker.number)


def _main(pipe: Any, settings: FetchSettings, beat: Any, looking: Any) -> None:
    """A worker process: take pieces from the pipe, tell the pipe which are done."""
    die_with_parent()
    from data_tools.web.fetch import Fetcher  # img2dataset takes seconds to import: in the workers alone

    def note(piece: int, key: int) -> None:
        looking[0], looking[1] = piece, key
        beat.value = time.time()

    try:
        fetcher = Fetcher(settings, note)
        while True:
            if not fetcher.is_overdue:
                beat.value = time.time()
            while pipe.poll(0 if fetcher.active else _TICK_S):
                number, url_list, stuck = pipe.recv()
                fetcher.begin(number, url_list, stuck)
            if fetcher.active:
                for number in fetcher.step(_TICK_S):
                    pipe.send(number)
    except EOFError:
        pass  # the parent has closed its end: it is done with this process
    except OSError as error:
        pipe.send(OSError(error.errno, str(error)))
    except Exception:
        pipe.send(RuntimeError(f"a crawl process failed:\n{traceback.format_exc()}"))
