"""The regions of a split's pictures, by index position, as what a method reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_tools.regions.store import PictureRegions, RegionStore
from data_tools.shards import ShardIndex
from learning.methods.base import EmbedsRegions, Method, Regions

TOWER = "regions"  # a `model.vision.tower`: regions are read, there is no tower
SHOWN = 3  # keys that an error names


class SplitRegions:
    """Which row of a store each sample of an index has. 8 bytes a sample."""

    def __init__(self, store: RegionStore, index: ShardIndex):
        """Raises ValueError for regions of other pictures (see RegionStore.rows_of)."""
        self.store, self.index = store, index
        self._rows = store.rows_of(index.keys, index.pictures)

    def missing(self) -> list[str]:
        """The keys of the samples without regions."""
        return [self.index.keys[place] for place in np.flatnonzero(self._rows < 0).tolist()]

    def check(self, allowed: int) -> None:
        """Raises ValueError, before the first batch, where more than `allowed` samples have no regions."""
        missing = self.missing()
        if len(missing) > allowed:
            raise ValueError(
                f"inputs.regions: {self.store.directory} has no regions of {len(missing)} of "
                f"{len(self.index)} samples ({allowed} may lack them), e.g. {', '.join(missing[:SHOWN])}; "
                "name the regions stage of this very corpus; its missing.parquet says why"
            )

    def row(self, position: int) -> PictureRegions:
        """The regions of a sample. Raises ValueError, with its key, where it has none or they are damaged."""
        row = int(self._rows[position])
        if row < 0:
            raise ValueError(f"{self.index.where(position)}: inputs.regions has no regions of it")
        return self.store.row(row)

    def block(self, start: int, stop: int) -> Regions:
        """The regions of samples start … stop - 1; errors as `row` has."""
        return stacked([self.row(position) for position in range(start, stop)])


def stacked(rows: Sequence[PictureRegions]) -> Regions:
    """(n, r, …) of n pictures' regions: float32 features and positions, int64 classes."""
    return Regions(
        torch.from_numpy(np.stack([row.features for row in rows]).astype(np.float32)),
        torch.from_numpy(np.stack([row.positions for row in rows])),
        torch.from_numpy(np.stack([row.classes for row in rows]).astype(np.int64)),
    )


def joined_regions(parts: Sequence[Regions]) -> Regions | None:
    """Those of several parts of a batch, in their order; None where there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return Regions(*(torch.cat(each) for each in zip(*map(_tensors, parts), strict=True)))


def _tensors(regions: Regions) -> tuple[torch.Tensor, ...]:
    return regions.features, regions.positions, regions.classes


def cast_regions(regions: Regions, dtype: torch.dtype) -> Regions:
    """Features and positions in `dtype`, that of a method's weights; classes as they are."""
    return regions.each(lambda x: x.to(dtype) if x.is_floating_point() else x)


def check_method(method: Method, store: RegionStore | None) -> None:
    """Raises ValueError where a method reads regions and there is no `inputs.regions`, or the other way
    round, and where its sizes, `model.vision`'s count, width and classes, are not the store's."""
    name = type(method).__name__
    if not reads_regions(method):
        if store is not None:
            raise ValueError(
                f"inputs.regions: {name}, as it is set, reads pictures, not regions; leave the input out, "
                "or set model.vision.tower: regions where the method has it"
            )
        return
    if store is None:
        raise ValueError(f"inputs.regions: missing; {name} reads regions: name a regions stage of the corpus")
    if not isinstance(method, EmbedsRegions):
        raise ValueError(f"{name} reads regions in training, but has no embed_regions to be used with")
    check_sizes(method, store.layout.regions, store.layout.width, f"inputs.regions: {store.directory}")
    classes = getattr(_vision(method), "classes", None)
    if classes is not None and store.class_count is not None and classes < store.class_count:
        raise ValueError(
            f"model.vision.classes: {classes}, but inputs.regions: {store.directory} has classes up to "
            f"{store.class_count - 1}; set it to {store.class_count}"
        )


def reads_regions(method: Method) -> bool:
    """Whether a method reads regions in place of pictures, if not for its losses then to be evaluated."""
    return getattr(_vision(method), "tower", None) == TOWER or method.views().regions


def check_sizes(method: Method, regions: int, width: int, what: str) -> None:
    """Raises ValueError where `model.vision`'s count and width are not those of the regions, `what`."""
    vision = _vision(method)
    for field, found in (("count", regions), ("width", width)):
        wanted = getattr(vision, field, found)
        if wanted != found:
            raise ValueError(
                f"model.vision.{field}: {wanted}, but {what}: {found}; set it to {found}, or make "
                "the regions anew"
            )


def _vision(method: Method) -> Any:
    """The method's section `model.vision`; None where it has none."""
    return getattr(getattr(method, "config", None), "vision", None)
