"""Shards of equal size, written side by side: first all samples are listed with their sizes, then cut.

The order of the shards is that in which samples are added. The shard stage adds them by key, the sha256 of a
picture's URL: that is a global shuffle already, the same for every run, and it needs no memory and no seed.

Each split is cut where its bytes are nearest to equal shares, so that two of its shards differ by two samples
at most. A shard's bytes follow from its slice of the plan alone: whichever process writes it, and when.

What grows with the corpus: on disk the plan (a record's JSON and where its picture lies), in memory 8 bytes a
sample.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.pictures import picture_extension
from data_tools.shards.files import CorpusError, DirectoryFiles
from data_tools.shards.format import BLOCK, END_BYTES, padded, sample_bytes
from data_tools.shards.side_by_side import WorkerLost, side_by_side
from data_tools.shards.writer import Shard, finish_corpus

PLAN_ROWS = 4096  # a row group of a plan: what a process holds of it at a time
PROCESS_WORTH_BYTES = 200_000_000  # a process takes a second to start; one that runs writes as much meanwhile

_COLUMNS = {
    "key": pa.string(),
    "sha256": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "licence": pa.string(),
    "labels": pa.map_(pa.string(), pa.string()),
    "called": pa.string(),  # what errors call it: its URL or its key
    "file": pa.string(),  # that holds the picture, below the plan's source
    "extension": pa.string(),  # null: as the picture's bytes tell
    "image_offset": pa.int64(),
    "image_bytes": pa.int64(),
    "json": pa.binary(),  # null: it lies in the file
    "json_offset": pa.int64(),
    "json_bytes": pa.int64(),
    "others": pa.list_(
        pa.struct({"extension": pa.string(), "offset": pa.int64(), "bytes": pa.int64()})
    ),  # members beside the two, kept as they are
}
_SCHEMA = pa.schema(_COLUMNS)


@dataclass(frozen=True)
class Layout:
    """What the corpus is to be: where, its splits in order, its labels, about how large a shard is."""

    directory: Path
    splits: list[str]
    labels: list[str]
    shard_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)  # for the manifest, beside what it has of its own


@dataclass(frozen=True)
class _Slice:
    """One shard to write."""

    plan: Path
    start: int  # of the plan's rows
    stop: int
    number: int
    split: str
    layout: Layout
    source: Path
    remedy: str


class ShardPlan:
    """The samples of a corpus that is to be written, listed in files of `scratch`, which is there."""

    def __init__(self, scratch: Path, source: Path, remedy: str) -> None:
        """`source`: files of samples are below it. `remedy`: what to do where one cannot be read."""
        self._scratch, self._source, self._remedy = scratch, source, remedy
        self._files: dict[str, pq.ParquetWriter] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._sizes: dict[str, array[int]] = {}

    def add(self, split: str, row: dict[str, Any]) -> None:
        """The next sample of a split; `row` has the columns of a plan: key, sha256, width, height, licence,
        labels, called, file, image_offset, image_bytes, and json, or json_offset and json_bytes.
        """
        if split not in self._files:
            self._files[split] = pq.ParquetWriter(self._path(split), _SCHEMA)
            self._rows[split], self._sizes[split] = [], array("q")
        inline = row.get("json")
        size = sample_bytes(row["image_bytes"], row["json_bytes"] if inline is None else len(inline))
        others = sum(BLOCK + padded(other["bytes"]) for other in row.get("others") or ())
        self._sizes[split].append(size + others)
        self._rows[split].append(row)
        if len(self._rows[split]) >= PLAN_ROWS:
            self._flush(split)

    def __len__(self) -> int:
        return sum(map(len, self._sizes.values()))

    def write(
        self,
        layout: Layout,
        processes: int,
        on_progress: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Write the shards, index.parquet and manifest.json; the manifest, or None where it was stopped.

        Args:
            processes: that may write shards side by side; one each 200 MB are started.
            on_progress: called with a number of samples that are written.
            should_stop: asked after each shard.

        Raises:
            CorpusError: a file of the source cannot be read or is cut short.
            WorkerLost: a worker process was killed.
            OSError: the disk is full, as the worker met it.
        """
        for split, file in self._files.items():
            self._flush(split)
            file.close()
        slices = list(self._slices(layout))
        total = sum(sum(sizes) for sizes in self._sizes.values())
        wanted = min(processes, len(slices), 1 + total // PROCESS_WORTH_BYTES)
        done = []
        try:
            for shard in side_by_side(_write_slice, slices, wanted):
                done.append(shard)
                on_progress(shard["samples"])
                if should_stop() and len(done) < len(slices):
                    return None
        except WorkerLost:
            if should_stop():  # the signal that asks for it may come to a worker that has just begun
                return None
            raise
        finally:
            _open_source.cache_clear()  # of this process, where it wrote itself: files may change hereafter
        return finish_corpus(layout.directory, done, layout.splits, layout.labels, layout.notes)

    def _slices(self, layout: Layout) -> Iterator[_Slice]:
        for split, sizes in self._sizes.items():
            for number, (start, stop) in enumerate(equal_cuts(sizes, layout.shard_bytes)):
                plan = self._path(split)
                yield _Slice(plan, start, stop, number, split, layout, self._source, self._remedy)

    def _path(self, split: str) -> Path:
        return self._scratch / f"{split}.plan"

    def _flush(self, split: str) -> None:
        self._files[split].write_table(pa.Table.from_pylist(self._rows[split], _SCHEMA))
        self._rows[split].clear()


def equal_cuts(sizes: "array[int] | list[int]", shard_bytes: int) -> list[tuple[int, int]]:
    """Slices of samples, as many as shards of `shard_bytes` are needed, cut nearest to equal shares of bytes.

    A slice differs from total / slices by the largest sample at most; it holds one sample at least.
    """
    if not len(sizes):
        return []
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1])
    count = min(len(ends), -(-(total + END_BYTES) // shard_bytes))
    shares = np.array([total * number // count for number in range(1, count)], dtype=np.int64)
    after = np.searchsorted(ends, shares)  # the first sample that ends at or after the share
    before = np.where(after > 0, ends[after - 1], 0)
    cuts = np.where(shares - before <= ends[after] - shares, after, after + 1)
    edges = np.unique(np.concatenate([[0], cuts, [len(ends)]])).tolist()
    return list(pairwise(edges))


def _write_slice(task: _Slice) -> dict[str, Any]:
    """In a worker: one shard, whole."""
    shard = Shard(task.layout.directory, task.split, task.number, task.layout.labels)
    files = _open_source(task.source)

    def read(row: dict[str, Any], offset: int, size: int) -> bytes:
        try:
            data = files.read(row["file"], offset, size)
        except CorpusError as error:
            raise CorpusError(f"{error}. {task.remedy}") from error
        if len(data) != size:
            raise CorpusError(f"{files.where(row['file'])}: cut short at {row['called']}. {task.remedy}")
        return data

    for row in _rows(task):
        image = read(row, row["image_offset"], row["image_bytes"])
        text = row["json"]
        if text is None:
            text = read(row, row["json_offset"], row["json_bytes"])
        row["labels"] = dict(row["labels"])
        shard.add_sample(image, row["extension"] or picture_extension(image), text, row)
        for other in row["others"] or ():
            shard.add(f"{row['key']}.{other['extension']}", read(row, other["offset"], other["bytes"]))
    return shard.close()


@lru_cache(maxsize=1)
def _open_source(source: Path) -> DirectoryFiles:
    """A process's own: the files that it read last stay open from shard to shard."""
    return DirectoryFiles(source)


def _rows(task: _Slice) -> Iterator[dict[str, Any]]:
    """The slice's rows, a row group in memory at a time."""
    with pq.ParquetFile(task.plan) as file:
        for group in range(task.start // PLAN_ROWS, (task.stop - 1) // PLAN_ROWS + 1):
            first = group * PLAN_ROWS
            table = file.read_row_group(group)
            start, stop = max(task.start - first, 0), min(task.stop - first, table.num_rows)
            yield from table.slice(start, stop - start).to_pylist()
