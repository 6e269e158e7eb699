"""The members of a tar that may be damaged or hostile, from every header that can be found in it.

Nothing is extracted, and nothing is read or reserved on the word of a header: a size is compared with the
file's first. What grows with the file is the list of its headers.
"""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.shards.format import BLOCK, END_BYTES, padded

CHUNK_BYTES = 4 << 20  # that are in memory at a time
_EXTENDED_BYTES = 1 << 20  # of a long name or of pax records; more is no name
_MAGIC = np.frombuffer(b"ustar", dtype=np.uint8)
_MAGIC_AT = 257
_FEW_BYTES = 16  # a block with fewer that are not zero is one of zeros with a flaw: a header has more

PLAIN = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_NO_DATA = frozenset(
    {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE}
)
_EXTENDED = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


@dataclass(frozen=True, slots=True)
class Header:
    """A block whose checksum is that of a tar header."""

    offset: int
    name: str  # bytes that are no UTF-8 as surrogates
    size: int
    type: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A member: where it starts (a long name's header may come first), its own header, and its data."""

    start: int
    header: int
    name: str
    offset: int  # of the data
    size: int
    type: bytes = tarfile.REGTYPE

    @property
    def end(self) -> int:
        return self.offset + padded(self.size)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at a place of a tar.

    Kinds: header, truncated, interleaved, padding, after_end, not_a_tar.
    """

    kind: str
    offset: int
    detail: str
    name: str = ""  # of the member that it concerns, where one can be named


@dataclass(frozen=True)
class Scan:
    """One reading of a file: its size, checksum and headers."""

    size: int
    sha256: str
    headers: list[Header]  # by offset
    last_byte: int  # offset just after the last byte that is not zero, rounded up to a block


class TarFile:
    """A tar, open for reading at any place."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes, fewer where the file ends before."""
        return os.pread(self._file.fileno(), min(size, max(self.size - offset, 0)), offset)

    def sha256(self, offset: int, size: int) -> str:
        """Of some of its bytes, a chunk in memory at a time."""
        digest = hashlib.sha256()
        stop = min(offset + size, self.size)
        for start in range(offset, stop, CHUNK_BYTES):
            digest.update(self.read(start, min(CHUNK_BYTES, stop - start)))
        return digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def scan(file: TarFile) -> Scan:
    """Read the whole file once: its checksum, and every block that is a header, wherever it stands."""
    digest, headers, last = hashlib.sha256(), list[Header](), 0
    for start in range(0, file.size, CHUNK_BYTES):
        chunk = file.read(start, CHUNK_BYTES)
        digest.update(chunk)
        blocks = np.frombuffer(chunk + bytes(-len(chunk) % BLOCK), dtype=np.uint8).reshape(-1, BLOCK)
        magic = (blocks[:, _MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC).all(axis=1)
        for number in np.flatnonzero(magic).tolist():
            header = _header(blocks[number].tobytes(), start + number * BLOCK)
            if header is not None:
                headers.append(header)
        filled = np.flatnonzero(blocks.any(axis=1))
        if len(filled):
            last = start + (int(filled[-1]) + 1) * BLOCK
    return Scan(file.size, digest.hexdigest(), headers, last)


def _header(block: bytes, offset: int) -> Header | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return None if info.size < 0 else Header(offset, info.name, info.size, info.type)


class Walk:
    """The members of a tar one after the other, going on at the next sound header where one is damaged.

    `holds` is asked about a member in whose data another header stands: whether its bytes are its own all
    the same (a tar within a picture), or blocks of two tars were mixed. It is told whether a header or the
    end of the tar follows where the member ends, which is chance where they were mixed.
    """

    def __init__(self, file: TarFile, found: Scan, holds: Callable[[Member, bool], bool]) -> None:
        self.members: list[Member] = []
        self.faults: list[Fault] = []
        self._file, self._scan, self._holds = file, found, holds
        self._at = {header.offset: header for header in found.headers}
        self._offsets = [header.offset for header in found.headers]
        self._run()

    def _run(self) -> None:
        if self._scan.size == 0:
            self._fault("not_a_tar", 0, "an empty file")
            return
        place: int | None = 0
        while place is not None and place < self._scan.size:
            if self._header(place) is not None:
                place = self._member(place)
            elif self._ends(place):
                return
            else:
                place = self._next(place)
        if place is None and not self.members and not self._offsets:
            self.faults = [Fault("not_a_tar", 0, "no header in it is one of a tar")]
        elif place is not None:
            self._fault("truncated", self._scan.size, "the file ends without the end of a tar")

    def _ends(self, place: int) -> bool:
        """Whether the tar ends at a block that is no header; what is wrong there."""
        block = self._file.read(place, BLOCK)
        few = len(block) - block.count(0) < (_FEW_BYTES if place else 1)
        after = self._next(place)
        if not few:
            self._fault("header", place, "a header is damaged")
            return False
        if after is not None:
            self._fault("after_end", place, f"a tar ends here, and goes on at byte {after}")
            return False
        if self._scan.size - place < END_BYTES or self._scan.size % BLOCK:
            self._fault("truncated", self._scan.size, "the file ends within the end of a tar")
        elif self._scan.last_byte > place:
            self._fault("padding", place, "bytes after the end of the tar are not zero")
        return True

    def _member(self, place: int) -> int | None:
        """Take the member whose first header is at `place`; where to go on."""
        made = self._assemble(place)
        if isinstance(made, Fault):
            self.faults.append(made)
            return self._next(made.offset if made.kind == "header" else place)
        if made.end > padded(self._scan.size) or made.offset + made.size > self._scan.size:
            said = f"{made.size:,} bytes from {made.offset:,}, and the file has {self._scan.size:,}"
            self._fault("truncated", place, said, made.name)
            return self._next(made.header)
        inner = self._next(made.offset - 1)
        if inner is not None and inner < made.end and not self._holds(made, self._followed(made)):
            self._fault(
                "interleaved", made.header, f"a header stands in its data, at byte {inner}", made.name
            )
            return inner
        self.members.append(made)
        rest = self._file.read(made.offset + made.size, made.end - made.offset - made.size)
        if rest.strip(b"\0"):
            self._fault("padding", made.offset + made.size, "padding is not zero", made.name)
        return made.end

    def _followed(self, member: Member) -> bool:
        after = self._file.read(member.end, BLOCK)
        return not after.strip(b"\0") or self._header(member.end) is not None

    def _assemble(self, place: int) -> Member | Fault:
        """A header with the long name or the pax records before it."""
        start, name, size = place, None, None
        while True:
            header = self._header(place)
            if header is None:
                return Fault("header", place, "a header is damaged, and a long name before it lost")
            if header.type not in _EXTENDED:
                break
            if header.size > _EXTENDED_BYTES or place + BLOCK + header.size > self._scan.size:
                return Fault("truncated", place, f"an extended header of {header.size:,} bytes", header.name)
            data = self._file.read(place + BLOCK, header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = _pax(data)
                name, size = records.get("path", name), records.get("size", size)
            place += BLOCK + padded(header.size)
        own = 0 if header.type in _NO_DATA else header.size
        if size is not None and own:
            if not size.isdecimal() or len(size) > 20:
                return Fault("header", place, f"a pax header's size is '{size[:40]}'", header.name)
            own = int(size)
        return Member(start, place, name or header.name, place + BLOCK, own, header.type)

    def _header(self, place: int) -> Header | None:
        """The header at a place: one that was found, or one of the old kind, without a magic word."""
        return self._at.get(place) or _header(self._file.read(place, BLOCK), place)

    def _next(self, place: int) -> int | None:
        """The next header after `place`."""
        number = bisect_right(self._offsets, place)
        return self._offsets[number] if number < len(self._offsets) else None

    def _fault(self, kind: str, offset: int, detail: str, name: str = "") -> None:
        self.faults.append(Fault(kind, offset, detail, name))


def _pax(data: bytes) -> dict[str, str]:
    """The records "<length> <name>=<value>\\n" of a pax header, as far as they are sound."""
    records: dict[str, str] = {}
    while data:
        digits, _, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[len(digits) + 1 : length - 1]
        name, equals, value = record.partition(b"=")
        if length <= len(digits) + 2 or length > len(data) or not equals:
            break
        records[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records
