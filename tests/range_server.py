"""A file server on 127.0.0.1 that answers range requests, as an object store does, and fails when told to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# (path, how often it was asked for) → a status to fail with, bytes to send in place of the file's, or None
Fault = Callable[[str, int], int | bytes | None]


class RangeServer(ThreadingHTTPServer):
    """Serves `directory`; `requests` holds (path, Range header) of each GET."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.requests: list[tuple[str, str | None]] = []
        self.fault: Fault = lambda path, times: None
        self.ranges = True
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, ending: str) -> int:
        return sum(path.endswith(ending) for path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        with self.server.lock:
            self.server.requests.append((self.path, wanted))
            times = sum(path == self.path for path, _ in self.server.requests)
        fault = self.server.fault(self.path, times)
        path = self.server.directory / self.path.lstrip("/")
        if isinstance(fault, int) or not path.is_file():
            return self._answer(fault if isinstance(fault, int) else 404, b"")
        data = path.read_bytes() if fault is None else fault
        if wanted is None or not self.server.ranges:
            return self._answer(200, data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if int(first) >= len(data):
            return self._answer(416, b"")
        return self._answer(206, data[int(first) : int(last) + 1 if last else None])

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(directory: Path) -> Iterator[RangeServer]:
    """A server of `directory` in a thread."""
    server = RangeServer(directory)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
