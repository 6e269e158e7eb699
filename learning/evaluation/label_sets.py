"""Which labels the samples of a split have, any number each, and the labels of a gallery's texts."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from data_tools.shards import CorpusError, ShardIndex
from learning.evaluation.gallery import Gallery
from learning.training.sample_labels import BETWEEN, CLASSES

_SHOWN = 20  # labels that an error lists


class LabelSetConfig(BaseModel):
    """Where a sample's labels stand, and which of them are counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fields: tuple[str, ...] = Field(
        default=(CLASSES,),
        min_length=1,
        description=f"read together: {CLASSES}, the list in a record, or a label of it, cut at '{BETWEEN}'",
    )
    names: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="the labels that are counted; null: all that the split has"
    )

    @field_validator("fields", "names")
    @classmethod
    def _once(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = next((value for value in values or () if (values or ()).count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"'{twice}' stands twice; name it once")
        return values


@dataclass(frozen=True)
class LabelRows:
    """Labels in rows: row i has `labels[offsets[i]:offsets[i + 1]]`, ascending, none twice."""

    offsets: Int64[np.ndarray, " n1"]
    labels: Int64[np.ndarray, " given"]
    names: int  # how many labels there are: all are below it

    @classmethod
    def of(cls, rows: Sequence[Set[int]], names: int) -> "LabelRows":
        """From the numbers of the labels of each row. Raises ValueError for one that is not below `names`."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        labels = np.fromiter((x for row in rows for x in sorted(row)), dtype=np.int64, count=int(offsets[-1]))
        if len(labels) and not (labels.min() >= 0 and labels.max() < names):
            raise ValueError(f"labels: {labels.min()} … {labels.max()}; there are {names}, from 0 on")
        return cls(offsets, labels, names)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of_row(self, row: int) -> Int64[np.ndarray, " r"]:
        return self.labels[self.offsets[row] : self.offsets[row + 1]]

    def with_one_of(self, labels: Int64[np.ndarray, " r"]) -> Int64[np.ndarray, " rows"]:
        """The rows that have one of these labels, ascending."""
        return np.unique(np.repeat(np.arange(len(self)), self.counts)[np.isin(self.labels, labels)])

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        return np.diff(self.offsets)

    def rows(self, start: int, stop: int) -> "LabelRows":
        """The labels of rows start … stop - 1."""
        low, high = self.offsets[start], self.offsets[stop]
        return LabelRows(self.offsets[start : stop + 1] - low, self.labels[low:high], self.names)

    def indicators(self, device: str | torch.device) -> Float32[Tensor, "n names"]:
        """1 where a row has a label: for a block of rows."""
        row = np.repeat(np.arange(len(self)), self.counts)
        made = torch.zeros((len(self), self.names), device=device)
        made[torch.from_numpy(row).to(device), torch.from_numpy(self.labels).to(device)] = 1.0
        return made


@dataclass(frozen=True)
class SplitLabels:
    """The labels of a split's samples, by number in `names`; a sample may have none."""

    names: tuple[str, ...]
    rows: list[frozenset[int]]  # of each sample, in the order of the index

    def of_images(self, gallery: Gallery) -> LabelRows:
        return LabelRows.of([self.rows[i] for i in gallery.images], len(self.names))

    def of_texts(self, gallery: Gallery) -> LabelRows:
        """A text has all labels of the gallery's images that have it."""
        return LabelRows.of(
            [frozenset().union(*(self.rows[gallery.images[o]] for o in owned)) for owned in gallery.owners],
            len(self.names),
        )


def names_of(record: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """The labels in these fields of a sample's record, without outer blanks, none twice, none empty."""
    found: dict[str, None] = {}
    for field in fields:
        if field == CLASSES:
            values = record.get(CLASSES) or []
        else:
            values = ((record.get("labels") or {}).get(field) or "").split(BETWEEN)
        found |= {value.strip(): None for value in values if value.strip()}
    return list(found)


def split_labels(index: ShardIndex, wanted: LabelSetConfig) -> SplitLabels:
    """The labels of every sample that `wanted` counts.

    Raises ValueError for a field that the corpus has not, and where no sample has a label that is counted: it
    lists what there is.
    """
    for field in wanted.fields:
        if field != CLASSES:
            try:
                index.label_column(field)
            except CorpusError as error:
                raise ValueError(f"label_set.fields: {error}; or {CLASSES}, the list in a record") from error
    found = [names_of(index.record(i), wanted.fields) for i in range(len(index))]
    there = sorted({name for own in found for name in own})
    if not there:
        raise ValueError(f"label_set.fields: no sample has a label in {' or '.join(wanted.fields)}")
    names = wanted.names or tuple(there)
    if not set(names) & set(there):
        shown = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "")
        raise ValueError(f"label_set.names: no sample has one of {', '.join(names)}; there are: {shown}")
    numbers = {name: number for number, name in enumerate(names)}
    return SplitLabels(names, [frozenset(numbers[n] for n in own if n in numbers) for own in found])
