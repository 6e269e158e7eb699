"""Rows of importers as Parquet files: written a batch at a time, so that memory does not grow with their
number."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
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

    def __init__(self, folder: Path, name: str | None, on_batch: Callable[[int], None]) -> None:
        """`name`: a key of TABLES; None: dropped entries alone. `on_batch`: called after each batch with the
        number of its entries; may raise to stop."""
        self._folder, self._name, self._on_batch = folder, name, on_batch
        self._stack, self._counts = ExitStack(), Counter[str]()

    @property
    def counts(self) -> dict[str, int]:
        counts = {name: self._counts[name] for name in ("rows", "kept", "captions")}
        return counts | {f"dropped_{reason}": self._counts[f"dropped_{reason}"] for reason in REASONS}

    def __enter__(self) -> "Tables":
        schemas = {"dropped": DROPPED} | ({self._name: TABLES[self._name][0]} if self._name else {})
        self._writers = {
            name: self._stack.enter_context(pq.ParquetWriter(self._folder / f"{name}.parquet", schema))
            for name, schema in schemas.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, source: Source, found: Iterable[Row | TextPair | Dropped]) -> None:
        """All rows and dropped entries of one source."""
        rows: list[Any] = []
        dropped: list[Dropped] = []
        for one in found:
            if isinstance(one, Dropped):
                dropped.append(one)
            else:
                rows.append(one)
            if len(rows) + len(dropped) >= BATCH:
                self._write(source, rows, dropped)
                rows, dropped = [], []
        self._write(source, rows, dropped)

    def _write(self, source: Source, rows: list[Any], dropped: list[Dropped]) -> None:
        if rows and self._name is not None:
            self._writers[self._name].write_table(TABLES[self._name][1](source, rows))
        if dropped:
            self._writers["dropped"].write_table(_dropped_table(source, dropped))
        self._counts.update(rows=len(rows) + len(dropped), kept=len(rows))
        self._counts["captions"] += sum(len(row.captions) for row in rows if isinstance(row, Row))
        self._counts.update(f"dropped_{one.reason}" for one in dropped)
        self._on_batch(len(rows) + len(dropped))


def _pairs_table(source: Source, rows: Sequence[Row]) -> pa.Table:
    show, click = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("show", "click"))
    stated = [row.licence if source.licence_of_rows else None for row in rows]
    texts = pa.array([text for row in rows for text in row.captions], pa.string())
    langs = pa.repeat(pa.scalar(source.lang), len(texts))
    captions = pa.StructArray.from_arrays([texts, langs], ["text", "lang"])
    ends = np.cumsum([0, *(len(row.captions) for row in rows)], dtype=np.int32)
    columns = {name: [getattr(row, name) for row in rows] for name in ("query", "url", "title", "content")}
    return pa.table(
        columns
        | {
            "show": show,
            "click": click,
            "ctr": pa.array(click / np.maximum(show, 1), mask=show == 0),
            "captions": pa.ListArray.from_arrays(pa.array(ends), captions),
            "split": [row.split or source.split for row in rows],
            "classes": [row.classes for row in rows],
            "licence": [licence or source.licence for licence in stated],
            "source": pa.repeat(pa.scalar(source.name), len(rows)),
        },
        PAIRS,
    )


def _text_pairs_table(source: Source, rows: Sequence[TextPair]) -> pa.Table:
    said = {name: [getattr(row, name) for row in rows] for name in ("text_a", "text_b", "score")}
    return pa.table(
        said
        | {
            "split": [row.split or source.split for row in rows],
            "lang": [source.lang] * len(rows),
            "licence": [source.licence] * len(rows),
            "source": [source.name] * len(rows),
        },
        TEXT_PAIRS,
    )


def _dropped_table(source: Source, entries: Sequence[Dropped]) -> pa.Table:
    said = {name: [getattr(one, name) for one in entries] for name in DROPPED.names if name != "source"}
    return pa.table({"source": [source.name] * len(entries)} | said, DROPPED)


TABLES: dict[str, tuple[pa.Schema, Callable[[Source, Any], pa.Table]]] = {
    "pairs": (PAIRS, _pairs_table),
    "text_pairs": (TEXT_PAIRS, _text_pairs_table),
}
