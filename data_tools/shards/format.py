"""What a corpus looks like on disk: the names and columns of its files, and how they are read.

<split>/<split>-00000.tar   <key>.<jpg|webp|png>, then <key>.json; the same records give the same bytes
index.parquet               one row a sample, in the order of the shards
manifest.json               the shards with sha256, bytes, samples; counts by split; licences
"""

import json
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.shards.files import CorpusError, ShardFiles

FORMAT = 1
BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers are one, and data are padded to whole ones
END_BYTES = 2 * BLOCK  # of zeros, with which a tar ends
EXTENSIONS = ("jpg", "png", "webp")  # of the pictures that a corpus of Tandem's holds
INDEX = {
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
# Of the record. Four bytes a sample, as every rank holds the index in memory: enough to find damage, which
# is all that it is for. A corpus that was written before it has no such column.
RECORD_CRC = "json_crc32"


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take in a tar."""
    return size + -size % BLOCK


def sample_bytes(image_bytes: int, json_bytes: int) -> int:
    """Bytes that a sample takes in a shard: two members, a header each."""
    return 2 * BLOCK + padded(image_bytes) + padded(json_bytes)


def index_schema(labels: list[str]) -> pa.Schema:
    """The columns of index.parquet as they are written."""
    return pa.schema(INDEX | {RECORD_CRC: pa.uint32()} | {f"label_{name}": pa.string() for name in labels})


def read_manifest(files: ShardFiles) -> dict[str, Any]:
    """manifest.json. CorpusError: it is missing, damaged, or not of this format."""
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


def read_index(files: ShardFiles, manifest: dict[str, Any]) -> pa.Table:
    """index.parquet, whole. CorpusError: it is missing, damaged, or lacks a column."""
    where = files.where("index.parquet")
    try:
        with files.index(manifest["index"]["bytes"], manifest["index"]["sha256"]) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{where}: the index cannot be read ({error}). Run the shard stage again."
        ) from error
    missing = set(INDEX) - set(table.column_names)
    if missing:
        raise CorpusError(
            f"{where}: the index lacks {', '.join(sorted(missing))}. Run the shard stage again."
        )
    return table
