"""Classes of pictures from a table: rows whose key is one of a picture's labels say what it shows."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError

BETWEEN = "|"  # of several classes in one cell
_SEPARATORS = {".tsv": "\t", ".csv": ","}


class ClassTable:
    """The classes of each key: of all rows that have it, in their order and that of the columns, none twice.

    Keys are compared without their case. A .tsv is read as it stands, without quoting; a .csv with it.
    """

    def __init__(self, path: Path, key: str, columns: Sequence[str]):
        """Raises DataError, with the file and the column, for one that is not there or cannot be read."""
        self.path = path
        found: dict[str, dict[str, None]] = {}
        for row in _rows(path, (key, *columns)):
            own = found.setdefault(str(row[key] or "").strip().casefold(), {})
            for column in columns:
                own |= dict.fromkeys(_values(row[column]))
        found.pop("", None)
        if not found:
            raise DataError(f"classes_from.table: {path}: no row has a {key}; give a table with its keys")
        self._classes = {name: list(classes) for name, classes in found.items()}

    def of(self, key: str) -> list[str]:
        """The classes of a key; none where the table has no such row."""
        return self._classes.get(key.strip().casefold(), [])


def _values(cell: Any) -> Iterator[str]:
    for one in cell if isinstance(cell, list) else str(cell or "").split(BETWEEN):
        if one is not None and str(one).strip():
            yield str(one).strip()


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if path.suffix != ".parquet" and path.suffix not in _SEPARATORS:
        raise DataError(f"classes_from.table: {path}: '{path.suffix}'; allowed: .tsv, .csv, .parquet")
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                _check(path, file.schema_arrow.names, columns)
                for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                    yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8", newline="") as text:
            how: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            reader = csv.DictReader(text, delimiter=_SEPARATORS[path.suffix], **how)
            _check(path, reader.fieldnames or (), columns)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"classes_from.table: {path}: line {reader.line_num}: another number of columns than "
                        "the first line; correct it"
                    )
                yield row
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise DataError(f"classes_from.table: {path}: cannot be read: {error}") from error


def _check(path: Path, there: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise DataError(
                f"classes_from: {path}: no column '{column}'; there are: {', '.join(there) or 'none'}"
            )
