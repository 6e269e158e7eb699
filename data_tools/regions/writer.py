"""Writes a store of regions row by row, from several processes at once: aside, and committed last.

A row is whole once its checksum stands in sums.npy, which is written after it. So a kill costs no more than
the row at hand, and the next start computes what is missing, whoever computed the rest: a row depends on its
own picture alone.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.regions.store import (
    ARRAYS,
    CONTENT,
    FORMAT,
    KEYS,
    MANIFEST,
    MISSING,
    POSITION,
    SUMS,
    Layout,
    PictureRegions,
    RegionError,
    RowFiles,
    file_sha256,
    row_sum,
)

SPARE = 1.05  # free space asked for, as a multiple of what is written
_SUM_BYTES = 4
_EDGE = 1e-4  # a position's rounding over the edge of the picture
MISSING_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "name", "reason", "detail")])


def prepare(directory: Path, layout: Layout) -> None:
    """Make the empty files of a store, or keep those that an earlier start left. One process calls it.

    Raises RegionError when there is no room for the rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = layout.bytes - sum(_allocated(directory / f"{name}.npy") for name in ARRAYS)
    free = shutil.disk_usage(directory).free
    if free < missing * SPARE:
        raise RegionError(
            f"{directory}: {free // 2**20} MiB are free, the regions of {layout.rows} pictures need "
            f"{int(missing * SPARE) // 2**20} MiB; make room, or give another --root"
        )
    arrays = {name: (layout.shape(name), layout.dtype_of(name)) for name in ARRAYS}
    for name, (shape, dtype) in (arrays | {"sums": ((layout.rows,), np.dtype("uint32"))}).items():
        path = directory / f"{name}.npy"
        if not path.is_file():
            part = path.with_suffix(".tmp")
            # zeros that take no space until they are written
            np.lib.format.open_memmap(part, "w+", dtype, shape)
            part.replace(path)


class RegionWriter:
    """One process's hold of a store that `prepare` made."""

    def __init__(self, directory: Path, layout: Layout):
        self.directory, self.layout = directory, layout
        self._files = RowFiles(directory, layout, os.O_RDWR)
        path = directory / SUMS
        self._sums_start = path.stat().st_size - layout.rows * _SUM_BYTES
        self._sums = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> "RegionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        os.close(self._sums)

    def is_whole(self, row: int) -> bool:
        """Whether an earlier start wrote the row, and nothing has changed it since."""
        place = self._sums_start + row * _SUM_BYTES
        told = int.from_bytes(os.pread(self._sums, _SUM_BYTES, place), "little")
        return told != 0 and told == row_sum(self._files.read(row))

    def write(self, row: int, regions: PictureRegions | None) -> None:
        """A row, in the store's types; None: the picture has no regions.

        Raises RegionError for sizes that are not the store's, numbers that are not finite and positions that
        are no boxes in a picture.
        """
        if regions is None:
            self._say(row, 0)
            return
        data = self._checked(regions)
        self._files.write(row, data)
        self._say(row, row_sum(data))

    def sync(self) -> None:
        """All that was written is on the disk."""
        self._files.sync()
        os.fsync(self._sums)

    def _say(self, row: int, total: int) -> None:
        os.pwrite(self._sums, total.to_bytes(_SUM_BYTES, "little"), self._sums_start + row * _SUM_BYTES)

    def _checked(self, regions: PictureRegions) -> dict[str, bytes]:
        data = {}
        for name in ARRAYS:
            values, shape = np.asarray(getattr(regions, name)), self.layout.shape(name)[1:]
            if values.shape != shape:
                raise RegionError(f"{name} of the shape {values.shape}, not {shape}")
            with np.errstate(over="ignore"):
                made = np.ascontiguousarray(values, self.layout.dtype_of(name))
            if not np.isfinite(made).all():
                if np.isfinite(values).all():
                    raise RegionError(
                        f"{name}: {np.abs(values).max():.4g} is too large for {made.dtype}; set "
                        "dtype: float32"
                    )
                raise RegionError(f"{name}: not all of them are finite numbers")
            data[name] = made.tobytes()
        _check_positions(np.asarray(regions.positions))
        return data


def commit(
    directory: Path,
    layout: Layout,
    samples: pa.Table,
    missing: Sequence[dict[str, str]],
    class_count: int | None,
    class_names: Sequence[str] | None,
    source: dict[str, Any],
) -> None:
    """Write what is beside the arrays, manifest.json last. One process calls it, when all rows are there.

    samples: `key` and `picture` of each row. missing: rows of MISSING_SCHEMA. source: how they were made.
    """
    pq.write_table(samples.select(["key", "picture"]), directory / KEYS)
    write_missing(directory, missing)
    small = (KEYS, SUMS, MISSING)
    files = {
        name: {
            "bytes": (directory / name).stat().st_size,
            # of the arrays, each row has a checksum: opening a store must not read them through
            "sha256": file_sha256(directory / name) if name in small else None,
        }
        for name in (*(f"{name}.npy" for name in ARRAYS), *small)
    }
    manifest = {
        "content": CONTENT,
        "format": FORMAT,
        "rows": layout.rows,
        "missing": len(missing),
        "regions": layout.regions,
        "width": layout.width,
        "dtype": layout.dtype,
        "class_count": class_count,
        "class_names": None if class_names is None else list(class_names),
        "source": source,
        "files": files,
    }
    temporary = directory / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / MANIFEST)


def write_missing(directory: Path, missing: Sequence[dict[str, str]]) -> Path:
    """missing.parquet; its path."""
    path = directory / MISSING
    pq.write_table(pa.Table.from_pylist(list(missing), MISSING_SCHEMA), path)
    return path


def _check_positions(positions: np.ndarray) -> None:
    """Corners in the picture, the first above and left of the second, and the area that they give."""
    x1, y1, x2, y2, area = positions.T.astype(np.float64)
    corners = positions[:, : POSITION - 1]
    if corners.min() < -_EDGE or corners.max() > 1 + _EDGE or (x2 < x1).any() or (y2 < y1).any():
        raise RegionError("positions: a box lies outside the picture, or its corners are the wrong way round")
    if np.abs(area - (x2 - x1) * (y2 - y1)).max() > _EDGE:
        raise RegionError("positions: the last number is not the share of the picture that the box covers")


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() else 0
