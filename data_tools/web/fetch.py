"""Pieces of a crawl in one worker process: threads that ask for URLs, and the main one that looks and writes.

The tar, the Parquet, the statistics and the reading of X-Robots-Tag are img2dataset's; its loop over URLs is
not: that retries at once and knows no hosts. Several pieces are under way at a time, so that a slow host in
one of them leaves no thread idle. Importing this file takes seconds (img2dataset brings albumentations,
webdataset and wandb along), so only workers do.
"""

import hashlib
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import pyarrow as pa
from img2dataset.downloader import compute_key, is_disallowed
from img2dataset.logger import CappedCounter, write_stats
from img2dataset.writer import WebDatasetSampleWriter

from data_tools.pictures import PictureError, PictureRules, open_picture, picture_extension
from data_tools.web.connect import FetchError
from data_tools.web.opener import Opener, Redirected, host_of, url_problem
from data_tools.web.pieces import DIGITS, size_problem
from data_tools.web.politeness import Item, Schedule, pause_s
from data_tools.web.robots import Robots
from data_tools.web.settings import FetchSettings
from data_tools.workers import stop_if_orphan

DIRECTIVES = {"noai", "noimageai", "noindex", "noimageindex"}  # of X-Robots-Tag, that forbid such use
MAX_REDIRECTS = 5
_OVERDUE = 8  # request deadlines; a request of a thread, robots.txt with its redirects, takes at most six
_COLUMNS = pa.schema(
    [("url", pa.string()), ("key", pa.string()), ("status", pa.string()), ("error_message", pa.string())]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("sha256", pa.string()), ("reason", pa.string()), ("seconds", pa.float32())]
)


class PieceWriter(WebDatasetSampleWriter):
    """img2dataset's tar and Parquet of one piece: in a folder of its own until whole, true file endings."""

    def __init__(self, piece: int, folder: Path) -> None:
        self._final = folder
        self._aside = self._final / f".piece-{piece:0{DIGITS}d}-{os.getpid()}"
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir()
        super().__init__(piece, str(self._aside), False, DIGITS, _COLUMNS, "webp")

    def add(self, data: bytes | None, meta: dict[str, Any]) -> None:
        """Write a row, and its picture if it is one."""
        if data is not None:
            self.encode_format = picture_extension(data)
        self.write(data, meta["key"], None, meta)

    def close(self) -> None:
        super().close()
        stop_if_orphan()  # the site may have gone with the parent: its failures are none of the web's
        for path in sorted(self._aside.iterdir()):
            path.replace(self._final / path.name)
        self._aside.rmdir()


@dataclass
class _Piece:
    """A piece under way."""

    number: int
    url_list: Path
    urls: list[str]
    writer: PieceWriter
    items: dict[int, Item]  # by place: those without a status
    began: float = field(default_factory=time.time)
    deadline: float | None = None  # monotonic; set by its first request
    successes: int = 0
    refused: int = 0  # by the look
    statuses: CappedCounter = field(default_factory=CappedCounter)


def look(data: bytes, rules: PictureRules) -> tuple[int, int]:
    """Width and height of a picture that keeps the rules; FetchError says which one it breaks."""
    try:
        width, height = open_picture(data, max_pixels=rules.max_pixels, name="picture").size
    except PictureError as error:
        raise FetchError(error.reason, error.detail) from error
    problem = size_problem(width, height, rules)
    if problem is not None:
        raise FetchError(*problem)
    return width, height


class Fetcher:
    """`begin` pieces, then call `step` until they are done. All public methods are for one thread."""

    def __init__(
        self, settings: FetchSettings, looking: Callable[[int, int], None] = lambda piece, key: None
    ) -> None:
        """`looking`: told the piece and the place of each picture before it is decoded; (-1, -1) after."""
        self._settings, self._looking = settings, looking
        self._opener = Opener(settings.guard)
        self._robots = Robots(self._opener, settings.guard.user_agent) if settings.robots else None
        self._schedule = Schedule(settings.limits, probe=settings.robots)
        self._turn = threading.Condition()  # held for the schedule, the items, the deadlines, `_in_hand`
        self._in_hand: dict[int, float] = {}  # thread: since when
        self._results: queue.Queue[tuple[Item, bytes | FetchError]] = queue.Queue(2 * settings.threads)
        self._pieces: dict[int, _Piece] = {}
        self._closed = False
        for _ in range(settings.threads):
            threading.Thread(target=self._work, daemon=True).start()

    @property
    def active(self) -> int:
        """How many pieces are under way."""
        return len(self._pieces)

    @property
    def is_overdue(self) -> bool:
        """Whether a thread has been held up for longer than any request may take."""
        limit = time.monotonic() - _OVERDUE * self._settings.guard.request_deadline_s
        with self._turn:
            return any(since < limit for since in self._in_hand.values())

    def begin(self, number: int, url_list: Path, stuck: Collection[int] = ()) -> None:
        """Start a piece. `url_list`: an Arrow file with a column url, removed with its folder in the end.

        stuck: places of URLs whose pictures ended a process twice: they get their status at once.
        """
        with pa.ipc.open_file(str(url_list)) as reader:
            urls = reader.read_all()["url"].to_pylist()
        is_own = self._settings.guard.is_own
        items = {key: Item(number, key, url, host_of(url), is_own(url)) for key, url in enumerate(urls)}
        writer = PieceWriter(number, self._settings.folder)
        self._pieces[number] = _Piece(number, url_list, urls, writer, items)
        for key in stuck:
            self._finish(items[key], FetchError("stuck", "its picture ended a process twice"))
        with self._turn:
            for item in items.values():
                self._schedule.add(item)
            self._turn.notify_all()

    def step(self, wait_s: float) -> list[int]:
        """Look at one answer, if one comes within `wait_s`; the pieces that are done since the last call.

        Raises OSError when the disk is full: the pieces under way are lost, those that are done stay.
        """
        with suppress(queue.Empty):
            item, answer = self._results.get(timeout=wait_s)
            if not item.dropped:
                self._finish(item, answer)
        now, limit_s = time.monotonic(), self._settings.limits.piece_deadline_s
        for piece in self._pieces.values():
            if piece.deadline is not None and now > piece.deadline:
                for item in list(piece.items.values()):
                    self._finish(item, FetchError("deadline", f"its piece took more than {limit_s:g} s"))
        done = [piece for piece in self._pieces.values() if not piece.items]
        for piece in done:
            self._close(piece)
        return [piece.number for piece in done]

    def _finish(self, item: Item, answer: bytes | FetchError) -> None:
        """Give an item its status: look at the picture, if there is one, and write the row."""
        piece = self._pieces[item.piece]
        with self._turn:
            item.dropped = True
        del piece.items[item.key]
        row: dict[str, Any] = dict.fromkeys(_COLUMNS.names)
        row |= {"url": piece.urls[item.key], "seconds": item.seconds}
        row["key"] = compute_key(item.key, piece.number, self._key_digits, DIGITS)
        picture: bytes | None = None
        try:
            if isinstance(answer, FetchError):
                raise answer
            self._looking(item.piece, item.key)
            width, height = look(answer, self._settings.rules)
            picture = answer
            row |= {"width": width, "height": height, "original_width": width, "original_height": height}
            row |= {"sha256": hashlib.sha256(answer).hexdigest(), "status": "success", "reason": "ok"}
            piece.successes += 1
            piece.statuses.increment("success")
        except FetchError as error:
            # img2dataset's word for a picture that came and did not pass is failed_to_resize
            row["status"] = "failed_to_download" if error is answer else "failed_to_resize"
            row |= {"reason": error.reason, "error_message": error.detail}
            piece.refused += error is not answer
            piece.statuses.increment(str(error))
        self._looking(-1, -1)
        piece.writer.add(picture, row)

    def close(self) -> None:
        """End the threads, once no piece is under way."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    @property
    def _key_digits(self) -> int:
        return math.ceil(math.log10(self._settings.per_piece))

    def _close(self, piece: _Piece) -> None:
        """Finish the files of a piece; the statistics come last and say that it is whole."""
        del self._pieces[piece.number]
        piece.writer.close()
        count = len(piece.urls)
        failed = count - piece.successes - piece.refused
        write_stats(
            str(self._settings.folder),
            piece.number,
            count,
            piece.successes,
            failed,
            piece.refused,
            piece.began,
            time.time(),
            piece.statuses,
            DIGITS,
        )
        shutil.rmtree(piece.url_list.parent)

    def _work(self) -> None:
        """A thread: take the URL whose turn it is, ask for it, hand the answer on or schedule it again."""
        me = threading.get_ident()
        while True:
            with self._turn:
                while (item := self._schedule.take(time.monotonic())) is None and not self._closed:
                    self._turn.wait(self._schedule.wait_s(time.monotonic()))
                if item is None:
                    return
                began = self._in_hand[me] = time.monotonic()
                piece = self._pieces.get(item.piece)
                if piece is not None and piece.deadline is None:
                    piece.deadline = began + self._settings.limits.piece_deadline_s
            answer, asked = self._have_a_turn(item)
            with self._turn:
                self._schedule.ended(item, asked=asked)
                item.seconds += time.monotonic() - began
                del self._in_hand[me]
                if answer is None:
                    self._schedule.add(item, front=item.not_before == 0)
                self._turn.notify()
            if answer is not None:
                self._results.put((item, answer))

    def _have_a_turn(self, item: Item) -> tuple[bytes | FetchError | None, bool]:
        """The item's answer, None where it needs another turn; and whether its host was asked."""
        try:
            if self._robots is not None and not item.free:
                if not self._robots.knows(item.url):
                    return self._ask_robots(item, self._robots), True
                refused = self._robots.refuses(item.url)
                if refused is not None:
                    return refused, False
            token = self._settings.guard.user_agent.lower()
            return self._opener.get(item.url, refuse=partial(_forbidden, token=token)).body, True
        except Redirected as redirected:
            return self._follow(item, redirected), True
        except FetchError as error:
            return self._again(item, error), True
        except Exception as error:  # of a URL that breaks a library: it must not end the thread
            return FetchError("unreachable", f"{type(error).__name__}: {error}"), True

    def _ask_robots(self, item: Item, robots: Robots) -> FetchError | None:
        """Fetch the robots.txt of the item's host; the item itself has the next turn."""
        try:
            robots.ask(item.url)
        except FetchError as error:
            again = self._again(item, error)
            return again and robots.give_up(item.url, again)
        finally:
            if robots.knows(item.url):
                with self._turn:
                    self._schedule.open(item, robots.delay_s(item.url))
                    self._turn.notify_all()
        item.not_before = 0.0
        return None

    def _follow(self, item: Item, redirected: Redirected) -> FetchError | None:
        """Send the item to the place that it was sent to: a host like any other."""
        item.redirects += 1
        if item.redirects > MAX_REDIRECTS:
            return FetchError("http_error", f"more than {MAX_REDIRECTS} redirects")
        problem = url_problem(redirected.location)
        if problem is not None:
            return FetchError("bad_url", f"redirected to {redirected.location[:200]!r}: {problem}")
        item.url, item.host = redirected.location, host_of(redirected.location)
        item.free = self._settings.guard.is_own(item.url)
        item.not_before = 0.0
        return None

    def _again(self, item: Item, error: FetchError) -> FetchError | None:
        """Let the item wait for another try, where one may help; else the error."""
        item.failures += 1
        pause = pause_s(item, error, self._settings.limits)
        if pause is None:
            return error
        item.not_before = time.monotonic() + pause
        if error.retry_after_s is not None or error.reason == "too_many_requests":
            with self._turn:
                self._schedule.hold(item, item.not_before)
        return None


def _forbidden(headers: Message, token: str) -> str | None:
    if is_disallowed(headers, token, DIRECTIVES):
        return f"X-Robots-Tag: {', '.join(headers.get_all('X-Robots-Tag', []))}"[:200]
    return None
