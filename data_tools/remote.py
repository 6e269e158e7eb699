"""Reading from an address (http://…, s3://…, any protocol that fsspec has here), with bounded retries."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import fsspec

from data_tools.errors import DataError

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 60.0  # of one request over HTTP; other protocols have their own settings in fsspec's


class RemoteError(DataError):
    """An address that cannot be read; the message names it."""


@dataclass(frozen=True)
class Patience:
    """How often and how long a read is tried again."""

    tries: int = 6
    first_wait_s: float = 0.5  # twice as long after each try
    longest_wait_s: float = 20.0
    total_s: float = 300.0  # no try begins later than this after the first


PATIENCE = Patience()


def is_address(text: str) -> bool:
    """Whether `text` is an address (s3://bucket/corpus), not a path."""
    return "://" in text


class Remote:
    """The files below an address. Safe across fork, spawn and threads: it holds no connection."""

    def __init__(self, address: str) -> None:
        """Options of a protocol (endpoint, credentials) are fsspec's: FSSPEC_S3_ENDPOINT_URL and so on."""
        self.address = address.rstrip("/")

    def where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to before `stop` (None: the end); fewer where the file ends before.

        A server that knows no ranges sends the whole file, and the whole file comes back.

        Raises:
            RemoteError: the protocol is not installed, the file is not there or may not be read, or all
                tries failed.
        """
        url = self.where(name)
        begun = time.monotonic()
        wait_s = PATIENCE.first_wait_s
        for number in range(1, PATIENCE.tries + 1):
            try:
                return self._once(url, start, stop)
            except Exception as error:  # each protocol's library raises its own
                problem = _final(url, error)
                if problem is not None:
                    raise RemoteError(problem) from error
                late = time.monotonic() - begun + wait_s > PATIENCE.total_s
                if number == PATIENCE.tries or late:
                    spent_s = time.monotonic() - begun
                    raise RemoteError(
                        f"{url}: cannot be read, {number} tries in {spent_s:.0f} s; the last: "
                        f"{_said(error)}. See that the server answers, and run the same command again."
                    ) from error
                logger.warning("%s: %s; again in %.1f s", url, _said(error), wait_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, PATIENCE.longest_wait_s)
        raise AssertionError("a try returns or raises")

    def _once(self, url: str, start: int, stop: int | None) -> bytes:
        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            import aiohttp  # what no path on disk needs is not imported with this module

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)}
        system, path = fsspec.core.url_to_fs(url, **options)  # fsspec keeps one a process
        if start == 0 and stop is None:
            return bytes(system.cat_file(path))
        return bytes(system.cat_file(path, start=start, end=stop))


def _final(url: str, error: Exception) -> str | None:
    """What to say about an error that another try would meet again; None for all others."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return f"{url}: not found. See that the address is that of the corpus's directory."
    if status == 416:
        return f"{url}: ends before it should (HTTP 416). Put the corpus there again."
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"{url}: may not be read ({_said(error)}). Give fsspec the credentials of its protocol."
    if isinstance(error, ImportError):
        return f"{url}: its protocol needs a package that is not installed: {error}"
    if isinstance(error, ValueError) and "protocol" in str(error).lower():
        return f"{url}: {error}. Protocols here: {', '.join(sorted(fsspec.available_protocols()))}."
    return None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
