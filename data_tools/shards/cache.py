"""The files of a corpus at an address, by way of a bounded cache on this node's disk.

    <sha256>        a whole file of a corpus, named by its content: corpora that share a file share it here
    <sha256>.part   one that is being fetched; as large as the whole from the start, so that room is reserved
    <sha256>.lock   held by the process that fetches it; `.lock` alone by the one that makes room

Any number of processes share the directory. A file is fetched by one of them while the others wait for it,
checked against the manifest, and renamed. When room is needed, what was not read for longest goes; a process
that has it open reads on, as the system keeps an open file's content.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from data_tools.errors import explain_full_disk
from data_tools.remote import Remote, RemoteError
from data_tools.shards.files import CorpusError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20  # of one request: a block that fails is asked for again, not the whole file
DOWNLOADS = 2  # of a whole file whose checksum is wrong
_OWN = re.compile(r"[0-9a-f]{64}(\.part)?")  # a directory may hold other files too: they are left alone
ROOM_WAIT_S = 600.0  # for other processes' fetches to end, where they fill the cache


class ShardCache:
    """Whole files in a directory, `limit_bytes` at most; the locks' empty files are not counted."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes

    def open(self, name: str, size: int, sha256: str, remote: Remote) -> BinaryIO:
        """The file with this content, open for reading; `name` of `remote` is fetched if it is not here.

        Raises:
            CorpusError: it cannot be fetched, has another size or checksum, or is larger than the cache.
            DiskFullError: the disk has less room than the cache may take.
        """
        path = self.directory / sha256
        found = _opened(path)
        if found is not None:
            return found
        if size > self.limit_bytes:
            raise CorpusError(
                f"{remote.where(name)}: has {size:,} bytes, the cache {self.directory} takes "
                f"{self.limit_bytes:,}: raise data.cache_gb"
            )
        with explain_full_disk(self.directory, "The files that were complete stay there."):
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                found = _opened(path)  # another process may have fetched it meanwhile
                return found if found is not None else self._fetch(path, name, size, remote)

    def _fetch(self, path: Path, name: str, size: int, remote: Remote) -> BinaryIO:
        """Fetch to <path>.part, check, rename; opened before anyone can make room of it."""
        part = path.with_name(f"{path.name}.part")
        problem = ""
        try:
            for _ in range(DOWNLOADS):
                self._reserve(part, size)
                problem = _download(part, name, size, path.name, remote)
                if not problem:
                    file = part.open("rb", buffering=0)
                    part.replace(path)
                    return file
                logger.warning("%s: %s; fetched again", remote.where(name), problem)
        finally:
            part.unlink(missing_ok=True)
        raise CorpusError(
            f"{remote.where(name)}: {problem}: it is damaged, or was changed after the manifest was written. "
            "Put the corpus there again."
        )

    def _reserve(self, part: Path, size: int) -> None:
        """Make `part` of its full size, once what is in the cache leaves the room."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while True:
            with FileLock(self.directory / ".lock"):
                if self._make_room(size, part.name):
                    with part.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, size)
                    return
            if time.monotonic() > deadline:
                raise CorpusError(
                    f"{self.directory}: other fetches filled the cache of {self.limit_bytes:,} bytes for "
                    f"{ROOM_WAIT_S:.0f} s: raise data.cache_gb"
                )
            time.sleep(0.05)

    def _make_room(self, size: int, own: str) -> bool:
        """Delete what was read longest ago until `size` more bytes fit; whether they do."""
        files: list[tuple[float, int, Path]] = []
        total = 0
        for path in self.directory.iterdir():
            if not _OWN.fullmatch(path.name) or path.name == own or _left_over(path):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # a fetch renamed or dropped its part just now
                continue
            total += status.st_size
            if path.suffix != ".part":
                files.append((status.st_mtime, status.st_size, path))
        for _, freed, path in sorted(files):
            if total + size <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= freed
        return total + size <= self.limit_bytes


def _opened(path: Path) -> BinaryIO | None:
    """The file, if it is there; its time of change says when it was read last."""
    try:
        file = path.open("rb", buffering=0)
        os.utime(path)
    except FileNotFoundError:  # not there, or gone while it was opened: fetched again
        return None
    return file


def _left_over(path: Path) -> bool:
    """Whether `path` is the part of a process that was killed; it is deleted then."""
    if path.suffix != ".part":
        return False
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            path.unlink(missing_ok=True)
            return True
    except Timeout:
        return False


def _download(part: Path, name: str, size: int, sha256: str, remote: Remote) -> str:
    """Write the file to `part`, block by block; what is wrong with it, or nothing."""
    digest = hashlib.sha256()
    with part.open("r+b") as file:
        for start in range(0, size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size)
            data = remote.read(name, start, stop)
            if start == 0 and len(data) == size:  # the server knows no ranges, or there is one block
                stop = size
            if len(data) != stop - start:
                return f"{start + len(data):,} bytes instead of {size:,}"
            digest.update(data)
            file.write(data)
            if stop == size:
                break
    return "" if digest.hexdigest() == sha256 else "the checksum is not the manifest's"


class RemoteFiles:
    """The files of a corpus at an address. See shard_files.ShardFiles for what each method does."""

    def __init__(self, address: str, cache: ShardCache | None) -> None:
        """Without a cache nothing but the manifest can be read."""
        self._remote, self._cache = Remote(address), cache
        self._known: dict[str, tuple[int, str]] = {}  # shard → bytes, sha256
        self._ahead: _FetchAhead | None = None

    def where(self, name: str) -> str:
        return self._remote.where(name)

    def manifest(self) -> bytes:
        try:
            return self._remote.read("manifest.json")
        except RemoteError as error:
            raise CorpusError(str(error)) from error

    def index(self, size: int, sha256: str) -> BinaryIO:
        return self._opened("index.parquet", size, sha256)

    def check(self, shard: str, size: int, sha256: str) -> None:
        self._known[shard] = (size, sha256)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        with self._opened(shard, *self._known[shard]) as file:
            return os.pread(file.fileno(), size, offset)

    def sha256(self, shard: str) -> str:
        with self._opened(shard, *self._known[shard]) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def reads(self, together: int | None) -> None:
        sizes = sorted((size for size, _ in self._known.values()), reverse=True)
        needed = sum(sizes if together is None else sizes[: 2 * together])
        if self._cache is not None and needed > self._cache.limit_bytes:
            raise CorpusError(
                f"{self.where('')}: {needed / 1e9:,.3f} GB of it are read at a time, the cache "
                f"{self._cache.directory} takes {self._cache.limit_bytes / 1e9:,.3f}: shards would be "
                "fetched over and over; raise data.cache_gb, or set data.mix_shards (lower)"
            )

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        if self._ahead is None:
            self._ahead = _FetchAhead(self)
        self._ahead.ask(shards)

    def close(self) -> None:
        """Nothing is kept open."""

    def _opened(self, name: str, size: int, sha256: str) -> BinaryIO:
        if self._cache is None:
            raise CorpusError(f"{self.where(name)}: is read by way of a cache: give data.cache_dir")
        try:
            return self._cache.open(name, size, sha256, self._remote)
        except RemoteError as error:
            raise CorpusError(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}


class _FetchAhead:
    """A thread that fetches shards before they are read."""

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._process = 0
        self._asked: SimpleQueue[str] = SimpleQueue()

    def ask(self, shards: Sequence[str]) -> None:
        if self._process != os.getpid():  # the first call, or a child of a fork, which has no such thread
            self._process, self._asked = os.getpid(), SimpleQueue()
            threading.Thread(target=self._run, args=(self._asked,), name="shards", daemon=True).start()
        for shard in shards:
            self._asked.put(shard)

    def _run(self, asked: "SimpleQueue[str]") -> None:
        while True:
            shard = asked.get()
            try:
                self._files.read(shard, 0, 0)
            except Exception as error:  # whoever reads the shard meets it again, and raises it
                logger.debug("fetching ahead: %s", error)
