"""The filter's files, from a stream of judged rows in order: pairs.parquet, dropped.parquet,
measures.parquet.

Rows come sorted by query, URL and copy. All three files keep that order, in row groups of a fixed size: their
bytes depend on the rows alone, not on the engine or on how the stream was cut. Memory holds a row group each.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.log.rules import REASONS

ROW_GROUP = 100_000
ORDER = ("query", "url", "copy")
_LOG = {
    **dict.fromkeys(("query", "url", "title", "content"), pa.string()),
    **dict.fromkeys(("show", "click", "width", "height"), pa.int64()),
}
PAIR_COLUMNS = {**_LOG, "ctr": pa.float64()}
DROPPED_COLUMNS = {**PAIR_COLUMNS, "reason": pa.string()}
MEASURE_COLUMNS = {
    "query": pa.int64(),  # 0 for the first query, 1 for the next …: the texts are not kept twice
    **dict.fromkeys(("show", "click", "width", "height"), pa.int64()),
    **dict.fromkeys(("copy", "query_words", "title_words", "content_words"), pa.int32()),
    **dict.fromkeys(("bad_url", "listed"), pa.bool_()),
    "draw": pa.string(),
}


class JudgedFiles:
    """Writes the three files aside; they take their names when the `with` block ends without an error."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._files = {
            "pairs": _RowGroups(out / "pairs.parquet", PAIR_COLUMNS),
            "dropped": _RowGroups(out / "dropped.parquet", DROPPED_COLUMNS),
            "measures": _RowGroups(out / "measures.parquet", MEASURE_COLUMNS),
        }
        self._counts: Counter[str | None] = Counter()
        self._query: pa.Scalar = pa.scalar(None, pa.string())
        self._number = -1

    def write(self, batch: pa.RecordBatch) -> None:
        """Take the next rows: the log's columns, the measures, `ctr` and `reason`."""
        rows = pa.Table.from_batches([batch])
        for found in pc.value_counts(batch["reason"]).to_pylist():
            self._counts[found["values"]] += found["counts"]
        is_kept = pc.is_null(batch["reason"])
        self._files["pairs"].write(rows.filter(is_kept))
        self._files["dropped"].write(rows.filter(pc.invert(is_kept)))
        place = rows.column_names.index("query")
        self._files["measures"].write(rows.set_column(place, "query", self._numbers(batch["query"])))

    def counts(self) -> dict[str, int]:
        """kept, and dropped_<reason> for every reason."""
        return counts_of(self._counts)

    def _numbers(self, queries: pa.Array) -> pa.Array:
        """The number of each row's query: equal queries stand together."""
        before = pa.concat_arrays(
            [pa.array([self._query.as_py()], pa.string()), queries.slice(0, len(queries) - 1)]
        )
        begins = pc.fill_null(pc.not_equal(queries, before), True)
        numbers = pc.add(pc.cumulative_sum(pc.cast(begins, pa.int64())), self._number)
        self._query, self._number = queries[-1], numbers[-1].as_py()
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close(whole=kind is None)


def counts_of(by_reason: Mapping[str | None, int]) -> dict[str, int]:
    """The stage's counts from those by reason; None: kept."""
    return {
        "kept": by_reason.get(None, 0),
        **{f"dropped_{reason}": by_reason.get(reason, 0) for reason in REASONS},
    }


class _RowGroups:
    """One Parquet file that is written a row group at a time, under another name until it is whole."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType]) -> None:
        self._path = path
        self._unfinished = path.with_name(f"{path.name}.tmp")
        self._columns = columns
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def write(self, rows: pa.Table) -> None:
        """Rows with at least the columns of this file that the log has; the first call settles which."""
        schema = pa.schema(
            [(name, kind) for name, kind in self._columns.items() if name in rows.column_names]
        )
        self._waiting.append(rows.select(schema.names).cast(schema))
        self._rows += rows.num_rows
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._unfinished, schema, compression="zstd")
        while self._rows >= ROW_GROUP:
            self._write_group(ROW_GROUP)

    def _write_group(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        assert self._writer is not None
        self._writer.write_table(waiting.slice(0, rows).combine_chunks(), row_group_size=rows)
        self._waiting = [waiting.slice(rows)]
        self._rows -= rows

    def close(self, whole: bool) -> None:
        if self._writer is not None and whole and self._rows:
            self._write_group(self._rows)
        if self._writer is not None:
            self._writer.close()
        if whole:
            self._unfinished.replace(self._path)
        else:
            self._unfinished.unlink(missing_ok=True)
