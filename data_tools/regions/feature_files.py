"""Regions that a detector elsewhere wrote to files: what every layout gives, and regions made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_tools.regions.store import NO_CLASS, PictureRegions, RegionError

BoxUnits = Literal["pixels", "fractions"]
_PIXELS_OVER = 1.0  # pixels that a box may reach over the edge of its picture: detectors round


class Unfit(Exception):
    """A picture without regions that can be used; `reason` and the message stand in missing.parquet."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Part:
    """The files of one part, say of a split: which of them there are, its layout says."""

    features: Path
    ids: Path | None = None
    boxes: Path | None = None
    sizes: Path | None = None
    classes: Path | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class Entry:
    """What files say of one picture; k regions."""

    features: np.ndarray  # (k, v)
    boxes: np.ndarray | None = None  # (k, 4): x1, y1, x2, y2
    size: tuple[float, float] | None = None  # width and height of the picture that the boxes are in
    classes: np.ndarray | None = None  # (k,)
    scores: np.ndarray | None = None  # (k,)


class FeatureFile(Protocol):
    """One part, open for reading."""

    width: int  # numbers of a region's features
    where: str  # what errors call it

    def ids(self) -> Sequence[str]:
        """Of each entry, in order."""

    def entry(self, place: int) -> Entry:
        """One of them. Raises RegionError that names file and place."""


@dataclass(frozen=True)
class Rules:
    """How regions are made of entries."""

    regions: int
    positions: Literal["boxes", "none"]
    box_units: BoxUnits
    class_count: int | None  # of the names; None: unknown


def opened(parts: Sequence[Part], open_one: Callable[[Part], FeatureFile]) -> list[FeatureFile]:
    """All parts. Raises RegionError where they differ in the width of the features."""
    files = [open_one(part) for part in parts]
    for one in files[1:]:
        if one.width != files[0].width:
            raise RegionError(
                f"{one.where}: features of {one.width} numbers, but {files[0].where} has {files[0].width}; "
                "they are of two detectors: make a regions stage of each"
            )
    return files


def regions_of(file: FeatureFile, place: int, size: tuple[float, float], rules: Rules) -> PictureRegions:
    """The regions of an entry; `size`: width and height of the corpus's picture, where the files say none.

    Of more than `rules.regions` the ones with the highest scores are taken, in their order. Raises Unfit for
    a number of regions that does not do, RegionError for an entry that is damaged.
    """
    entry, where = file.entry(place), f"{file.where}: entry {place}"
    if not np.isfinite(entry.features).all():
        raise RegionError(f"{where}: features that are no finite numbers; the file is damaged: make it again")
    entry = _chosen(entry, rules.regions)
    classes = np.full(rules.regions, NO_CLASS, np.int32)
    if entry.classes is not None:
        classes = entry.classes.astype(np.int32)
        most = np.iinfo(np.int32).max if rules.class_count is None else rules.class_count
        if (entry.classes != classes).any() or classes.min() < NO_CLASS or classes.max() >= most:
            raise RegionError(
                f"{where}: classes from {classes.min()} to {classes.max()}; allowed: -1 … {most - 1}"
            )
    return PictureRegions(entry.features, _positions(entry, size, rules, where), classes)


def _chosen(entry: Entry, regions: int) -> Entry:
    found = len(entry.features)
    if found < regions:
        raise Unfit("few_regions", f"{found} regions of {regions}")
    if found == regions:
        return entry
    if entry.scores is None:
        raise Unfit("many_regions", f"{found} regions, more than {regions}, and no scores to choose by")
    kept = np.sort(np.argsort(-entry.scores, kind="stable")[:regions])
    return Entry(
        entry.features[kept],
        None if entry.boxes is None else entry.boxes[kept],
        entry.size,
        None if entry.classes is None else entry.classes[kept],
        entry.scores[kept],
    )


def _positions(entry: Entry, size: tuple[float, float], rules: Rules, where: str) -> np.ndarray:
    if rules.positions == "none":  # each region lies anywhere in the picture
        return np.tile(np.array([0, 0, 1, 1, 1], np.float32), (rules.regions, 1))
    if entry.boxes is None:
        raise RegionError(f"{where}: no boxes; name the files that have them, or set positions: none")
    width, height = (1.0, 1.0) if rules.box_units == "fractions" else entry.size or size
    return positions_of(entry.boxes, width, height, where)


def positions_of(boxes: np.ndarray, width: float, height: float, where: str) -> np.ndarray:
    """(r, 4) corners in a picture of width × height → (r, 5) positions (Semantic Sharing, Sec. 3.2).

    Raises RegionError for a box that is none, or that reaches a pixel or more over the edge.
    """
    scale = np.array([width, height, width, height], np.float64)
    boxes = boxes.astype(np.float64)
    over = _PIXELS_OVER if max(width, height) > 1 else 0.001
    outside = not np.isfinite(boxes).all() or boxes.min() < -over or (boxes > scale + over).any()
    if outside or (boxes[:, :2] > boxes[:, 2:]).any():
        raise RegionError(
            f"{where}: boxes up to {np.round(boxes.max(axis=0), 3).tolist()} in a picture of "
            f"{width:g} × {height:g}: not x1, y1, x2, y2 in it; set box_units, or give the sizes of the "
            "pictures that the detector saw"
        )
    corners = np.clip(boxes / scale, 0, 1).astype(np.float32)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return np.concatenate([corners, area[:, None]], axis=1)
