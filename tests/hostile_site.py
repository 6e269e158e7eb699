"""A web server for tests that does to a crawler what the web does, and counts what the crawler does to it."""

import functools
import gzip
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@functools.cache
def _gzip_bomb() -> bytes:
    """20 MB in 20 KB."""
    return gzip.compress(bytes(20_000_000))


class HostileSite(AbstractContextManager["HostileSite"]):
    """Serves `files` (path → bytes) with 200 for any host, `robots` (host → text, or a status) and:

    /redirect → /good.webp; /loop → /loop; /away → `away`; /to?URL → URL; /local-file → file:///etc/hostname;
    /500; /403; /big: no length and no end; /promised: a length of 10 GB; /short: less than its length;
    /drip: a byte a moment; /headers: headers, the same way; /hung: no answer; /noai: X-Robots-Tag;
    /gzip, /gzip-bomb, /br: packed bodies; /closed: 429 for a day. Once, and then the picture: /busy: 429 and
    Retry-After; /busy-date: the same as a date; /flaky: 503; /reset: a connection cut.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        delay_s: float = 0.0,
        away: str = "",
        robots: Mapping[str, str | int] | None = None,
    ) -> None:
        self.files, self.delay_s, self.away, self.robots = dict(files), delay_s, away, dict(robots or {})
        self.hits: Counter[str] = Counter()  # by path, robots.txt left out
        self.robots_hits: Counter[str] = Counter()  # by host
        self.starts: defaultdict[str, list[float]] = defaultdict(list)  # by host: when, monotonic
        self.most_at_once: Counter[str] = Counter()  # by host
        self.agents: set[str] = set()
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host = self.headers.get("Host", "").partition(":")[0]
                site._begun(host, self)
                try:
                    time.sleep(site.delay_s)
                    site._answer(self, host)
                except (BrokenPipeError, ConnectionResetError):
                    return
                finally:
                    with site._lock:
                        site._running[host] -= 1

            def log_message(self, format: str, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HostileSite":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _begun(self, host: str, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.starts[host].append(time.monotonic())
            self._running[host] += 1
            self.most_at_once[host] = max(self.most_at_once[host], self._running[host])
            self.agents.add(handler.headers.get("User-Agent", ""))
            if handler.path == "/robots.txt":
                self.robots_hits[host] += 1
            else:
                self.hits[handler.path] += 1

    def _answer(self, handler: BaseHTTPRequestHandler, host: str) -> None:
        path = urlsplit(handler.path).path
        targets = {
            "/redirect": "/good.webp",
            "/loop": "/loop",
            "/away": self.away,
            "/to": unquote(urlsplit(handler.path).query),
            "/local-file": "file:///etc/hostname",
        }
        if path == "/robots.txt":
            self._robots(handler, host)
        elif path in targets:
            self._head(handler, 302, Location=targets[path])
        elif path in self.files:
            self._picture(handler, self.files[path])
        elif path in ("/busy", "/busy-date", "/flaky", "/reset", "/closed"):
            self._refuse_at_first(handler, path)
        elif path in ("/gzip", "/gzip-bomb", "/br"):
            data = _gzip_bomb() if path == "/gzip-bomb" else gzip.compress(self._good)
            self._picture(handler, data, **{"Content-Encoding": "br" if path == "/br" else "gzip"})
        elif path == "/noai":
            self._picture(handler, self._good, **{"X-Robots-Tag": "noai"})
        elif path == "/short":
            self._head(handler, 200, **{"Content-Length": "5000"})
            handler.wfile.write(self._good)
        elif path == "/promised":
            self._head(handler, 200, **{"Content-Length": str(10**10)})
        elif path in ("/big", "/drip", "/headers", "/hung"):
            self._without_end(handler, path)
        else:
            self._head(handler, {"/500": 500, "/403": 403}.get(path, 404))

    @property
    def _good(self) -> bytes:
        return self.files["/good.webp"]

    def _robots(self, handler: BaseHTTPRequestHandler, host: str) -> None:
        told = self.robots.get(host, 404)
        if isinstance(told, int):
            self._head(handler, told)
        else:
            self._picture(handler, told.encode())

    def _refuse_at_first(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if path == "/closed":
            self._head(handler, 429, **{"Retry-After": "86400"})
        elif self.hits[handler.path] > 1:
            self._picture(handler, self._good)
        elif path == "/reset":
            linger = struct.pack("ii", 1, 0)  # close() sends RST
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
        elif path == "/flaky":
            self._head(handler, 503)
        else:
            after = "1" if path == "/busy" else formatdate(time.time() + 2, usegmt=True)
            self._head(handler, 429, **{"Retry-After": after})

    def _without_end(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if path == "/hung":
            self._stopped.wait()
        elif path == "/headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        else:
            self._head(handler, 200)
        while not self._stopped.wait(0.0 if path == "/big" else 0.1):
            handler.wfile.write(bytes(1 << 16) if path == "/big" else b"x")

    def _picture(self, handler: BaseHTTPRequestHandler, data: bytes, **headers: str) -> None:
        self._head(handler, 200, **{"Content-Length": str(len(data)), **headers})
        handler.wfile.write(data)

    @staticmethod
    def _head(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
