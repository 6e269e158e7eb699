"""A small, quick HTTP server on 127.0.0.1 for a folder: what a crawl without a network fetches from."""

import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import unquote, urlsplit

TYPES = {".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class _Handler(BaseHTTPRequestHandler):
    """GET of a file under `root`; 404 for all else, paths that lead outside of it among them."""

    root: ClassVar[Path]

    def do_GET(self) -> None:
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        try:
            path = path.resolve()  # ValueError: a NUL within
            data = path.read_bytes() if path.is_relative_to(self.root) else None
        except (OSError, ValueError):
            data = None
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(path.suffix.lower(), "application/octet-stream"))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the crawl's own statuses tell what was fetched."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # all threads of all processes may knock at once
    daemon_threads = True
    block_on_close = False


class LocalSite(AbstractContextManager["LocalSite"]):
    """Serves `folder` from a thread, on a port that the system picks, while the `with` block runs."""

    def __init__(self, folder: Path) -> None:
        handler = type("Handler", (_Handler,), {"root": folder.resolve()})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self._server.server_address[1]

    def __enter__(self) -> "LocalSite":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
