"""The TSV files of bottom-up attention (and LXMERT): a line a picture, its arrays in base64."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.regions.feature_files import Entry
from data_tools.regions.store import RegionError

BUTD_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
_SAME = {"img_id": "image_id", "img_w": "image_w", "img_h": "image_h"}
_NEEDED = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
_BYTES = {"features": "<f4", "boxes": "<f4", "objects_id": "<i8", "objects_conf": "<f4"}


def known_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns by the names of bottom-up attention; RegionError where one that is read is missing."""
    named = tuple(_SAME.get(name, name) for name in columns)
    missing = [name for name in _NEEDED if named.count(name) != 1]
    if missing:
        raise RegionError(f"columns: '{missing[0]}' must stand there once; {', '.join(_NEEDED)} are read")
    return named


class TsvFile:
    """One file. It is read through once for where each line begins; a line is then read alone."""

    def __init__(self, path: Path, columns: Sequence[str] = BUTD_COLUMNS):
        """Raises RegionError, with the line, for one without the columns."""
        self.where, self._path = str(path), path
        self._columns = known_columns(columns)
        self._ids: list[str] = []
        self._places: list[tuple[int, int]] = []
        self._scan()
        self.width = self.entry(0).features.shape[1]

    def ids(self) -> list[str]:
        return self._ids

    def entry(self, place: int) -> Entry:
        start, size = self._places[place]
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(size)
        cells = dict(zip(self._columns, line.rstrip(b"\r\n").split(b"\t"), strict=False))
        where = f"{self.where}: line {place + 1}"
        try:
            count = int(cells["num_boxes"])
            width, height = float(cells["image_w"]), float(cells["image_h"])
            found = {name: _decoded(cells[name], name, where) for name in _BYTES if name in cells}
        except (ValueError, KeyError) as error:
            if isinstance(error, RegionError):
                raise
            raise RegionError(f"{where}: is no line of {', '.join(self._columns)} ({error})") from error
        known = getattr(self, "width", len(found["features"]) // max(count, 1))
        for name, values in (("features", known), ("boxes", 4), ("objects_id", 1), ("objects_conf", 1)):
            if name in found and len(found[name]) != count * values:
                raise RegionError(
                    f"{where}: {name} has {len(found[name])} numbers, not num_boxes {count} × {values}; the "
                    "file is damaged, or its columns are others: see `columns`"
                )
        return Entry(
            found["features"].reshape(count, known),
            found["boxes"].reshape(count, 4),
            (width, height),
            found.get("objects_id"),
            found.get("objects_conf"),
        )

    def _scan(self) -> None:
        at = self._columns.index("image_id")
        start = 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    found = line.count(b"\t") + 1
                    if found != len(self._columns):
                        raise RegionError(
                            f"{self.where}: line {number}: {found} columns, not "
                            f"{len(self._columns)}; the file is cut short, or set `columns`"
                        )
                    self._ids.append(line.split(b"\t", at + 1)[at].decode("utf-8", "replace"))
                    self._places.append((start, len(line)))
                    start += len(line)
        except OSError as error:
            raise RegionError(f"{self.where}: cannot be read: {error.strerror}") from error
        if not self._ids:
            raise RegionError(f"{self.where}: is empty")


def _decoded(cell: bytes, name: str, where: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(cell, validate=True), _BYTES[name])
    except (binascii.Error, ValueError) as error:
        raise RegionError(f"{where}: {name} is no base64 of {_BYTES[name]} numbers ({error})") from error
