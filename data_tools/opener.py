"""How a crawl opens a URL: guarded against private addresses, endless bodies and slow drips; no disk, no
pictures.

img2dataset fetches through urllib.request.urlopen, so the guard is an opener that `install` makes urllib's
own.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_MARK = re.compile(r"refused\[(\w+)\]")


@dataclass(frozen=True)
class Mirror:
    """URLs that start with `url_prefix` are fetched from the server at `address` instead."""

    url_prefix: str
    address: tuple[str, int]


@dataclass(frozen=True)
class Guard:
    """What may be fetched. `timeout_s` holds for each wait on the network and for a whole body as well."""

    timeout_s: float
    max_bytes: int
    allow_private: bool = False
    use_proxy: bool = (
        False  # the environment's; the proxy resolves names then, and must refuse private addresses
    )
    mirror: Mirror | None = None


class Refused(OSError):
    """A fetch that the guard stops; the message carries its reason through img2dataset's status text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"refused[{reason}] {detail}")


def install(guard: Guard) -> None:
    """Make every urlopen of this process obey `guard`."""
    handlers: list[urllib.request.BaseHandler] = [_Http(guard), _Https(guard), _Body(guard)]
    if guard.mirror is not None:
        handlers.append(_ToMirror(guard.mirror))
    if not guard.use_proxy:
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.OpenerDirector()
    for kind in (
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(kind())
    if guard.use_proxy:
        opener.add_handler(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    urllib.request.install_opener(opener)


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


def failure_reason(message: str) -> str:
    """The one reason behind img2dataset's error text of a failed download."""
    marked = _MARK.search(message)
    if marked:
        return marked[1]
    code = re.match(r"HTTP Error (\d{3})", message)
    if code:
        return "not_found" if code[1] in ("404", "410") else "http_error"
    if "X-Robots-Tag" in message:
        return "disallowed"
    if "timed out" in message:
        return "timeout"
    if "IncompleteRead" in message:
        return "truncated"
    return "unreachable"


def _connect(guard: Guard) -> Any:
    """A socket.create_connection that looks at each address before it connects to that very address."""

    def create(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        own = guard.mirror is not None and address == guard.mirror.address
        if own or guard.allow_private or guard.use_proxy:
            return socket.create_connection(address, timeout, source_address)
        failure: OSError | None = None
        for *_, target in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            ip = ipaddress.ip_address(str(target[0]).partition("%")[0])
            ip = getattr(ip, "ipv4_mapped", None) or ip
            if not ip.is_global or ip.is_multicast:
                failure = failure or Refused("private_address", f"{address[0]} is {ip}")
                continue
            try:
                return socket.create_connection((str(target[0]), address[1]), timeout, source_address)
            except OSError as error:
                failure = error
        raise failure or OSError(f"{address[0]} has no address")

    return create


class _Http(urllib.request.HTTPHandler):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection, request)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, **options)
        connection._create_connection = _connect(self._guard)  # type: ignore[attr-defined]
        return connection


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._tls = ssl.create_default_context()  # one for all: loading the certificates takes long
        super().__init__(context=self._tls)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection, request)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(host, context=self._tls, **options)
        connection._create_connection = _connect(self._guard)  # type: ignore[attr-defined]
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


class _Body(urllib.request.BaseHandler):
    """Limits on a response's body: its size, and the time that all of it may take."""

    handler_order = 100

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        receive, guard = response.read, self._guard
        promised = response.length
        if response.status == 200 and promised is not None and promised > guard.max_bytes:
            response.close()
            raise Refused("too_large", f"{promised} bytes are more than max_bytes = {guard.max_bytes}")

        def read(amount: int | None = None) -> bytes:
            if amount is not None:
                return bytes(receive(amount))
            deadline, parts, size = time.monotonic() + guard.timeout_s, [], 0
            while block := response.read1(1 << 16):
                parts.append(block)
                size += len(block)
                if size > guard.max_bytes:
                    raise Refused("too_large", f"more than max_bytes = {guard.max_bytes}")
                if time.monotonic() > deadline:
                    raise Refused("timeout", f"{size} bytes in {guard.timeout_s} s, and no end")
            if promised is not None and size < promised:
                raise http.client.IncompleteRead(b"", promised - size)
            return b"".join(parts)

        response.read = read
        return response

    https_response = http_response
