"""The pieces of a crawl on Spark, by img2dataset's own distributor.

Spark's tasks are groups of pieces whose hosts are in no other group, so that limits a host hold here as well.
All executors must see the crawl's folder, as the processes of one machine do.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.spark import active_session, spark_session
from data_tools.web.plan import NO_LANE
from data_tools.web.settings import FetchSettings

ROUND = 4  # pieces of a group that one task fetches, side by side


class GroupDownloader:
    """What img2dataset's distributor calls on an executor, in place of its downloader: (number, file)."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        from data_tools.web.fetch import Fetcher

        group = Path(row[1])
        fetcher = Fetcher(self.settings)
        for number, url_list in json.loads(group.read_text()):
            if Path(url_list).exists():  # else an earlier try of this task has done it
                fetcher.begin(number, Path(url_list))
        while fetcher.active:
            fetcher.step(1.0)
        fetcher.close()
        group.unlink()
        return True, row


def fetch(
    todo: list[tuple[int, int]],
    url_list: Callable[[int], Path],
    settings: FetchSettings,
    cores: int,
    on_done: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Fetch the pieces, each (piece, lane); whether all were handed out before a stop was asked for.

    A Spark session that is active is used, with its executors; else one of `cores` on this machine.
    """
    from img2dataset.distributor import pyspark_distributor

    with _session(cores, settings.folder) as executors:
        rounds = _Rounds(todo, executors, settings.folder, url_list, on_done, should_stop)
        pyspark_distributor(executors, GroupDownloader(settings), iter(rounds), executors, 0)
        rounds.tell_done()
        return not rounds.stopped


class _Rounds:
    """img2dataset's reader: in each round `groups` files that name pieces; the next when all are done.

    A group may have none left in a round; its file is written all the same, as the distributor takes `groups`
    files at a time, and two of one group must not be under way together.
    """

    def __init__(
        self,
        todo: list[tuple[int, int]],
        groups: int,
        folder: Path,
        url_list: Callable[[int], Path],
        on_done: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._groups: list[list[int]] = [[] for _ in range(groups)]
        for turn, (piece, lane) in enumerate(todo):
            self._groups[(turn if lane == NO_LANE else lane) % groups].append(piece)
        self._folder, self._url_list = folder, url_list
        self._on_done, self._should_stop = on_done, should_stop
        self._under_way: list[int] = []
        self.stopped = False

    def __iter__(self) -> Iterator[tuple[int, str]]:
        number = 0
        for first in range(0, max(map(len, self._groups), default=0), ROUND):
            self.tell_done()
            if self._should_stop():
                self.stopped = True
                return
            for group in self._groups:
                pieces = group[first : first + ROUND]
                path = self._folder / f"group-{number}.json"
                path.write_text(json.dumps([(piece, str(self._url_list(piece))) for piece in pieces]))
                self._under_way += pieces
                yield number, str(path)
                number += 1

    def tell_done(self) -> None:
        """The distributor asks for the next group: those before it are done."""
        for piece in self._under_way:
            self._on_done(piece)
        self._under_way.clear()


@contextmanager
def _session(cores: int, folder: Path) -> Iterator[int]:
    """An active Spark session, the caller's or a local one of our own; how many tasks it runs at a time."""
    active = active_session()
    if active is not None:
        yield active.sparkContext.defaultParallelism
        return
    scratch = folder / ".piece-spark"  # removed with other leftovers of pieces
    session = spark_session("tandem crawl", cores, scratch, master=f"local[{cores}]")
    try:
        yield cores
    finally:
        session.stop()
        shutil.rmtree(scratch, ignore_errors=True)
