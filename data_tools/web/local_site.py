"""A small, quick HTTP server on 127.0.0.1 for folders: what a crawl without a network fetches from."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from data_tools.web.base64_pictures import Base64Pictures

TYPES = {".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class _Handler(BaseHTTPRequestHandler):
    """GET of a file under one of `roots`; 404 for all else, paths that lead outside of it among them."""

    roots: ClassVar[Mapping[str, Path | Base64Pictures]]

    def do_GET(self) -> None:
        path, data = unquote(urlsplit(self.path).path).lstrip("/"), None
        name, _, rest = ("", "", path) if "" in self.roots else path.partition("/")
        root = self.roots.get(name)
        if isinstance(root, Base64Pictures):
            data = root.read(rest.rpartition(".")[0])
        elif root is not None:
            try:
                file = (root / rest).resolve()  # ValueError: a NUL within
                data = file.read_bytes() if file.is_relative_to(root) else None
            except (OSError, ValueError):
                data = None
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(Path(path).suffix.lower(), "application/octet-stream"))
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
    """Serves folders from a thread, on a port that the system picks, while the `with` block runs.

    One folder is served as it is; of several, each by the first part of the path. A file stands for the
    folder of the pictures that it holds (base64_pictures.py).
    """

    def __init__(self, folders: Path | Mapping[str, Path]) -> None:
        """Raises DataError for a file of pictures that cannot be read."""
        named = {"": folders} if isinstance(folders, Path) else folders
        self._roots = {
            name: Base64Pictures(path) if path.is_file() else path.resolve() for name, path in named.items()
        }
        handler = type("Handler", (_Handler,), {"roots": self._roots})
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
        for root in self._roots.values():
            if isinstance(root, Base64Pictures):
                root.close()
