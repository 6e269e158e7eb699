"""How a crawl asks for a URL: one guarded request, limited in bytes and time; no redirect is followed here.

A redirect is handed to the caller, for whom it is a request to a host like any other: with that host's
robots.txt, its limits, and the look at its address.
"""

import http.client
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from data_tools.web.connect import Clock, FetchError, Names, connect

_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Mirror:
    """URLs that start with `url_prefix` are fetched from the server at `address` instead: the stage's own."""

    url_prefix: str
    address: tuple[str, int]


@dataclass(frozen=True)
class Guard:
    """What may be fetched, and how long it may take."""

    timeout_s: float  # of each wait on the network
    max_bytes: int  # of a body, once it is unpacked
    request_deadline_s: float = 30.0  # of one request in all: names, connection, headers, body
    allow_private: bool = False
    use_proxy: bool = False  # the environment's; it resolves names then, and must refuse private addresses
    mirror: Mirror | None = None
    user_agent: str = "tandem"

    def is_own(self, url: str) -> bool:
        """Whether the URL is of the stage's own site: no limits of politeness hold there."""
        return self.mirror is not None and url.startswith(self.mirror.url_prefix)


class Redirected(Exception):
    """The answer is a redirect to `location`, an absolute URL that nobody has checked yet."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


@dataclass(frozen=True)
class Answer:
    """What came with status 200."""

    headers: Message
    body: bytes


class _Request(urllib.request.Request):
    """A request that carries its clock to the connection that is made for it."""

    clock: Clock


class Opener:
    """Asks for URLs under one guard. Safe to use from many threads."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._names = Names()
        self._director = urllib.request.OpenerDirector()
        proxies: dict[str, str] | None = None if guard.use_proxy else {}
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.ProxyHandler(proxies),
            urllib.request.UnknownHandler(),
            _Http(self._connect),
            _Https(self._connect),
        ]
        if guard.mirror is not None:
            handlers.append(_ToMirror(guard.mirror))
        for handler in handlers:
            self._director.add_handler(handler)

    def get(
        self,
        url: str,
        *,
        max_bytes: int | None = None,
        cut: bool = False,
        refuse: Callable[[Message], str | None] = lambda headers: None,
    ) -> Answer:
        """The answer to one GET.

        Args:
            max_bytes: in place of the guard's.
            cut: take the first `max_bytes` of a longer body, where it would be refused else.
            refuse: asked with the headers before the body is read; a text refuses it as `disallowed`.

        Raises:
            Redirected: the answer is a redirect.
            FetchError: there is none, or it is not for us.
        """
        clock = Clock(self.guard.request_deadline_s)
        try:
            problem = url_problem(url)
            if problem is not None:
                raise FetchError("bad_url", problem)
            agent = f"Mozilla/5.0 (compatible; {self.guard.user_agent})"
            request = _Request(_ascii(url), headers={"User-Agent": agent, "Accept": "image/*,*/*;q=0.5"})
            request.clock = clock
            with self._director.open(request, timeout=self.guard.timeout_s) as response:
                _check_status(response, url)
                words = refuse(response.headers)
                if words is not None:
                    raise FetchError("disallowed", words)
                limit = self.guard.max_bytes if max_bytes is None else max_bytes
                return Answer(response.headers, _body(response, clock, limit, cut))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _explained(error, clock) from error
        finally:
            clock.stop()

    def _connect(self, clock: Clock, address: tuple[str, int], *_: Any) -> Any:
        guard = self.guard
        own = guard.mirror is not None and address == guard.mirror.address
        free = own or guard.allow_private or guard.use_proxy
        return connect(address, self._names, clock, guard.timeout_s, public_only=not free)


def url_problem(url: str) -> str | None:
    """Why a URL is not even tried: None if it is http(s) with a host."""
    try:
        parts = urlsplit(url)
        port_is_wrong = parts.port == 0
    except ValueError as error:
        return str(error)
    if parts.scheme.lower() not in ("http", "https"):
        return f"'{parts.scheme}' is not http or https"
    if not parts.hostname or port_is_wrong or any(c <= " " or c == "\x7f" for c in url):
        return "no host, a port 0, or white space within"
    return None


def host_of(url: str) -> str:
    """The host of a URL that has one, in lower case, without its port: what limits a host hold for."""
    return (urlsplit(url).hostname or "").rstrip(".")


def _ascii(url: str) -> str:
    """The URL with each character beyond ASCII as HTTP wants it: IDNA for the host, else per cent signs."""
    if url.isascii():
        return url
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    safe = "%/:=&?~+!$,;'@()*[]"
    return parts._replace(
        netloc=host, path=quote(parts.path, safe), query=quote(parts.query, safe), fragment=""
    ).geturl()


def _check_status(response: Any, url: str) -> None:
    """Raise what an answer that is no 200 stands for."""
    status, headers = response.status, response.headers
    if status in _REDIRECTS and headers.get("Location"):
        raise Redirected(urljoin(url, headers["Location"].strip()))
    if status == 200:
        return
    reason = {404: "not_found", 410: "not_found", 429: "too_many_requests"}.get(status, "http_error")
    raise FetchError(
        reason,
        f"HTTP Error {status}: {response.reason}",
        temporary=status in _TEMPORARY,
        retry_after_s=_retry_after_s(headers.get("Retry-After")) if status in (429, 503) else None,
    )


def _retry_after_s(value: str | None) -> float | None:
    """Seconds from now that a Retry-After header (seconds, or a date) asks to wait; None: it says nothing."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        when = parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _body(response: Any, clock: Clock, max_bytes: int, cut: bool) -> bytes:
    promised = response.length
    if promised is not None and promised > max_bytes and not cut:
        raise FetchError("too_large", f"{promised} bytes are more than {max_bytes}")
    parts, size = [], 0
    while block := response.read1(_BLOCK):
        parts.append(block)
        size += len(block)
        if size > max_bytes:
            break
    if clock.is_over:
        raise clock.error()
    if size > max_bytes and not cut:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    if promised is not None and size < min(promised, max_bytes):
        raise FetchError("truncated", f"{size} bytes came of {promised}", temporary=True)
    coding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    return _unpacked(b"".join(parts), coding, max_bytes, cut)


def _unpacked(data: bytes, coding: str, max_bytes: int, cut: bool) -> bytes:
    """A body whose Content-Encoding nobody asked for, never unpacked beyond `max_bytes`."""
    if coding in ("identity", ""):
        return data[:max_bytes]
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("unsupported_format", f"Content-Encoding {coding[:40]}")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: gzip's header or zlib's
    try:
        found = unpacker.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise FetchError("truncated", f"Content-Encoding {coding}: {error}") from error
    if len(found) > max_bytes and not cut:
        raise FetchError("too_large", f"{coding}: {len(data)} bytes unpack to more than {max_bytes}")
    if len(found) <= max_bytes and not unpacker.eof and not cut:
        raise FetchError("truncated", f"Content-Encoding {coding}: no end of it", temporary=True)
    return found[:max_bytes]


def _explained(error: Exception, clock: Clock) -> FetchError:
    """The one reason behind whatever urllib and the system say of a failed request."""
    while isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, FetchError):
        return error
    if clock.is_over:
        return clock.error()
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError):
        return FetchError("timeout", said, temporary=True)
    if isinstance(error, http.client.IncompleteRead):
        return FetchError("truncated", said, temporary=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return FetchError("unreachable", said)
    if isinstance(error, OSError):  # refused, reset, no route, hung up in the midst of TLS …
        return FetchError("unreachable", said, temporary=True)
    if isinstance(error, http.client.HTTPException):
        return FetchError("unreachable", said)
    return FetchError("bad_url", said)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connect_to: Callable[..., Any]) -> None:
        super().__init__()
        self._connect_to = connect_to

    def http_open(self, request: Any) -> Any:
        return self.do_open(partial(self._connection, request.clock), request)

    def _connection(self, clock: Clock, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, **options)
        connection._create_connection = partial(self._connect_to, clock)  # type: ignore[attr-defined]
        return connection


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connect_to: Callable[..., Any]) -> None:
        self._connect_to = connect_to
        self._tls = ssl.create_default_context()  # one for all: loading the certificates takes long
        super().__init__(context=self._tls)

    def https_open(self, request: Any) -> Any:
        return self.do_open(partial(self._connection, request.clock), request)

    def _connection(self, clock: Clock, host: str, **options: Any) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(host, context=self._tls, **options)
        connection._create_connection = partial(self._connect_to, clock)  # type: ignore[attr-defined]
        return connection


class _ToMirror(urllib.request.BaseHandler):
    """Turns requests for the mirrored site to the mirror; Host header and record keep the original."""

    handler_order = 400  # before the handlers that add the Host header

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.full_url.startswith(self._mirror.url_prefix):
            request.add_unredirected_header("Host", urlsplit(request.full_url).netloc)
            request.host = "{}:{}".format(*self._mirror.address)
            request.selector = "/" + request.full_url[len(self._mirror.url_prefix) :].partition("#")[
                0
            ].lstrip("/")
        return request

    https_request = http_request
