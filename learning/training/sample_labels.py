"""What a sample's labels tell a training step: numbers that a method reads, and whose positives it has."""

import re
from collections.abc import Sequence

import pyarrow as pa

from data_tools.shards import ShardIndex
from data_tools.shards.files import CorpusError
from learning.training.randomness import stable_hash

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
