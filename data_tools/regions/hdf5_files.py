"""HDF5 files of regions, as bottom-up attention's and LXMERT's tools write them: one dataset an array."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from data_tools.regions.feature_files import Entry, Part
from data_tools.regions.npy_files import read_ids
from data_tools.regions.store import RegionError

# What each array is called; the first that is there
NAMES = {
    "features": ("features", "image_features"),
    "boxes": ("boxes", "image_bb", "bbox"),
    "classes": ("objects_id", "classes"),
    "scores": ("objects_conf", "scores"),
    "sizes": ("image_sizes", "sizes"),
    "widths": ("image_w", "img_w", "widths"),
    "heights": ("image_h", "img_h", "heights"),
    "ids": ("image_ids", "image_id", "img_ids", "img_id", "ids"),
}


class Hdf5File:
    """features (n, r, v); and where there are: boxes (n, r, 4), classes and scores (n, r), sizes of pictures.

    A file is opened anew in a process that got this object from another.
    """

    def __init__(self, part: Part):
        """Raises RegionError for a file that cannot be read, or lacks or contradicts an array."""
        if find_spec("h5py") is None:
            raise RegionError(
                "layout: hdf5 needs h5py, which is not installed: pip install 'tandem[regions]'"
            )
        self.where, self._path = str(part.features), part.features
        self._file: Any = None
        self._names = self._found()
        shape = self._shape("features")
        if len(shape) != 3:
            raise RegionError(
                f"{self.where}: features of the shape {shape}; (pictures, regions, numbers) is read: files "
                "with a number of regions that differs by picture are not"
            )
        rows, regions, self.width = shape
        wanted = {"boxes": (rows, regions, 4), "classes": (rows, regions), "scores": (rows, regions)}
        wanted |= {"sizes": (rows, 2)}
        for name, size in wanted.items():
            if name in self._names and self._shape(name) != size:
                raise RegionError(f"{self.where}: {self._names[name]} of {self._shape(name)}, not {size}")
        self._ids = self._read_ids(part)
        if len(self._ids) != rows:
            raise RegionError(f"{self.where}: {rows} pictures, but {len(self._ids)} ids")

    def ids(self) -> list[str]:
        return self._ids

    def entry(self, place: int) -> Entry:
        found = {name: self._row(name, place) for name in ("features", "boxes", "classes", "scores")}
        size = None
        if "sizes" in self._names:
            pair = self._opened()[self._names["sizes"]][place]
            size = (float(pair[0]), float(pair[1]))
        elif "widths" in self._names and "heights" in self._names:
            width, height = (self._opened()[self._names[name]][place] for name in ("widths", "heights"))
            size = (float(width), float(height))
        return Entry(found["features"], found["boxes"], size, found["classes"], found["scores"])

    def _row(self, name: str, place: int) -> Any:
        if name not in self._names:
            return None
        try:
            return np.asarray(self._opened()[self._names[name]][place])
        except (OSError, ValueError) as error:
            raise RegionError(f"{self.where}: {self._names[name]}: picture {place}: {error}") from error

    def _opened(self) -> Any:
        import h5py

        if self._file is None:
            try:
                self._file = h5py.File(self._path, "r")
            except OSError as error:
                raise RegionError(f"{self.where}: cannot be read as HDF5 ({error})") from error
        return self._file

    def _found(self) -> dict[str, str]:
        there = set(self._opened())
        names = {name: next((one for one in known if one in there), None) for name, known in NAMES.items()}
        if names["features"] is None:
            raise RegionError(
                f"{self.where}: no dataset {' or '.join(NAMES['features'])}; there are: "
                f"{', '.join(sorted(there)) or 'none'}"
            )
        return {name: one for name, one in names.items() if one is not None}

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._opened()[self._names[name]].shape)

    def _read_ids(self, part: Part) -> list[str]:
        if part.ids is not None:
            return read_ids(part.ids)
        if "ids" not in self._names:
            raise RegionError(
                f"{self.where}: no dataset {' or '.join(NAMES['ids'])}; give `ids`, a .json list in the "
                "order of the pictures"
            )
        values = self._opened()[self._names["ids"]][:]
        return [one.decode() if isinstance(one, bytes) else str(one) for one in values]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
