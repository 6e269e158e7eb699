"""Where the regions of pictures come from: the fields of a recipe, and regions by a sample's position."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator

from data_tools.pictures import PictureError
from data_tools.regions.feature_files import (
    BoxUnits,
    FeatureFile,
    Part,
    Rules,
    Unfit,
    opened,
    regions_of,
)
from data_tools.regions.hdf5_files import Hdf5File
from data_tools.regions.ids import Entries, compile_id, match
from data_tools.regions.npy_files import NpyFile
from data_tools.regions.store import PictureRegions, RegionError
from data_tools.regions.tsv_files import BUTD_COLUMNS, TsvFile, known_columns
from data_tools.shards import ShardIndex
from learning.encoders.region_detector import DetectorConfig, RegionDetector
from learning.encoders.region_grid import GridConfig, RegionGrid
from learning.evaluation.embed import checked_picture
from learning.training import distributed
from stages.base import Frozen

ABSENT = "the files have no entry of its id"
BESIDE = ("boxes", "sizes", "classes", "scores")  # files beside the features in the layout npy


class PartConfig(Frozen):
    """The files of one part, say of a split."""

    features: Path = Field(description="npy: (n, r, v); hdf5, tsv: the file that has everything")
    ids: Path | None = Field(
        default=None, description="a line, or an entry of a .json list, a picture; npy needs it, tsv has none"
    )
    boxes: Path | None = Field(default=None, description="npy: (n, r, 4), x1, y1, x2, y2")
    sizes: Path | None = Field(
        default=None,
        description="npy: (n, 2), width and height that the boxes are in; null: the corpus's pictures'",
    )
    classes: Path | None = Field(default=None, description="npy: (n, r), -1: unknown")
    scores: Path | None = Field(default=None, description="npy: (n, r), by which the best are chosen")

    def named(self) -> Iterator[tuple[str, Path]]:
        for name in type(self).model_fields:
            path = getattr(self, name)
            if path is not None:
                yield name, path


class FilesSource(Frozen):
    """Files that a detector elsewhere wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: Literal["files"] = Field(alias="from")
    layout: Literal["npy", "tsv", "hdf5"]
    parts: list[PartConfig] = Field(min_length=1, description="all splits together")
    regions: int = Field(default=36, ge=1, description="of each picture; one with fewer counts as missing")
    positions: Literal["boxes", "none"] = Field(
        default="boxes", description="none: for files without boxes, each region lies anywhere in the picture"
    )
    box_units: BoxUnits = Field(default="pixels", description="of the boxes; fractions: of width and height")
    id: str | None = Field(
        default=None,
        description="regular expression on a picture's URL, its group `id` is the id in the files; null: the "
        "file name without its ending, or the number that it ends with",
    )
    repeats: int = Field(
        default=1,
        ge=1,
        description="npy: lines of ids that each picture has, say 5 where captions were counted",
    )
    columns: tuple[str, ...] = Field(default=BUTD_COLUMNS, description="tsv: of a line, in order")
    class_names: Path | None = Field(default=None, description="a line a class, from class 0 on")

    @field_validator("id")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        compile_id(value)
        return value

    @model_validator(mode="after")
    def _of_its_layout(self) -> "FilesSource":
        for number, part in enumerate(self.parts):
            given = {name for name, _ in part.named()} - {"features"}
            allowed = {"npy": {"ids", *BESIDE}, "hdf5": {"ids"}, "tsv": set()}[self.layout]
            for name in sorted(given - allowed):
                raise ValueError(f"parts.{number}.{name}: says nothing in layout {self.layout}; leave it out")
            if self.layout == "npy" and "ids" not in given:
                raise ValueError(f"parts.{number}.ids: missing; name the file with a line a picture")
            if self.layout == "npy" and self.positions == "boxes" and "boxes" not in given:
                raise ValueError(
                    f"parts.{number}.boxes: missing; name the file, or set positions: none without one"
                )
        known_columns(self.columns)
        if self.repeats > 1 and self.layout != "npy":
            raise ValueError(f"repeats: says nothing in layout {self.layout}; leave it out")
        return self

    def files(self) -> dict[str, Path]:
        found = {
            f"source.parts.{number}.{name}": path
            for number, part in enumerate(self.parts)
            for name, path in part.named()
        }
        return found | ({} if self.class_names is None else {"source.class_names": self.class_names})

    def part(self, number: int, directory: Path) -> Part:
        """With full paths."""
        return Part(**{name: directory / path for name, path in self.parts[number].named()})

    def open_one(self, part: Part) -> FeatureFile:
        if self.layout == "npy":
            return NpyFile(part, self.repeats)
        return TsvFile(part.features, self.columns) if self.layout == "tsv" else Hdf5File(part)


class DetectorSource(DetectorConfig):
    """A Faster R-CNN that runs here."""

    kind: Literal["faster_rcnn"] = Field(alias="from")

    def files(self) -> dict[str, Path]:
        return {} if self.weights is None else {"source.weights": self.weights}


class GridSource(GridConfig):
    """The cells of a classifier's last map, where there is no detector."""

    kind: Literal["grid"] = Field(alias="from")

    def files(self) -> dict[str, Path]:
        return {} if self.weights is None else {"source.weights": self.weights}


Source = Annotated[FilesSource | DetectorSource | GridSource, Field(discriminator="kind")]


class PictureSource(Protocol):
    """Regions of any sample of a corpus, each computed alone."""

    regions: int
    width: int
    class_count: int | None  # the classes are below it; None: unknown
    class_names: list[str] | None

    def of(self, position: int) -> PictureRegions:
        """Raises Unfit for a picture without, RegionError for files that are damaged."""

    def absent(self) -> list[int]:
        """The samples of which it is known beforehand that there are none."""


def make_source(
    source: Source, index: ShardIndex, directory: Path, device: torch.device, seed: int, max_pixels: int
) -> PictureSource:
    """All ranks together. `directory`: what relative paths are relative to. Raises ValueError, on all."""
    if isinstance(source, FilesSource):
        return _FromFiles(source, index, directory)
    if source.weights is not None:
        source = source.model_copy(update={"weights": directory / source.weights})
    if isinstance(source, DetectorSource):
        return _FromPictures(RegionDetector(source, device, seed), index, max_pixels)
    return _FromPictures(RegionGrid(source, device, seed), index, max_pixels)


class _FromPictures:
    def __init__(self, model: RegionDetector | RegionGrid, index: ShardIndex, max_pixels: int):
        self.model, self.index, self.max_pixels = model, index, max_pixels
        self.regions, self.width = model.regions, model.width
        self.class_count: int | None = model.class_count
        self.class_names: list[str] | None = model.class_names

    def absent(self) -> list[int]:
        return []

    def of(self, position: int) -> PictureRegions:
        picture = checked_picture(self.index, position, self.max_pixels)
        try:
            return self.model.of(picture)
        except PictureError as error:
            raise Unfit("unreadable", str(error)) from error


@dataclass(frozen=True)
class _Matched:
    """What rank 0 found out for all."""

    places: list[tuple[int, int] | None]  # of each sample its part and entry
    sizes: list[tuple[float, float]]  # of each sample's picture
    scanned: list[FeatureFile] | None  # TSV files, which take a pass through all of them


class _FromFiles:
    def __init__(self, source: FilesSource, index: ShardIndex, directory: Path):
        self.source, self.directory = source, directory
        self.class_names = None
        if source.class_names is not None:
            self.class_names = _lines(directory / source.class_names)
        self.class_count = None if self.class_names is None else len(self.class_names)
        self._rules = Rules(source.regions, source.positions, source.box_units, self.class_count)
        matched, problem = None, None
        if distributed.rank() == 0:
            try:
                matched = self._match(index)
            except ValueError as error:
                problem = str(error)
        matched, problem = distributed.broadcast_object((matched, problem))
        if matched is None:
            raise RegionError(str(problem))
        self._matched = matched
        self._files = matched.scanned or self._opened()
        self.regions, self.width = source.regions, self._files[0].width

    def of(self, position: int) -> PictureRegions:
        place = self._matched.places[position]
        if place is None:
            raise Unfit("absent", ABSENT)
        part, entry = place
        return regions_of(self._files[part], entry, self._matched.sizes[position], self._rules)

    def absent(self) -> list[int]:
        return [position for position, place in enumerate(self._matched.places) if place is None]

    def _opened(self) -> list[FeatureFile]:
        parts = [self.source.part(number, self.directory) for number in range(len(self.source.parts))]
        return opened(parts, self.source.open_one)

    def _match(self, index: ShardIndex) -> _Matched:
        files = self._opened()
        entries = Entries()
        for number, file in enumerate(files):
            entries.add(number, file.ids(), file.where)
        sizes: list[tuple[float, float]] = []

        def records() -> Iterator[dict[str, Any]]:
            for position in range(len(index)):
                record = index.record(position)
                sizes.append((float(record["width"]), float(record["height"])))
                yield record

        places = match(entries, records(), compile_id(self.source.id))
        return _Matched(places, sizes, files if self.source.layout == "tsv" else None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RegionError(f"{path}: cannot be read ({error})") from error
