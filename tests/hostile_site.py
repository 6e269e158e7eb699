"""A web server for tests that does to a crawler what the web does, and counts the requests."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HostileSite(AbstractContextManager["HostileSite"]):
    """Serves `files` (path → bytes) with 200, and:

    /redirect → /good.webp; /loop → /loop; /away → `away`; /local-file → file:///etc/hostname; /500; /big: no
    length and no end; /promised: a length of 10 GB; /short: less than its length; /drip: a byte a moment;
    /noai: X-Robots-Tag.
    """

    def __init__(self, files: Mapping[str, bytes], delay_s: float = 0.0, away: str = "") -> None:
        self.files, self.delay_s, self.away = dict(files), delay_s, away
        self.hits: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with site._lock:
                    site.hits[self.path] += 1
                time.sleep(site.delay_s)
                try:
                    site._answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    return

            def log_message(self, format: str, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HostileSite":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        targets = {
            "/redirect": "/good.webp",
            "/loop": "/loop",
            "/away": self.away,
            "/local-file": "file:///etc/hostname",
        }
        path = handler.path
        if path in targets:
            self._head(handler, 302, Location=targets[path])
        elif path == "/500":
            self._head(handler, 500)
        elif path == "/promised":
            self._head(handler, 200, **{"Content-Length": str(10**10)})
        elif path == "/short":
            self._head(handler, 200, **{"Content-Length": "5000"})
            handler.wfile.write(self.files["/good.webp"])
        elif path == "/big":
            self._head(handler, 200)
            while not self._stopped.is_set():
                handler.wfile.write(bytes(1 << 16))
        elif path == "/drip":
            self._head(handler, 200)
            while not self._stopped.wait(0.1):
                handler.wfile.write(b"x")
        elif path == "/noai":
            data = self.files["/good.webp"]
            self._head(handler, 200, **{"X-Robots-Tag": "noai", "Content-Length": str(len(data))})
            handler.wfile.write(data)
        elif path in self.files:
            self._head(handler, 200, **{"Content-Length": str(len(self.files[path]))})
            handler.wfile.write(self.files[path])
        else:
            self._head(handler, 404)

    @staticmethod
    def _head(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
