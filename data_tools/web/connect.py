"""Connections of the crawl: names looked up within a limit, private addresses refused, a deadline a request.

Each address is looked at before a connection is made to that very address, so neither a redirect nor an
answer of the DNS leads into a private network. No HTTP here.
"""

import ipaddress
import socket
import threading
import time
from contextlib import suppress
from typing import Any

LOOKUPS_AT_ONCE = 32  # a getaddrinfo that hangs cannot be ended: so many may hang, the next ones wait
REMEMBERED_S = 300.0
MOST_REMEMBERED = 10_000
MOST_ADDRESSES = 4  # of one name; the rest is not tried
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(OSError):
    """A fetch that failed. `reason` is one of data_tools.web.crawl.REASONS."""

    def __init__(
        self, reason: str, detail: str, *, temporary: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.temporary = temporary  # it may go well later
        self.retry_after_s = retry_after_s  # what the server asked for


class Clock:
    """The time that one request may take in all: at its end the connection is shut under whoever waits on it.

    A limit of each wait alone would let a server drip a byte of its headers, or of a TLS handshake, for ever.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._timer: threading.Timer | None = None
        self._twin: socket.socket | None = None

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def left_s(self) -> float:
        """Seconds left; raises FetchError (timeout) when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> FetchError:
        return FetchError("timeout", f"no end within {self.limit_s:g} s", temporary=True)

    def watch(self, connected: socket.socket) -> None:
        """Shut `connected` down once the time is over, also when TLS took its descriptor over meanwhile."""
        self._twin = connected.dup()
        self._timer = threading.Timer(self.left_s(), self._shut, (self._twin,))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """The request has ended."""
        if self._timer is not None:
            self._timer.cancel()
        if self._twin is not None:
            self._twin.close()

    @staticmethod
    def _shut(twin: socket.socket) -> None:
        with suppress(OSError):  # it has just ended by itself
            twin.shutdown(socket.SHUT_RDWR)


class Names:
    """Addresses of names, each lookup in a thread of its own: getaddrinfo knows no time limit."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(LOOKUPS_AT_ONCE)
        self._known: dict[str, tuple[float, list[str]]] = {}

    def look_up(self, host: str, limit_s: float) -> list[str]:
        """The addresses of `host`, at most MOST_ADDRESSES, as the system orders them.

        Raises:
            FetchError: no such name (unreachable), or no answer within `limit_s` (timeout).
        """
        until, addresses = self._known.get(host, (0.0, []))
        if time.monotonic() < until:
            return addresses
        end = time.monotonic() + limit_s
        late = FetchError("timeout", f"{host}: no answer of the name service", temporary=True)
        if not self._free.acquire(timeout=limit_s):
            raise late
        answer: list[Any] = []
        thread = threading.Thread(target=self._ask, args=(host, answer), daemon=True)
        thread.start()
        thread.join(max(0.0, end - time.monotonic()))
        if not answer:
            raise late
        if isinstance(answer[0], OSError | UnicodeError):
            again = getattr(answer[0], "errno", None) == socket.EAI_AGAIN
            raise FetchError("unreachable", f"{host}: {answer[0]}", temporary=again)
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        self._known[host] = (time.monotonic() + REMEMBERED_S, answer[0])
        return list(answer[0])

    def _ask(self, host: str, answer: list[Any]) -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer.append(list(dict.fromkeys(str(target[0]) for *_, target in found))[:MOST_ADDRESSES])
        except (OSError, UnicodeError) as error:
            answer.append(error)
        finally:
            self._free.release()


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, and so is the IPv4 address that it may embed."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        embedded = [each for each in inner if each is not None]
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if not all(is_public(str(each)) for each in embedded):
            return False
    return ip.is_global and not ip.is_multicast


def connect(
    address: tuple[str, int], names: Names, clock: Clock, timeout_s: float, *, public_only: bool
) -> socket.socket:
    """A connection to (host, port), watched by `clock`; each wait of it may take `timeout_s`.

    Raises:
        FetchError: private_address, unreachable (no such name), timeout.
        OSError: no address answers: what the last one said.
    """
    host, port = address
    failure: OSError | None = None
    for found in names.look_up(host, min(timeout_s, clock.left_s())):
        if public_only and not is_public(found):
            failure = failure or FetchError("private_address", f"{host} is {found}")
            continue
        try:
            connected = socket.create_connection((found, port), min(timeout_s, clock.left_s()))
        except OSError as error:
            failure = error
            continue
        connected.settimeout(timeout_s)
        clock.watch(connected)
        return connected
    raise failure or FetchError("unreachable", f"{host} has no address")
