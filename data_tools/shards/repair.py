"""Rescuing what is sound of damaged shards into a new corpus; the old one is only read.

Every sound sample is copied byte for byte, once: of a key that comes several times the one in its own place,
else the first. With an index no sample comes in that it does not tell of: what the manifest says of all
(which sets they were checked against) holds for those that are left. What grows with the corpus lies on disk:
the list of what was found, which DuckDB sorts there.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import explain_full_disk
from data_tools.pictures import FORMATS, EncodedPicture, PictureError, picture_format
from data_tools.shards.check import Corpus, ShardTask, look_at
from data_tools.shards.files import CorpusError
from data_tools.shards.findings import Examined, Sample, printable, safe_name
from data_tools.shards.format import RECORD_CRC
from data_tools.shards.plan import Layout, ShardPlan
from data_tools.shards.samples import MAX_PIXELS
from data_tools.shards.side_by_side import side_by_side
from data_tools.shards.tar_scan import TarFile

DUCKDB_MEMORY = "1GB"  # what it holds before it spills
FEATURES = b"\x93NUMPY"  # how a .npy file begins
MOST_NAMES = 64  # of splits, and of labels that become columns of the index where no manifest tells them
NAME_BYTES = 99  # of a member's name, that a shard of Tandem's can have
_PLACE = {"extension": pa.string(), "offset": pa.int64(), "bytes": pa.int64()}
_FOUND = pa.schema(
    {
        "shard": pa.int64(),
        "file": pa.string(),
        "split": pa.string(),
        "key": pa.string(),
        "called": pa.string(),
        "sha256": pa.string(),
        "crc32": pa.uint32(),
        "listed": pa.bool_(),
        "width": pa.int32(),
        "height": pa.int32(),
        "licence": pa.string(),
        "labels": pa.map_(pa.string(), pa.string()),
        "extension": pa.string(),
        "image_offset": pa.int64(),
        "image_bytes": pa.int64(),
        "json_offset": pa.int64(),
        "json_bytes": pa.int64(),
        "others": pa.list_(pa.struct(_PLACE)),
    }
)
_LOST = pa.schema({"shard": pa.string(), "key": pa.string(), "reason": pa.string()})


@dataclass(frozen=True)
class RepairReport:
    """What became of the samples."""

    rescued: int
    lost: int  # keys of which nothing sound is left; lost.parquet names them
    reasons: Counter[str]  # of the lost, by kind
    differing: int  # further samples of rescued keys, with other bytes; lost.parquet names them too
    shards: int
    bytes: int


@dataclass(frozen=True)
class _Task:
    number: int
    shard: ShardTask
    scratch: Path
    split: str  # of records that name none


@dataclass
class _Seen:
    """What a worker says of a shard; the samples themselves are in files."""

    bytes: int
    splits: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)

    def add(self, split: str, labels: dict[str, str]) -> None:
        """Names of a sample; of more than are allowed one is enough to tell."""
        if len(self.splits) <= MOST_NAMES:
            self.splits.add(split)
        if len(self.labels) <= MOST_NAMES:
            self.labels |= set(labels)


def repair(
    corpus: Corpus,
    out: Path,
    processes: int,
    shard_bytes: int | None = None,
    split: str = "train",
    on_progress: Callable[[str, int, int], None] = lambda part, count, total: None,
) -> RepairReport:
    """Write the sound samples of a corpus, or of tars, as a corpus `out`, with out/lost.parquet beside.

    Args:
        shard_bytes: about the most of a new shard; None: as the largest that there is.
        split: of records that name no split.
        on_progress: called with "read" and a number of shards, then with "write" and a number of samples,
            and how many there are in all.

    Raises:
        CorpusError: `out` exists, no sample is sound, a shard changed meanwhile, or records name more than
            MOST_NAMES splits.
        DiskFullError: no room beside `out`.
        WorkerLost: a worker process was killed.
    """
    if out.exists():
        raise CorpusError(f"{out}: exists already; give the repaired corpus a new name")
    aside = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    scratch = aside / "scratch"
    with explain_full_disk(out.parent, "What is repaired is only read."):
        scratch.mkdir(parents=True)
        try:
            report = _repair(corpus, aside, scratch, processes, shard_bytes, split, on_progress)
            shutil.rmtree(scratch)
            aside.replace(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return report


def _repair(
    corpus: Corpus,
    aside: Path,
    scratch: Path,
    processes: int,
    shard_bytes: int | None,
    split: str,
    on_progress: Callable[[str, int, int], None],
) -> RepairReport:
    tasks = [_Task(number, shard, scratch, split) for number, shard in enumerate(corpus.tasks)]
    splits, labels, largest = set[str](), set[str](), 1
    for seen in side_by_side(_rescue, tasks, processes):
        splits |= seen.splits
        labels |= seen.labels
        largest = max(largest, seen.bytes)
        on_progress("read", 1, len(tasks))
    known = list(corpus.manifest["splits"]) if corpus.manifest else []
    order = known + sorted(splits - set(known))
    if len(order) > MOST_NAMES:
        raise CorpusError(f"the records name more than {MOST_NAMES} splits, {order[-1]!r} among them")
    _choose(scratch, corpus.index)
    with pq.ParquetFile(scratch / "chosen.parquet") as file:
        if file.metadata.num_rows == 0:
            raise CorpusError("no sample of these shards is sound: there is nothing to rescue")
        plan = ShardPlan(scratch, Path("/"), "It changed while it was read; repair it again.")
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                plan.add(row.pop("split"), row)
    names = (corpus.manifest or {}).get("labels", sorted(labels)[:MOST_NAMES])
    notes = (corpus.manifest or {}) if corpus.index is not None else {}
    layout = Layout(aside, order, names, shard_bytes or largest, notes)
    manifest = plan.write(
        layout, processes, lambda count: on_progress("write", count, len(plan)), lambda: False
    )
    assert manifest is not None  # it is never asked to stop
    reasons, differing = _write_lost(scratch, aside / "lost.parquet")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return RepairReport(
        manifest["samples"], reasons.total(), reasons, differing, len(manifest["shards"]), size
    )


def _rescue(task: _Task) -> _Seen:
    """In a worker: list a shard's sound samples and its lost ones in files of the scratch directory."""
    made = look_at(task.shard)
    seen = _Seen(made.bytes)
    with pq.ParquetWriter(task.scratch / f"{task.number}.found", _FOUND) as writer:
        rows: list[dict[str, Any]] = []
        if made.samples:
            file = TarFile(task.shard.path)
            for sample in made.samples:
                row = _row(task, file, sample, made)
                if row is not None:
                    rows.append(row)
                    seen.add(row["split"], row["labels"])
                if len(rows) >= 1000:
                    writer.write_table(pa.Table.from_pylist(rows, _FOUND))
                    rows.clear()
            file.close()
        writer.write_table(pa.Table.from_pylist(rows, _FOUND))
    lost = [{"shard": made.shard, "key": key, "reason": reason} for key, reason in made.lost.items()]
    differing = [finding for finding in made.findings if finding.kind == "duplicate_differs"]
    lost += [{"shard": f.shard, "key": f.key, "reason": f"{f.kind}: {f.detail}"} for f in differing]
    pq.write_table(pa.Table.from_pylist(lost, _LOST), task.scratch / f"{task.number}.lost")
    return seen


def _row(task: _Task, file: TarFile, sample: Sample, made: Examined) -> dict[str, Any] | None:
    """A sound sample as the plan wants it; None where a corpus cannot hold it, which is said in `made`."""
    record = json.loads(file.read(sample.record.offset, sample.record.size))
    start = file.read(sample.image.offset, 16)
    size = _size(file, sample, record, start)
    extension = sample.image.extension or _extension(start)
    split = str(record.get("split") or task.split)
    problem = ""
    if record.get("key") != sample.key:
        problem = "record: it names no key, which a record of a corpus has"
    elif size is None or not extension:
        problem = "undecodable: a picture without a size, or of a format that a corpus does not hold"
    elif not safe_name(split) or "/" in split:
        problem = f"name: the split {split[:100]!r} is no name for a directory"
    elif len(f"{sample.key}.json".encode()) > NAME_BYTES:
        problem = f"name: longer than {NAME_BYTES} bytes"
    if problem or size is None:
        made.lost.setdefault(sample.key, problem)
        return None
    found = record.get("labels")
    labels = (
        {printable(str(k)): printable(str(v)) for k, v in found.items()} if isinstance(found, dict) else {}
    )
    return {
        "shard": task.number,
        "file": str(task.shard.path.resolve()),
        "split": split,
        "key": sample.key,
        "called": sample.key,
        "sha256": sample.sha256,
        "crc32": sample.crc32,
        "listed": sample.listed,
        "width": size[0],
        "height": size[1],
        "licence": printable(str(record.get("licence") or record.get("license") or "unknown")),
        "labels": labels,
        "extension": extension,
        "image_offset": sample.image.offset,
        "image_bytes": sample.image.size,
        "json_offset": sample.record.offset,
        "json_bytes": sample.record.size,
        "others": [{"extension": o.extension, "offset": o.offset, "bytes": o.size} for o in sample.others],
    }


def _extension(start: bytes) -> str:
    """Of a picture or of features whose header is lost, by their first bytes; "" for others."""
    return "npy" if start.startswith(FEATURES) else FORMATS.get(picture_format(start) or "", "")


def _size(
    file: TarFile, sample: Sample, record: dict[str, Any], start: bytes
) -> tuple[int | None, int | None] | None:
    """Width and height: the record's, else the picture's; features have none. None: what no corpus holds."""
    if start.startswith(FEATURES):
        return None, None
    if not _extension(start):
        return None
    told = record.get("width"), record.get("height")
    if all(isinstance(side, int) and 0 < side < 1 << 31 for side in told):
        return told
    data = file.read(sample.image.offset, sample.image.size)
    try:
        return EncodedPicture(data, max_pixels=MAX_PIXELS, name=sample.key).decoded().size
    except PictureError:
        return None


def _choose(scratch: Path, index: Path | None) -> None:
    """chosen.parquet: one row a key, in the order of the old shards; lost.parquet: what has none."""
    spilled = str(scratch / "spilled")
    connection = duckdb.connect(config={"temp_directory": spilled, "memory_limit": DUCKDB_MEMORY})
    try:
        found = f"read_parquet('{_globbed(scratch)}/*.found')"
        fits = "true"
        if index is not None:  # the corpus is what its index tells: strays of it are, forged ones are not
            names = pq.read_schema(index).names
            crc = f"AND i.{RECORD_CRC} = f.crc32" if RECORD_CRC in names else ""
            fits = f"""EXISTS (SELECT 1 FROM read_parquet('{_globbed(index)}') i
                WHERE i.key = f.key AND i.sha256 = f.sha256 {crc})"""
        connection.execute(f"""
            CREATE TABLE ranked AS SELECT *, row_number() OVER w AS place,
                first_value(sha256) OVER w AS kept_sha256, first_value(crc32) OVER w AS kept_crc32,
                first_value(file) OVER w AS kept_file
            FROM {found} f WHERE {fits}
            WINDOW w AS (PARTITION BY key ORDER BY NOT listed, shard, image_offset
                ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)""")
        plan = "split, key, sha256, width, height, licence, labels, called, file, extension, image_offset, "
        plan += "image_bytes, json_offset, json_bytes, others"
        connection.execute(
            f"COPY (SELECT {plan} FROM ranked WHERE place = 1 ORDER BY shard, image_offset) "
            f"TO '{_quoted(scratch)}/chosen.parquet' (FORMAT parquet)"
        )
        connection.execute(f"""
            COPY (WITH lost AS (SELECT *, starts_with(reason, 'duplicate_differs') AS differs
                    FROM read_parquet('{_globbed(scratch)}/*.lost'))
                SELECT shard, key, reason FROM lost WHERE differs
                UNION ALL SELECT min(shard), key, min(reason) FROM lost
                WHERE NOT differs AND key NOT IN (SELECT key FROM ranked) GROUP BY key
                UNION ALL SELECT DISTINCT file, key, 'unindexed: no sample of this corpus'
                FROM {found} WHERE key NOT IN (SELECT key FROM ranked)
                    AND key NOT IN (SELECT key FROM lost)
                UNION ALL SELECT file, key,
                    'duplicate_differs: another sample of this key, of ' || kept_file || ', was kept'
                FROM ranked WHERE place > 1 AND (sha256 <> kept_sha256 OR crc32 <> kept_crc32)
                ORDER BY ALL) TO '{_quoted(scratch)}/lost.parquet' (FORMAT parquet)""")
    finally:
        connection.close()


def _write_lost(scratch: Path, target: Path) -> tuple[Counter[str], int]:
    """Put the list of lost samples beside the corpus; how many there are by kind, and how many differ."""
    shutil.move(scratch / "lost.parquet", target)
    reasons: Counter[str] = Counter()
    with pq.ParquetFile(target) as file:
        for batch in file.iter_batches(batch_size=10_000, columns=["reason"]):
            reasons.update(reason.partition(":")[0] for reason in batch["reason"].to_pylist())
    return reasons, reasons.pop("duplicate_differs", 0)


def _quoted(path: Path) -> str:
    """A path within a string of SQL."""
    return str(path).replace("'", "''")


def _globbed(path: Path) -> str:
    """The same where DuckDB takes it for a pattern."""
    return re.sub(r"([\[*?])", r"[\1]", _quoted(path))
