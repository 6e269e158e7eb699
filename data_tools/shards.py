"""Shards: plain webdataset tars, an index with offsets and checksums, a manifest. Writing them, and reading
any sample.

    <split>/<split>-00000.tar   <key>.<jpg|webp|png>, then <key>.json; the same records give the same bytes
    index.parquet               one row a sample, in the order of the shards
    manifest.json               the shards with sha256, bytes, samples; counts by split; licences
"""

import hashlib
import json
import os
import resource
import tarfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.errors import DataError

FORMAT = 1
_HEADER_BYTES = 512  # of a tar member whose name is under 100 bytes
_INDEX = {
    "key": pa.string(),
    "split": pa.string(),
    "shard": pa.string(),
    "image_offset": pa.int64(),
    "image_bytes": pa.int64(),
    "json_offset": pa.int64(),
    "json_bytes": pa.int64(),
    "sha256": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
}


class CorpusError(DataError):
    """A corpus that is not there, not whole, or damaged."""


# --------------------------------------------------------------------------------------------------- writing


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Shard:
    """One open tar."""

    def __init__(self, directory: Path, split: str, number: int) -> None:
        self.name, self.split, self.samples = f"{split}/{split}-{number:05d}.tar", split, 0
        (directory / split).mkdir(parents=True, exist_ok=True)
        self._file = _HashedFile(directory / self.name)
        self._offset = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; where its data begin."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        if len(header) != _HEADER_BYTES:
            raise ValueError(f"'{name}': a name too long for a shard's member")
        start = self._file.bytes + _HEADER_BYTES
        self._file.write(header + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return start

    @property
    def bytes(self) -> int:
        return self._file.bytes

    def close(self) -> dict[str, Any]:
        self._file.write(bytes(-(self._file.bytes + 1024) % tarfile.RECORDSIZE + 1024))
        self._file.close()
        return {
            "path": self.name,
            "split": self.split,
            "samples": self.samples,
            "bytes": self._file.bytes,
            "sha256": self._file.sha256.hexdigest(),
        }


class ShardWriter:
    """Writes samples to shards by split, in the order they come in; `close` writes index and manifest."""

    def __init__(self, directory: Path, shard_bytes: int, splits: list[str], labels: list[str]) -> None:
        self._directory, self._limit, self._labels = directory, shard_bytes, labels
        self._open: dict[str, _Shard] = {}
        self._numbers: Counter[str] = Counter()
        self._done: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._licences: Counter[str] = Counter()
        self._splits = splits

    def write(self, image: bytes, extension: str, record: dict[str, Any]) -> None:
        """Append one sample; `record`, its JSON, has key, split, sha256, width, height, labels, licence."""
        split, key = record["split"], record["key"]
        shard = self._open.get(split)
        if shard is not None and shard.bytes >= self._limit:
            self._done.append(shard.close())
            shard = None
        if shard is None:
            shard = self._open[split] = _Shard(self._directory, split, self._numbers[split])
            self._numbers[split] += 1
        text = json.dumps(record, ensure_ascii=False).encode()
        row = {
            "key": key,
            "split": split,
            "shard": shard.name,
            "image_offset": shard.add(f"{key}.{extension}", image),
            "image_bytes": len(image),
            "json_offset": shard.add(f"{key}.json", text),
            "json_bytes": len(text),
        }
        row |= {name: record[name] for name in ("sha256", "width", "height")}
        self._rows.append(row | {f"label_{name}": record["labels"].get(name, "") for name in self._labels})
        shard.samples += 1
        self._licences[record["licence"]] += 1

    def close(self) -> dict[str, Any]:
        """Finish the shards, write index.parquet and manifest.json; the manifest."""
        self._done += [shard.close() for shard in self._open.values()]
        self._done.sort(key=lambda shard: str(shard["path"]))
        self._rows.sort(key=lambda row: (row["shard"], row["image_offset"]))
        schema = pa.schema(_INDEX | {f"label_{name}": pa.string() for name in self._labels})
        index = self._directory / "index.parquet"
        pq.write_table(pa.Table.from_pylist(self._rows, schema), index)
        counts = Counter(row["split"] for row in self._rows)
        manifest = {
            "format": FORMAT,
            "samples": len(self._rows),
            "splits": {split: counts[split] for split in self._splits},
            "labels": self._labels,
            "licences": dict(sorted(self._licences.items())),
            "index": {
                "bytes": index.stat().st_size,
                "sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
            },
            "shards": self._done,
        }
        path = self._directory / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return manifest


# --------------------------------------------------------------------------------------------------- reading


class ShardIndex:
    """Random access to the samples of a corpus, or of one split. Safe across fork, spawn and threads."""

    def __init__(self, directory: Path, table: pa.Table, name: str) -> None:
        self.directory, self.name = directory, name
        self.keys: list[str] = table["key"].to_pylist()
        self._table = table
        self._shards: list[str] = table["shard"].to_pylist()
        self._places = {
            part: (table[f"{part}_offset"].to_numpy(), table[f"{part}_bytes"].to_numpy())
            for part in ("image", "json")
        }
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, split: str | None = None) -> "ShardIndex":
        """Open the out/ of a shard stage; `split` None: all samples, in the order of the index.

        Raises:
            CorpusError: no or damaged manifest or index, a shard that is missing or of another size, an
                unknown or empty split.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        splits = manifest["splits"]
        if split is not None and split not in splits:
            raise CorpusError(f"{directory}: no split '{split}'; there are: {', '.join(splits)}")
        for shard in manifest["shards"]:
            path = directory / shard["path"]
            size = path.stat().st_size if path.is_file() else None
            if split in (None, shard["split"]) and size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
                raise CorpusError(f"{path}: the shard {found}. Run the shard stage again.")
        table = _read_index(directory, manifest)
        if split is not None:
            table = table.filter(pc.equal(table["split"], split))
        if table.num_rows == 0:
            counts = ", ".join(f"{name} {count}" for name, count in splits.items())
            raise CorpusError(
                f"{directory}: {f'the split {split!r}' if split else 'the corpus'} is empty ({counts})."
            )
        _allow_open_files(len(manifest["shards"]))
        return cls(directory, table, f"{directory.name}:{split or 'all'}")

    @property
    def sha256(self) -> str:
        """Of what its samples are, in their order: keys and the checksums of the pictures."""
        digest = hashlib.sha256()
        for key, picture in zip(self.keys, self._table["sha256"].to_pylist(), strict=True):
            digest.update(f"{key} {picture}\n".encode())
        return digest.hexdigest()

    @staticmethod
    def splits(directory: Path) -> dict[str, int]:
        """The splits of a corpus, with how many samples each has."""
        return dict(_read_manifest(Path(directory))["splits"])

    def __len__(self) -> int:
        return len(self.keys)

    def labels(self, name: str) -> list[str]:
        """The label of every sample ("" where it has none); CorpusError lists the labels that there are."""
        if f"label_{name}" not in self._table.column_names:
            known = [
                column.removeprefix("label_")
                for column in self._table.column_names
                if column.startswith("label_")
            ]
            raise CorpusError(f"{self.directory}: no label '{name}'; there are: {', '.join(known) or 'none'}")
        return [value or "" for value in self._table[f"label_{name}"].to_pylist()]

    def image_bytes(self, i: int) -> bytes:
        """The picture of sample i as it was fetched."""
        return self._read(i, "image")

    def record(self, i: int) -> dict[str, Any]:
        """The record of sample i: key, title, content, queries, captions, url, labels …"""
        data = self._read(i, "json")
        try:
            record = json.loads(data)
        except ValueError as error:
            raise CorpusError(
                f"{self._where(i)}: the record is damaged ({error}). Run the shard stage again."
            ) from error
        if not isinstance(record, dict) or record.get("key") != self.keys[i]:
            raise CorpusError(f"{self._where(i)}: another record stands there. Run the shard stage again.")
        return record

    def verify(self) -> None:
        """Read every shard through; CorpusError names the first whose checksum is not the manifest's."""
        for shard in _read_manifest(self.directory)["shards"]:
            path = self.directory / shard["path"]
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise CorpusError(
                        f"{path}: the checksum is not the manifest's. Run the shard stage again."
                    )

    def _read(self, i: int, part: str) -> bytes:
        offsets, sizes = self._places[part]
        offset, size = int(offsets[i]), int(sizes[i])
        data = os.pread(self._descriptor(self._shards[i]), size, offset)
        if len(data) != size:
            raise CorpusError(
                f"{self._where(i)}: {len(data)} bytes of {size}: cut short. Run the shard stage again."
            )
        return data

    def _where(self, i: int) -> str:
        return f"{self.directory / self._shards[i]}: sample {self.keys[i]}"

    def _descriptor(self, shard: str) -> int:
        """Opened once a process; children of a fork go on with it, as pread moves no shared position."""
        found = self._files.get(shard)
        if found is not None:
            return found
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = os.open(self.directory / shard, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CorpusError(
                        f"{self.directory / shard}: cannot be opened: {error.strerror}"
                    ) from error
            return self._files[shard]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._lock = {}, threading.Lock()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: no manifest: not the out/ of a finished shard stage.") from error
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}). Run the shard stage again.") from error
    needed = {"format", "splits", "shards", "index"}
    if not isinstance(manifest, dict) or not needed <= set(manifest) or manifest["format"] != FORMAT:
        raise CorpusError(f"{path}: not a manifest of format {FORMAT}. Run the shard stage again.")
    return manifest


def _read_index(directory: Path, manifest: dict[str, Any]) -> pa.Table:
    path = directory / "index.parquet"
    try:
        if path.stat().st_size != manifest["index"]["bytes"]:
            raise CorpusError(f"{path}: has another size than the manifest says. Run the shard stage again.")
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{path}: the index cannot be read ({error}). Run the shard stage again."
        ) from error
    missing = set(_INDEX) - set(table.column_names)
    if missing:
        raise CorpusError(f"{path}: the index lacks {', '.join(sorted(missing))}. Run the shard stage again.")
    return table


def _allow_open_files(shards: int) -> None:
    """Raise this process's soft limit of open files, if the shards need it and the hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
