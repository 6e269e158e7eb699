"""Writing shards: one tar at a time, the index in parts, and the manifest that makes them a corpus."""

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.shards.format import BLOCK, END_BYTES, FORMAT, RECORD_CRC, index_schema

PART_ROWS = 20_000  # of an index that are held in memory, and one row group of index.parquet


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Part:
    """A shard's rows of the index, in a file of their own until `join_index`; PART_ROWS of them in memory."""

    def __init__(self, path: Path, labels: list[str]) -> None:
        self._schema, self._rows = index_schema(labels), list[dict[str, Any]]()
        self._file = pq.ParquetWriter(path, self._schema)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


class Shard:
    """One open tar, and its rows of the index beside it."""

    def __init__(self, directory: Path, split: str, number: int, labels: list[str]) -> None:
        self.name, self.split, self.samples = f"{split}/{split}-{number:05d}.tar", split, 0
        self._labels = labels
        (directory / split).mkdir(parents=True, exist_ok=True)
        self._file = _HashedFile(directory / self.name)
        self._index = _Part(part_path(directory, self.name), labels)
        self._licences: Counter[str] = Counter()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; where its data begin."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        if len(header) != BLOCK:
            raise ValueError(f"'{name}': a name too long for a shard's member")
        start = self._file.bytes + BLOCK
        self._file.write(header + data + bytes(-len(data) % BLOCK))
        return start

    def add_sample(self, image: bytes, extension: str, text: bytes, row: dict[str, Any]) -> None:
        """Append a picture and its record's JSON. `row`: key, sha256, width, height, labels, licence."""
        found = {
            "key": row["key"],
            "split": self.split,
            "shard": self.name,
            "image_offset": self.add(f"{row['key']}.{extension}", image),
            "image_bytes": len(image),
            "json_offset": self.add(f"{row['key']}.json", text),
            "json_bytes": len(text),
            RECORD_CRC: zlib.crc32(text),
        }
        found |= {name: row[name] for name in ("sha256", "width", "height")}
        self._index.add(found | {f"label_{name}": row["labels"].get(name, "") for name in self._labels})
        self.samples += 1
        self._licences[row["licence"]] += 1

    @property
    def bytes(self) -> int:
        return self._file.bytes

    def close(self) -> dict[str, Any]:
        """End the tar as tar itself does; what the manifest says of it."""
        self._file.write(bytes(-(self._file.bytes + END_BYTES) % tarfile.RECORDSIZE + END_BYTES))
        self._file.close()
        self._index.close()
        return {
            "path": self.name,
            "split": self.split,
            "samples": self.samples,
            "bytes": self._file.bytes,
            "sha256": self._file.sha256.hexdigest(),
            "licences": dict(sorted(self._licences.items())),
        }


class ShardWriter:
    """Writes samples to shards by split, in the order they come in; `close` writes index and manifest.

    A shard is closed once it is full: the last of a split is smaller. Where the sizes of all samples are
    known before, `plan` makes shards of equal size.
    """

    def __init__(self, directory: Path, shard_bytes: int, splits: list[str], labels: list[str]) -> None:
        self._directory, self._limit, self._labels = directory, shard_bytes, labels
        self._open: dict[str, Shard] = {}
        self._numbers: Counter[str] = Counter()
        self._done: list[dict[str, Any]] = []
        self._splits = splits

    def write(self, image: bytes, extension: str, record: dict[str, Any]) -> None:
        """Append one sample; `record`, its JSON, has key, split, sha256, width, height, labels, licence."""
        split = record["split"]
        shard = self._open.get(split)
        if shard is not None and shard.bytes >= self._limit:
            self._done.append(shard.close())
            shard = None
        if shard is None:
            shard = self._open[split] = Shard(self._directory, split, self._numbers[split], self._labels)
            self._numbers[split] += 1
        shard.add_sample(image, extension, record_bytes(record), record)

    def close(self) -> dict[str, Any]:
        """Finish the shards, write index.parquet and manifest.json; the manifest."""
        self._done += [shard.close() for shard in self._open.values()]
        return finish_corpus(self._directory, self._done, self._splits, self._labels)


def record_bytes(record: dict[str, Any]) -> bytes:
    """A record as a shard holds it."""
    return json.dumps(record, ensure_ascii=False).encode()


def part_path(directory: Path, shard: str) -> Path:
    """Where a shard's rows of the index lie until they are joined."""
    return directory / f"{shard}.index"


def finish_corpus(
    directory: Path,
    shards: Iterable[dict[str, Any]],
    splits: list[str],
    labels: list[str],
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Join the shards' parts into index.parquet, and write manifest.json over them; the manifest.

    `shards`: what `Shard.close` said of each, in any order. `notes`: further entries of the manifest, which
    yield to its own. The parts are deleted. What grows with the
    corpus is the list of shards.
    """
    ordered = sorted(shards, key=lambda shard: str(shard["path"]))
    index = directory / "index.parquet"
    _join_index(directory, [shard["path"] for shard in ordered], index, labels)
    counts: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for shard in ordered:
        counts[shard["split"]] += shard["samples"]
        licences.update(shard["licences"])
    with index.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = {
        "format": FORMAT,
        "samples": counts.total(),
        "bytes": sum(shard["bytes"] for shard in ordered),
        "splits": {split: counts[split] for split in splits},
        "labels": labels,
        "licences": dict(sorted(licences.items())),
        "index": {"bytes": index.stat().st_size, "sha256": sha256},
        "shards": ordered,
    }
    manifest |= {name: note for name, note in (notes or {}).items() if name not in manifest}
    path = directory / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _join_index(directory: Path, shards: list[str], target: Path, labels: list[str]) -> None:
    """Row groups of about PART_ROWS rows, whatever the sizes of the parts."""
    schema = index_schema(labels)
    held: list[pa.Table] = []
    with pq.ParquetWriter(target, schema) as writer:
        for shard in shards:
            with pq.ParquetFile(part_path(directory, shard)) as part:
                for group in range(part.num_row_groups):
                    held.append(part.read_row_group(group))
                    if sum(table.num_rows for table in held) >= PART_ROWS:
                        writer.write_table(pa.concat_tables(held))
                        held.clear()
        writer.write_table(pa.concat_tables([*held, schema.empty_table()]))
    for shard in shards:  # after the last was read, so that nothing is lost where the disk is full
        part_path(directory, shard).unlink()
