"""Rows of importers as Parquet files: written a batch at a time, so that memory does not grow with their
number."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.corpora.source import REASONS, Dropped, Row, Source, TextPair

BATCH = 10_000  # rows held before they are written

PAIRS = pa.schema(
    [
        ("query", pa.string()),
        ("url", pa.string()),
        ("title", pa.string()),
        ("content", pa.string()),
        ("show", pa.int64()),
        ("click", pa.int64()),
        ("ctr", pa.float64()),  # null without shows
        ("captions", pa.list_(pa.struct([("text", pa.string()), ("lang", pa.string())]))),
        ("split", pa.string()),  # as the source says; null where it says none
        ("classes", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("source", pa.string()),
    ]
)
TEXT_PAIRS = pa.schema(
    [
        ("text_a", pa.string()),
        ("text_b", pa.string()),
        ("score", pa.float64()),  # 0 … 5
        ("split", pa.string()),
        ("lang", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
    ]
)
DROPPED = pa.schema(
    [
        ("source", pa.string()),
        ("where", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("reason", pa.string()),
    ]
)


class Tables:
    """<name>.parquet of rows and dropped.parquet, side by side in a folder; whole once the `with` block has
    ended.

    `counts`: rows, kept, captions, and dropped_<reason> for every reason.
    """

    def __init__(
        self, folder: Path, name: str | None, schema: pa.Schema, on_batch: Callable[[int], None]
    ) -> None:
        """`name` None: dropped entries alone. `on_batch`: called after each batch with the number of its
        entries; may raise to stop."""
        self._folder, self._on_batch, self._stack = folder, on_batch, ExitStack()
        self._name = name or ""
        self._schemas = {"dropped": DROPPED} | ({name: schema} if name else {})
        self._waiting: dict[str, list[dict[str, Any]]] = {table: [] for table in self._schemas}
        self._counts = Counter[str]()

    @property
    def counts(self) -> dict[str, int]:
        counts = {name: self._counts[name] for name in ("rows", "kept", "captions")}
        return counts | {f"dropped_{reason}": self._counts[f"dropped_{reason}"] for reason in REASONS}

    def __enter__(self) -> "Tables":
        self._writers = {
            table: self._stack.enter_context(pq.ParquetWriter(self._folder / f"{table}.parquet", schema))
            for table, schema in self._schemas.items()
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._flush()

    def add(self, source: Source, found: Iterable[Row | TextPair | Dropped]) -> None:
        """All rows of one source."""
        for one in found:
            if isinstance(one, Dropped):
                self.drop(source, one)
            elif isinstance(one, Row):
                self._counts["captions"] += len(one.captions)
                self._put(self._name, _pair(source, one))
            else:
                own = {"split": one.split or source.split, "lang": source.lang}
                named = {"licence": source.licence, "source": source.name}
                self._put(self._name, asdict(one) | own | named)

    def drop(self, source: Source, entry: Dropped) -> None:
        self._counts[f"dropped_{entry.reason}"] += 1
        self._put("dropped", asdict(entry) | {"source": source.name})

    def _put(self, table: str, row: dict[str, Any]) -> None:
        self._counts["rows"] += 1
        self._counts["kept"] += table != "dropped"
        self._waiting[table].append(row)
        if sum(map(len, self._waiting.values())) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        done = 0
        for table, rows in self._waiting.items():
            if rows:
                self._writers[table].write_table(pa.Table.from_pylist(rows, self._schemas[table]))
            done += len(rows)
            rows.clear()
        self._on_batch(done)


def _pair(source: Source, row: Row) -> dict[str, Any]:
    return {
        "query": row.query,
        "url": row.url,
        "title": row.title,
        "content": row.content,
        "show": row.show,
        "click": row.click,
        "ctr": row.click / row.show if row.show else None,
        "captions": [{"text": text, "lang": source.lang} for text in row.captions],
        "split": row.split or source.split,
        "classes": list(row.classes),
        "licence": (source.licence_of_rows and row.licence) or source.licence,
        "source": source.name,
    }
