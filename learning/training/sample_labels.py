"""What a sample's labels tell a training step: numbers and sets that a method reads, and its positives."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from data_tools.shards import ShardIndex
from data_tools.shards.files import CorpusError
from learning.methods.base import LabelSet
from learning.training.randomness import stable_hash

logger = logging.getLogger(__name__)

CLASSES = "classes"  # the field of a record that is a list; any other is one of its labels
BETWEEN = "|"  # of several names in one label
LOOKED_AT = 64  # samples, at the start, of which at least one should have a label of a set
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # what int64 holds, and none of int()'s liberties


class BadRecord(ValueError):
    """A sample whose record cannot be used; the message names shard and key."""


class SampleLabels:
    """Labels by index position. They stay in the index's own columns: nothing here grows with the corpus."""

    def __init__(self, index: ShardIndex, numbers: Sequence[str], positives: str | None):
        """`numbers`: labels that are whole numbers. `positives`: the label whose values make positives.

        Raises ValueError for a label that the corpus has not.
        """
        self._index = index
        self._numbers = {name: _column(index, name, "model.method reads a label") for name in numbers}
        self._positives = None if positives is None else _column(index, positives, "data.positives")

    def numbers(self, position: int) -> dict[str, int]:
        """The whole numbers of a sample. Raises BadRecord for a label that is missing or is none."""
        found = {}
        for name, column in self._numbers.items():
            value = column[position].as_py() or ""
            if not _WHOLE.fullmatch(value):
                what = f"is {value!r}, no whole number" if value else "is missing"
                raise BadRecord(
                    f"{self._index.where(position)}: label '{name}' {what}; "
                    "correct the source's labels and run the shard stage again"
                )
            found[name] = int(value)
        return found

    def id(self, position: int) -> int:
        """63 bits that samples have in common if they are each other's positives, on every rank and machine.

        A sample without the label is its own alone.
        """
        value = None if self._positives is None else self._positives[position].as_py()
        return stable_hash("positives", value) if value else stable_hash(self._index.keys[position])


def _column(index: ShardIndex, name: str, field: str) -> pa.ChunkedArray:
    try:
        return index.label_column(name)
    except CorpusError as error:
        raise ValueError(f"{field}: {error}") from error


class SampleLabelSets:
    """Which labels of each set a sample has: those that its record names, in `classes` or in a label."""

    def __init__(self, index: ShardIndex, sets: Mapping[str, LabelSet]):
        """Raises ValueError for a field that records have not. Warns where a set looks empty."""
        self._index = index
        self._sets = {
            name: (one.fields, {n: i for i, n in enumerate(one.names)}) for name, one in sets.items()
        }
        fields = {field for one in sets.values() for field in one.fields} - {CLASSES}
        self._columns = {field: self._label(field) for field in sorted(fields)}
        self._warn()

    def row(
        self, position: int, record: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Float32[np.ndarray, " c"]]:
        """1 where the sample has a label, else 0, by set. Names that a set has not are not counted.

        `record`: gives the sample's record, asked only where a set reads `classes`. Raises BadRecord for a
        record whose `classes` are no list of strings.
        """
        made = {}
        for name, (fields, places) in self._sets.items():
            made[name] = np.zeros(len(places), np.float32)
            found = {places[value] for value in self._values(position, fields, record) if value in places}
            made[name][sorted(found)] = 1
        return made

    def _values(
        self, position: int, fields: Sequence[str], record: Callable[[], Mapping[str, Any]]
    ) -> Iterator[str]:
        for field in fields:
            if field == CLASSES:
                given = record().get(CLASSES) or []
                if not isinstance(given, list) or not all(isinstance(value, str) for value in given):
                    raise BadRecord(
                        f"{self._index.where(position)}: `{CLASSES}` is no list of names; run the "
                        "shard stage again"
                    )
            else:
                given = (self._columns[field][position].as_py() or "").split(BETWEEN)
            yield from (value.strip() for value in given)

    def _label(self, field: str) -> pa.ChunkedArray:
        try:
            return self._index.label_column(field)
        except CorpusError as error:
            raise ValueError(
                f"a label set of model.method reads the field '{field}', which is neither `{CLASSES}` nor a "
                f"label: {error}"
            ) from error

    def _warn(self) -> None:
        """Say where no sample looked at has a label: a shard stage without `classes_from`, or other names."""
        looked = range(min(LOOKED_AT, len(self._index)))
        for name, (fields, places) in self._sets.items():
            try:
                if not any(
                    value in places
                    for position in looked
                    for value in self._values(position, fields, lambda at=position: self._index.record(at))  # type: ignore[misc]
                ):
                    logger.warning(
                        "label set '%s': none of the first %d samples has one of its %d names in %s; "
                        "are they the corpus's? (shard.classes_from)",
                        *(name, len(looked), len(places), ", ".join(fields)),
                    )
            except ValueError:
                continue  # it is a bad sample, and told when a batch asks for it
