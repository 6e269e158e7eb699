"""When which URL is asked for: limits a host, waits after a refusal, and no thread that waits for a host.

A schedule of URLs by host, told the time by its caller: a host gives out a URL when it has fewer than
`per_host` requests running and its pause since the last start is over. Hosts take turns by the time from
which they may be asked, so that one with 10,000 URLs holds nobody up. Memory grows with the URLs that are
scheduled and the hosts that were ever seen.
"""

import heapq
import itertools
import random
from dataclasses import dataclass, field

from data_tools.web.connect import FetchError

MAX_BACKOFF_S = 120.0
_FRONT = -1.0  # sorts before every time from which a URL may be asked for


@dataclass(frozen=True)
class Limits:
    """How a host is treated, and how long anything is waited for."""

    per_host: int = 4  # requests at a time
    host_delay_s: float = 0.1  # between the starts of two requests
    crawl_delay_max_s: float = 10.0  # a longer Crawl-delay of a robots.txt counts as this
    retries: int = 2  # after a failure that may pass
    backoff_s: float = 1.0  # before the first retry; doubled for each one more
    retry_after_max_s: float = 120.0  # a server that asks for more is not asked again
    piece_deadline_s: float = 3600.0  # from a piece's first request; what is left then is given up
    seed: int = 0  # of the jitter of the waits


@dataclass(eq=False)
class Item:
    """One URL on its way."""

    piece: int
    key: int  # its place in the piece
    url: str  # where it is now: redirects change it
    host: str
    free: bool = False  # of the stage's own site: no limits
    not_before: float = 0.0  # monotonic
    failures: int = 0
    redirects: int = 0
    seconds: float = 0.0  # that its requests took
    dropped: bool = False  # it has its status; whatever still comes of it is ignored
    turn: "_Turn | None" = None  # of its request that is running


@dataclass(eq=False)
class _Host:
    delay_s: float
    most: float  # requests at a time
    slow: bool = False  # its robots.txt asked for a delay, which leaves no room for two at a time
    running: int = 0
    next_start: float = 0.0
    ticket: int = 0  # entries of the common heap with an older one are void
    items: list[tuple[float, int, Item]] = field(default_factory=list)  # heap: may start at, order, item


@dataclass(frozen=True)
class _Turn:
    """What taking an item did to its host."""

    host: _Host
    start_before: float  # the host's next_start before, and after
    start_after: float


class Schedule:
    """Not safe for threads by itself: its caller holds a lock. Times are seconds of a monotonic clock."""

    def __init__(self, limits: Limits, *, probe: bool) -> None:
        """`probe`: a host has one request at a time until `open` is called for it: its robots.txt is read."""
        self._limits, self._probe = limits, probe
        self._hosts: dict[str, _Host] = {}
        self._ready: list[tuple[float, int, int, _Host]] = []
        self._order = itertools.count()

    def add(self, item: Item, *, front: bool = False) -> None:
        """Schedule an item, not before its `not_before`; `front`: as the next one of its host."""
        host = self._host(item)
        heapq.heappush(host.items, (_FRONT if front else item.not_before, next(self._order), item))
        self._post(host)

    def take(self, now: float) -> Item | None:
        """The next item that may start; its host counts one request more until `ended`."""
        while self._ready and self._ready[0][0] <= now:
            *_, ticket, host = heapq.heappop(self._ready)
            if ticket != host.ticket:
                continue
            while host.items and host.items[0][2].dropped:
                heapq.heappop(host.items)
            if host.items and host.items[0][0] <= now:
                item = heapq.heappop(host.items)[2]
                item.turn = _Turn(host, host.next_start, now + host.delay_s)
                host.running += 1
                host.next_start = now + host.delay_s
                self._post(host)
                return item
            self._post(host)
        return None

    def wait_s(self, now: float) -> float | None:
        """How long no item can start, if nothing ends or comes meanwhile; None: for ever."""
        return max(0.0, self._ready[0][0] - now) if self._ready else None

    def ended(self, item: Item, *, asked: bool = True) -> None:
        """The turn of an item has ended; where it `asked` for nothing, its host may be asked at once."""
        assert item.turn is not None
        host = item.turn.host
        host.running -= 1
        if not asked and host.next_start == item.turn.start_after:
            host.next_start = item.turn.start_before
        item.turn = None
        self._post(host)

    def open(self, item: Item, delay_s: float) -> None:
        """The host's robots.txt is read, and asks for `delay_s` between requests (0: for nothing)."""
        host = self._host(item)
        if delay_s > 0:
            asked = min(delay_s, self._limits.crawl_delay_max_s)
            host.next_start += max(0.0, asked - host.delay_s)
            host.delay_s, host.slow, host.most = max(host.delay_s, asked), True, 1
        elif not host.slow:
            host.most = self._limits.per_host
        self._post(host)

    def hold(self, item: Item, until: float) -> None:
        """The item's host asks for nobody before `until`."""
        host = self._host(item)
        host.next_start = max(host.next_start, until)
        self._post(host)

    def _host(self, item: Item) -> _Host:
        name = "" if item.free else item.host
        if name not in self._hosts:
            if item.free:
                self._hosts[name] = _Host(0.0, float("inf"))
            else:
                most = 1 if self._probe else self._limits.per_host
                self._hosts[name] = _Host(self._limits.host_delay_s, most)
        return self._hosts[name]

    def _post(self, host: _Host) -> None:
        """Enter the host into the common heap with the time from which it may be asked."""
        host.ticket += 1
        if host.items and host.running < host.most:
            at = max(host.next_start, host.items[0][0])
            heapq.heappush(self._ready, (at, next(self._order), host.ticket, host))


def pause_s(item: Item, error: FetchError, limits: Limits) -> float | None:
    """How long to wait before the item is asked for again, after its failure number `item.failures`.

    None: never again, as the failure is permanent, was one too many, or the server asks for too long a wait.
    """
    if not error.temporary or item.failures > limits.retries:
        return None
    if error.retry_after_s is not None and error.retry_after_s > limits.retry_after_max_s:
        return None
    jitter = random.Random(f"{limits.seed} {item.url} {item.failures}").uniform(0.5, 1.5)
    backoff = min(MAX_BACKOFF_S, limits.backoff_s * 2.0 ** (item.failures - 1)) * jitter
    return max(backoff, error.retry_after_s or 0.0)
