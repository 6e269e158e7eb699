"""Shards: plain webdataset tars, an index with offsets and checksums, a manifest. Writing them, and reading
any sample.

    <split>/<split>-00000.tar   <key>.<jpg|webp|png>, then <key>.json; the same records give the same bytes
    index.parquet               one row a sample, in the order of the shards
    manifest.json               the shards with sha256, bytes, samples; counts by split; licences
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.remote import is_address
from data_tools.shard_cache import RemoteFiles, ShardCache
from data_tools.shard_files import CorpusError, DirectoryFiles, ShardFiles

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

    def __init__(self, files: ShardFiles, table: pa.Table) -> None:
        self.keys: list[str] = table["key"].to_pylist()
        self._files, self._table = files, table
        shards = table["shard"].combine_chunks().dictionary_encode()
        self.shards: list[str] = shards.dictionary.to_pylist()  # in the order of the samples
        self.shard_of: np.ndarray = shards.indices.to_numpy()  # of each sample, its place in `shards`
        self._places = {
            part: (table[f"{part}_offset"].to_numpy(), table[f"{part}_bytes"].to_numpy())
            for part in ("image", "json")
        }

    @classmethod
    def open(
        cls, corpus: Path | str, split: str | None = None, cache: ShardCache | None = None
    ) -> "ShardIndex":
        """Open the out/ of a shard stage; `split` None: all samples, in the order of the index.

        `corpus` is a directory, or the address of one (s3://bucket/corpus), whose files are read by way of
        `cache`.

        Raises:
            CorpusError: no or damaged manifest or index, a shard that is missing or of another size, an
                unknown or empty split; an address without a cache, or that cannot be read. The shards at an
                address are looked at when they are read.
        """
        files = _files(corpus, cache)
        manifest = _read_manifest(files)
        splits = manifest["splits"]
        if split is not None and split not in splits:
            raise CorpusError(f"{corpus}: no split '{split}'; there are: {', '.join(splits)}")
        for shard in manifest["shards"]:
            if split in (None, shard["split"]):
                files.check(shard["path"], shard["bytes"], shard["sha256"])
        table = _read_index(files, manifest)
        if split is not None:
            table = table.filter(pc.equal(table["split"], split))
        if table.num_rows == 0:
            counts = ", ".join(f"{name} {count}" for name, count in splits.items())
            raise CorpusError(
                f"{corpus}: {f'the split {split!r}' if split else 'the corpus'} is empty ({counts})."
            )
        return cls(files, table)

    @property
    def sha256(self) -> str:
        """Of what its samples are, in their order: keys and the checksums of the pictures."""
        digest = hashlib.sha256()
        for key, picture in zip(self.keys, self._table["sha256"].to_pylist(), strict=True):
            digest.update(f"{key} {picture}\n".encode())
        return digest.hexdigest()

    @staticmethod
    def splits(corpus: Path | str) -> dict[str, int]:
        """The splits of a corpus, with how many samples each has."""
        return dict(_read_manifest(_files(corpus, None))["splits"])

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
            raise CorpusError(
                f"{self._files.where('index.parquet')}: no label '{name}'; there are: "
                f"{', '.join(known) or 'none'}"
            )
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
                f"{self.where(i)}: the record is damaged ({error}). Run the shard stage again."
            ) from error
        if not isinstance(record, dict) or record.get("key") != self.keys[i]:
            raise CorpusError(f"{self.where(i)}: another record stands there. Run the shard stage again.")
        return record

    def where(self, i: int) -> str:
        """What errors call sample i: its shard and its key."""
        return f"{self._files.where(self._shard(i))}: sample {self.keys[i]}"

    def reads(self, together: int | None) -> None:
        """So many shards will be read at a time; None: all. CorpusError when no cache holds them twice."""
        self._files.reads(together)

    def fetch_ahead(self, samples: Sequence[int] | np.ndarray) -> None:
        """These will be read soon: shards at an address are fetched meanwhile. Returns at once."""
        self._files.fetch_ahead([self.shards[n] for n in dict.fromkeys(self.shard_of[samples].tolist())])

    def verify(self) -> None:
        """Read every shard through; CorpusError names the first whose checksum is not the manifest's."""
        for shard in _read_manifest(self._files)["shards"]:
            self._files.check(shard["path"], shard["bytes"], shard["sha256"])
            if self._files.sha256(shard["path"]) != shard["sha256"]:
                raise CorpusError(
                    f"{self._files.where(shard['path'])}: the checksum is not the manifest's. "
                    "Run the shard stage again."
                )

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def _shard(self, i: int) -> str:
        return self.shards[self.shard_of[i]]

    def _read(self, i: int, part: str) -> bytes:
        offsets, sizes = self._places[part]
        size = int(sizes[i])
        data = self._files.read(self._shard(i), int(offsets[i]), size)
        if len(data) != size:
            raise CorpusError(
                f"{self.where(i)}: {len(data)} bytes of {size}: cut short. Run the shard stage again."
            )
        return data


def _files(corpus: Path | str, cache: ShardCache | None) -> ShardFiles:
    return RemoteFiles(str(corpus), cache) if is_address(str(corpus)) else DirectoryFiles(Path(corpus))


def _read_manifest(files: ShardFiles) -> dict[str, Any]:
    where = files.where("manifest.json")
    try:
        manifest = json.loads(files.manifest())
    except CorpusError:
        raise
    except ValueError as error:
        raise CorpusError(f"{where}: cannot be read ({error}). Run the shard stage again.") from error
    needed = {"format", "splits", "shards", "index"}
    if not isinstance(manifest, dict) or not needed <= set(manifest) or manifest["format"] != FORMAT:
        raise CorpusError(f"{where}: not a manifest of format {FORMAT}. Run the shard stage again.")
    return manifest


def _read_index(files: ShardFiles, manifest: dict[str, Any]) -> pa.Table:
    where = files.where("index.parquet")
    try:
        with files.index(manifest["index"]["bytes"], manifest["index"]["sha256"]) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{where}: the index cannot be read ({error}). Run the shard stage again."
        ) from error
    missing = set(_INDEX) - set(table.column_names)
    if missing:
        raise CorpusError(
            f"{where}: the index lacks {', '.join(sorted(missing))}. Run the shard stage again."
        )
    return table
