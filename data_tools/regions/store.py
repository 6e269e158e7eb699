"""The regions of a corpus's pictures on disk, and reading those of one picture.

features.npy    (n, r, v) float16 or float32
positions.npy   (n, r, 5) float32: x1/W, y1/H, x2/W, y2/H, area/(W·H)
classes.npy     (n, r) int32; NO_CLASS: unknown
sums.npy        (n,) uint32: crc32 of a row's bytes in the three, never 0; 0 where a picture has no regions
keys.parquet    of each row the sample's key and the sha256 of the picture
missing.parquet which samples have none, and why
manifest.json   sizes, names of the classes, checksums; written last

Row i is sample i of the corpus. The arrays are plain .npy files, which numpy maps into memory; a picture is
read by pread, so that a file that was cut short or a disk that fails raises, where a map would kill the
process, and so that nothing but file descriptors is held.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.errors import DataError

FORMAT = 1
CONTENT = "regions"  # in the manifest: a corpus has one of that name too
NO_CLASS = -1
POSITION = 5  # numbers of a region's position
MANIFEST, KEYS, SUMS, MISSING = "manifest.json", "keys.parquet", "sums.npy", "missing.parquet"
ARRAYS = ("features", "positions", "classes")
DTYPES = ("float16", "float32")  # of features
_REMEDY = "run the regions stage again"


class RegionError(DataError):
    """Regions that are not there, not whole, damaged, or of other pictures."""


@dataclass(frozen=True)
class PictureRegions:
    """The regions of one picture."""

    features: np.ndarray  # (r, v)
    positions: np.ndarray  # (r, 5) float32
    classes: np.ndarray  # (r,) int32


@dataclass(frozen=True)
class Layout:
    """The sizes of a store: `rows` pictures of `regions` regions with features of `width` numbers."""

    rows: int
    regions: int
    width: int
    dtype: str  # of the features

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ARRAYS."""
        last = {"features": (self.width,), "positions": (POSITION,), "classes": ()}[name]
        return (self.rows, self.regions, *last)

    def dtype_of(self, name: str) -> np.dtype:
        return np.dtype({"features": self.dtype, "positions": "float32", "classes": "int32"}[name])

    def row_bytes(self, name: str) -> int:
        return int(np.prod(self.shape(name)[1:])) * self.dtype_of(name).itemsize

    @property
    def bytes(self) -> int:
        """Of all rows of all arrays."""
        return self.rows * sum(self.row_bytes(name) for name in ARRAYS)


class RowFiles:
    """The open files of a store's arrays, by rows; errors name the file."""

    def __init__(self, directory: Path, layout: Layout, flags: int):
        self.directory, self.layout = directory, layout
        self._starts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        for name in ARRAYS:
            path = directory / f"{name}.npy"
            self._starts[name] = _data_start(path, layout.shape(name), layout.dtype_of(name))
            self._numbers[name] = os.open(path, flags | os.O_CLOEXEC)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        for number in self._numbers.values():
            os.close(number)
        self._numbers = {}

    def read(self, row: int) -> dict[str, bytes]:
        """A row's bytes, by array; fewer where a file ends before."""
        return {name: os.pread(self._numbers[name], *self._place(name, row)) for name in ARRAYS}

    def write(self, row: int, data: dict[str, bytes]) -> None:
        for name in ARRAYS:
            os.pwrite(self._numbers[name], data[name], self._place(name, row)[1])

    def sync(self) -> None:
        for number in self._numbers.values():
            os.fsync(number)

    def _place(self, name: str, row: int) -> tuple[int, int]:
        size = self.layout.row_bytes(name)
        return size, self._starts[name] + row * size


class RegionStore:
    """Reads the out/ of a regions stage. Safe across fork, spawn and threads."""

    def __init__(self, directory: Path, manifest: dict[str, Any], keys: pa.Table, sums: np.ndarray):
        self.directory = directory
        self.layout = Layout(*(manifest[name] for name in ("rows", "regions", "width", "dtype")))
        self.class_names: list[str] | None = manifest["class_names"]
        self.class_count: int | None = manifest["class_count"]  # classes are below it; None: unknown
        self._keys, self._sums = keys, sums
        self._files: RowFiles | None = None

    @classmethod
    def open(cls, directory: Path) -> "RegionStore":
        """Look at sizes, names and the checksums of the small files; the rows are checked as they are read.

        Raises RegionError for a directory that is no finished store, and for files that are not as the
        manifest says.
        """
        manifest = _read_manifest(directory)
        for name, told in manifest["files"].items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != told["bytes"]:
                said = "is missing" if found is None else f"has {found} bytes, not {told['bytes']}"
                raise RegionError(f"{path}: {said}: {_REMEDY}")
            if told["sha256"] is not None and file_sha256(path) != told["sha256"]:
                raise RegionError(f"{path}: damaged: its sha256 is not the one in {MANIFEST}: {_REMEDY}")
        return cls(directory, manifest, pq.read_table(directory / KEYS), np.load(directory / SUMS))

    def __len__(self) -> int:
        return self.layout.rows

    def rows_of(self, keys: Sequence[str], pictures: Sequence[str]) -> np.ndarray:
        """(n,) int64: the row of each sample; -1 where the store has no regions of it.

        keys, pictures: the samples' keys and their pictures' sha256. Raises RegionError for a sample whose
        picture is another one than that the regions are of.
        """
        rows = pc.index_in(pa.array(keys, pa.string()), value_set=self._keys["key"].combine_chunks())
        found = rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        there = np.flatnonzero(found >= 0)
        mine = self._keys["picture"].take(pa.array(found[there])).to_pylist()
        for place, picture in zip(there.tolist(), mine, strict=True):
            if picture != pictures[place]:
                raise RegionError(
                    f"{self.directory}: sample {keys[place]}: the regions are of another picture than the "
                    f"corpus has now: {_REMEDY} on this corpus"
                )
        found[there] = np.where(self._sums[found[there]] != 0, found[there], -1)
        return found

    def row(self, row: int) -> PictureRegions:
        """The regions of a row that `rows_of` gave. Raises RegionError, with file and key, where damaged."""
        if self._files is None:
            self._files = RowFiles(self.directory, self.layout, os.O_RDONLY)
        data = self._files.read(row)
        if row_sum(data) != int(self._sums[row]):
            raise RegionError(
                f"{self.directory}: sample {self._keys['key'][row].as_py()} (row {row}): damaged: its "
                f"checksum is not the one in {SUMS}: {_REMEDY}"
            )
        return PictureRegions(
            **{
                name: np.frombuffer(data[name], self.layout.dtype_of(name)).reshape(
                    self.layout.shape(name)[1:]
                )
                for name in ARRAYS
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": None}


def row_sum(data: dict[str, bytes]) -> int:
    """The checksum of a row; 0 says that there is none."""
    total = 0
    for name in ARRAYS:
        total = zlib.crc32(data[name], total)
    return total or 1


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RegionError(f"{path}: no manifest: not the out/ of a finished regions stage") from error
    except (OSError, ValueError) as error:
        raise RegionError(f"{path}: cannot be read ({error}): {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("content") != CONTENT:
        raise RegionError(f"{path}: is of no regions: name a regions stage")
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise RegionError(f"{path}: format: {found!r}; this version reads {FORMAT}: {_REMEDY}")
    return manifest


def _data_start(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Where the numbers of a .npy file begin; RegionError for one of another shape or type."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            found = read[version](file)
            if found != (shape, False, dtype):
                raise RegionError(f"{path}: {found[0]} {found[2]}, not {shape} {dtype}: {_REMEDY}")
            return file.tell()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RegionError):
            raise
        raise RegionError(f"{path}: cannot be read ({error}): {_REMEDY}") from error
