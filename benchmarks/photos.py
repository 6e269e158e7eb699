"""A corpus of photos for the benchmarks, in shards that Tandem and open_clip's webdataset pipeline both read.

Photos of a folder of tars (or generated textures) are scaled to a shorter side of 640 px and written as JPEG.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.shards import ShardWriter

GENERATED = 64  # textures that differ; where more are asked for they come again
WORDS = [
    "red",
    "small",
    "dog",
    "cat",
    "runs",
    "over",
    "green",
    "grass",
    "near",
    "water",
    "while",
    "the",
    "ball",
]


class _CaptionedShards(ShardWriter):
    """Beside <key>.jpg and <key>.json, <key>.txt: the caption where open_clip looks for it."""

    def write(self, image: bytes, extension: str, record: dict[str, Any]) -> None:
        super().write(image, extension, record)
        self._open[record["split"]].add(f"{record['key']}.txt", record["title"].encode())


def write_photos(out: Path, count: int, photos: Path | None, short_side: int = 640, shards: int = 8) -> Path:
    """A corpus with one split, `train`, of `count` JPEGs; `photos`: a folder of tars of pictures, or None."""
    if (out / "manifest.json").is_file():
        return out
    out.mkdir(parents=True)
    source = _generated() if photos is None else _of_tars(photos)
    pictures = [_jpeg(picture, short_side) for picture, _ in zip(source, range(count), strict=False)]
    shard_bytes = sum(map(len, pictures)) * count // (len(pictures) * shards)
    writer = _CaptionedShards(out, shard_bytes, ["train"], [])
    random = np.random.default_rng(0)
    for number in range(count):
        data = pictures[number % len(pictures)]
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        record = {"key": f"{number:08d}", "title": " ".join(random.choice(WORDS, random.integers(6, 14)))}
        record |= {"split": "train", "sha256": hashlib.sha256(data).hexdigest(), "labels": {}}
        writer.write(data, "jpg", record | {"width": width, "height": height, "licence": "unknown"})
    writer.close()
    return out


def captions(seed: int = 0) -> list[str]:
    """Texts of the words that the photos are captioned with, to learn a vocabulary from."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 10)) for _ in range(200)]


def _jpeg(picture: Image.Image, short_side: int) -> bytes:
    scale = short_side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    data = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def _of_tars(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".jpeg", ".webp", ".png")):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield Image.open(io.BytesIO(file.read()))


def _generated() -> Iterator[Image.Image]:
    """Blobs under a fine grain: about as many bytes a pixel as a photo has."""
    random = np.random.default_rng(1)
    for _ in range(GENERATED):
        blobs = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(blobs.resize((853, 640), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = random.normal(0, 8, pixels.shape).astype(np.float32)
        yield Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
