"""The files of a corpus, read by name and offset: here from a directory, local or shared."""

import hashlib
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_tools.errors import DataError

OPEN_FILES = 4096  # shards that a process keeps open at most; the one not read for longest is closed
_OTHER_FILES = 256  # left for everything else that a process opens


class CorpusError(DataError):
    """A corpus that is not there, not whole, or damaged."""


class ShardFiles(Protocol):
    """Where the files of a corpus are. Safe across fork, spawn and threads."""

    def where(self, name: str) -> str:
        """What errors call a file: its path or its address."""

    def manifest(self) -> bytes:
        """The content of manifest.json."""

    def index(self, size: int, sha256: str) -> BinaryIO:
        """index.parquet, open for reading. Raises CorpusError when it is not there or of another size."""

    def check(self, shard: str, size: int, sha256: str) -> None:
        """Make a shard of the manifest known. Raises CorpusError if it can be seen that it is not there."""

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it ends before. Raises CorpusError when it cannot be read."""

    def sha256(self, shard: str) -> str:
        """Of the whole shard, read anew."""

    def reads(self, together: int | None) -> None:
        """So many of the known shards will be read at a time, and as many of the next; None: all.

        Raises CorpusError where they do not fit in a cache.
        """

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """These will be read soon. Returns at once, raises nothing."""

    def close(self) -> None:
        """Close what is open; reading opens it again."""


class _OpenFile:
    """A descriptor that is closed when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class DirectoryFiles:
    """The files of a corpus in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._most = _allowed_open_files()
        # the last one was read last; no lock, which a fork could leave locked
        self._open: dict[str, _OpenFile] = {}

    def where(self, name: str) -> str:
        return str(self._directory / name)

    def manifest(self) -> bytes:
        try:
            return (self._directory / "manifest.json").read_bytes()
        except FileNotFoundError as error:
            raise CorpusError(
                f"{self.where('manifest.json')}: no manifest: not the out/ of a finished shard stage."
            ) from error
        except OSError as error:
            raise CorpusError(f"{self.where('manifest.json')}: cannot be read ({error}).") from error

    def index(self, size: int, sha256: str) -> BinaryIO:
        path = self._directory / "index.parquet"
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "is missing" if found is None else "has another size than the manifest says"
            raise CorpusError(f"{path}: {said}. Run the shard stage again.")
        return path.open("rb")

    def check(self, shard: str, size: int, sha256: str) -> None:
        path = self._directory / shard
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise CorpusError(f"{path}: the shard {said}. Run the shard stage again.")

    def read(self, shard: str, offset: int, size: int) -> bytes:
        file = self._file(shard)  # held, so that no other thread's reading closes it meanwhile
        # children of a fork go on with an open file, as pread moves no shared position
        return os.pread(file.number, size, offset)

    def sha256(self, shard: str) -> str:
        with (self._directory / shard).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def reads(self, together: int | None) -> None:
        """Nothing has to fit: they are here."""

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Nothing to fetch: they are here."""

    def close(self) -> None:
        self._open.clear()

    def _file(self, shard: str) -> _OpenFile:
        file = self._open.pop(shard, None)  # two threads that ask at once open it twice, and one stays
        if file is None:
            try:
                file = _OpenFile(self._directory / shard)
            except OSError as error:
                raise CorpusError(f"{self.where(shard)}: cannot be opened: {error.strerror}") from error
        self._open[shard] = file
        while len(self._open) > self._most:
            with suppress(StopIteration, RuntimeError):  # another thread was at it too
                self._open.pop(next(iter(self._open)), None)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _allowed_open_files() -> int:
    """How many shards to keep open; this process's soft limit is raised for them, if the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else max(soft, min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft - _OTHER_FILES))
