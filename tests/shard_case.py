"""What the tests of shards share: small corpora with known contents, and ways to change their bytes."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.shards import ShardIndex, ShardWriter
from tests.data_helpers import picture

Content = dict[str, tuple[bytes, bytes]]


def image(number: int) -> bytes:
    return picture(100 + number, 100, color=(number % 256, 30, 30), format="PNG")


def record(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    return {
        "key": f"{number:04d}",
        "title": f"title {number}",
        "queries": [{"text": f"红色 {number}", "lang": "zh"}],
        "captions": [],
        "lang": "en",
        "sha256": hashlib.sha256(image(number)).hexdigest(),
        "width": 100 + number,
        "height": 100,
        "labels": {"colour": "red"},
        "licence": "MIT" if number % 2 else "CC-BY-4.0",
        "split": split,
    } | changes


def write_corpus(out: Path, samples: int = 12, shard_bytes: int = 8000) -> Path:
    """Several shards of PNGs, all in the split `train`."""
    out.mkdir(parents=True)
    writer = ShardWriter(out, shard_bytes, ["train"], ["colour"])
    for number in range(samples):
        writer.write(image(number), "png", record(number))
    writer.close()
    return out


def contents(corpus: Path) -> Content:
    """Every sample's bytes, read by the index's offsets."""
    found = {}
    for row in pq.read_table(corpus / "index.parquet").to_pylist():
        data = (corpus / row["shard"]).read_bytes()
        parts = [data[row[f"{p}_offset"] :][: row[f"{p}_bytes"]] for p in ("image", "json")]
        found[row["key"]] = (parts[0], parts[1])
    index = ShardIndex.open(corpus)
    index.verify()
    assert index.keys == list(found)
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def rows(corpus: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(corpus / "index.parquet").to_pylist()}


def change(path: Path, place: int, data: bytes) -> None:
    """Other bytes at a place of a file."""
    old = path.read_bytes()
    path.write_bytes(old[:place] + data + old[place + len(data) :])


def tar_of(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    """A tar as Python's tarfile writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(number: int, **changes: Any) -> list[tuple[str, bytes]]:
    """A sample's two members."""
    made = record(number, **changes)
    return [(f"{made['key']}.png", image(number)), (f"{made['key']}.json", json.dumps(made).encode())]
