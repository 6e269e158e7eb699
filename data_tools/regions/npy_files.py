"""Precomputed features as in SCAN and VSE∞: one .npy array a split, and a text file with a line a picture."""

import json
from pathlib import Path

import numpy as np

from data_tools.regions.feature_files import Entry, Part
from data_tools.regions.ids import collapsed
from data_tools.regions.store import RegionError


class NpyFile:
    """features (n, r, v); ids: n lines; boxes (n, r, 4), sizes (n, 2), classes (n, r), scores (n, r)."""

    def __init__(self, part: Part, repeats: int = 1):
        """`repeats`: lines of ids that each picture has, and rows, unless these are as many as the pictures:
        the first of them counts.

        Raises RegionError, naming the file, for one that is missing, cut short, or of another shape.
        """
        if part.ids is None:
            raise RegionError(f"{part.features}: ids: missing; name the file with a line a picture")
        self.where = str(part.features)
        self._features = _array(part.features, 3)
        self.width = int(self._features.shape[2])
        self._ids = collapsed(read_ids(part.ids), repeats, str(part.ids))
        rows, self._stride = len(self._features), 1
        if rows == len(self._ids) * repeats:
            self._stride = repeats
        elif rows != len(self._ids):
            raise RegionError(f"{part.features}: {rows} rows, but {part.ids} has {len(self._ids)} ids")
        n, r = self._features.shape[:2]
        shapes = {"boxes": (n, r, 4), "sizes": (n, 2), "classes": (n, r), "scores": (n, r)}
        self._others = {
            name: _shaped(path, shape) for name, shape in shapes.items() if (path := getattr(part, name))
        }

    def ids(self) -> list[str]:
        return self._ids

    def entry(self, place: int) -> Entry:
        row = place * self._stride
        found = {name: np.array(array[row]) for name, array in self._others.items()}
        size = found.pop("sizes", None)
        told = None if size is None else (float(size[0]), float(size[1]))
        return Entry(np.array(self._features[row]), size=told, **found)


def read_ids(path: Path) -> list[str]:
    """The ids of a .json list, or of the lines of any other file. RegionError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise RegionError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, list) or not all(isinstance(one, str | int) for one in found):
        raise RegionError(f"{path}: no list of ids, in the order of the rows")
    return [str(one) for one in found]


def _array(path: Path, dimensions: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise RegionError(f"{path}: cannot be read as a .npy array ({error}); fetch it again") from error
    if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype.kind not in "fiu":
        shape = getattr(array, "shape", None)
        raise RegionError(f"{path}: an array of the shape {shape}; it must have {dimensions} dimensions")
    return array


def _shaped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = _array(path, len(shape))
    if array.shape != shape:
        raise RegionError(f"{path}: the shape {array.shape}; beside the features it must be {shape}")
    return array
