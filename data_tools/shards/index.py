"""Reading any sample of a corpus."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.remote import is_address
from data_tools.shards.cache import RemoteFiles, ShardCache
from data_tools.shards.files import CorpusError, DirectoryFiles, ShardFiles
from data_tools.shards.format import read_index, read_manifest


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
        manifest = read_manifest(files)
        splits = manifest["splits"]
        if split is not None and split not in splits:
            raise CorpusError(f"{corpus}: no split '{split}'; there are: {', '.join(splits)}")
        for shard in manifest["shards"]:
            if split in (None, shard["split"]):
                files.check(shard["path"], shard["bytes"], shard["sha256"])
        table = read_index(files, manifest)
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

    @property
    def pictures(self) -> list[str]:
        """The sha256 of each sample's picture."""
        pictures: list[str] = self._table["sha256"].to_pylist()
        return pictures

    @staticmethod
    def splits(corpus: Path | str) -> dict[str, int]:
        """The splits of a corpus, with how many samples each has."""
        return dict(read_manifest(_files(corpus, None))["splits"])

    def __len__(self) -> int:
        return len(self.keys)

    def labels(self, name: str) -> list[str]:
        """The label of every sample ("" where it has none); CorpusError lists the labels that there are."""
        return [value or "" for value in self.label_column(name).to_pylist()]

    def label_column(self, name: str) -> pa.ChunkedArray:
        """The same as the index holds it: strings, or null; not copied."""
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
        return self._table[f"label_{name}"]

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
        for shard in read_manifest(self._files)["shards"]:
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
