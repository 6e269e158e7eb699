"""What the tests of clean and decontamination share: drawings of the demo, copies of them, a crawl's out/."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools.web.crawl import SCHEMA

DRAWINGS = Path(__file__).parents[1] / "demo" / "corpus"


def drawings(names: Sequence[str] = ("noto", "twemoji", "fluent-3d"), each: int = 40) -> Iterator[bytes]:
    """Real drawings: `each` of every vendor, of concepts spread over the corpus."""
    for name in names:
        with tarfile.open(DRAWINGS / f"{name}.tar") as tar:
            members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
            for member in members[:: len(members) // each][:each]:
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


def drawing(name: str) -> Image.Image:
    """One drawing, say twemoji/1f550.webp, on white."""
    vendor, _, member = name.partition("/")
    with tarfile.open(DRAWINGS / f"{vendor}.tar") as tar:
        file = tar.extractfile(member)
        assert file is not None
        return on_white(Image.open(io.BytesIO(file.read())))


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def opened(data: bytes) -> Image.Image:
    return on_white(Image.open(io.BytesIO(data)))


def jpeg(image: Image.Image, quality: int = 80) -> bytes:
    saved = io.BytesIO()
    image.convert("RGB").save(saved, "JPEG", quality=quality)
    return saved.getvalue()


def cropped(image: Image.Image, left: float = 0.04, top: float = 0.08, keep: float = 0.9) -> Image.Image:
    """`keep` of each side, from `left` and `top` (shares of the sides) on."""
    box = (left * image.width, top * image.height, (left + keep) * image.width, (top + keep) * image.height)
    return image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]


def write_crawl(out: Path, pictures: Mapping[str, bytes], pairs: Sequence[Mapping[str, Any]] = ()) -> Path:
    """A crawl's out/ with these pictures by URL, in the order given; without `pairs` each has one query."""
    (out / "tars").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    with tarfile.open(out / "tars" / "00000.tar", "w") as tar:
        for number, (url, data) in enumerate(pictures.items()):
            info = tarfile.TarInfo(f"{number:09d}.img")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            width, height = Image.open(io.BytesIO(data)).size
            rows.append({"url": url, "status": "ok", "sha256": hashlib.sha256(data).hexdigest()})
            rows[-1] |= {"width": width, "height": height, "tar": "tars/00000.tar", "bytes": len(data)}
    with tarfile.open(out / "tars" / "00000.tar") as tar:
        for row, member in zip(rows, tar.getmembers(), strict=True):
            row["offset"] = member.offset_data
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / "pictures.parquet")
    asked = list(pairs) or [pair(url, f"query of {url}") for url in pictures]
    pq.write_table(pa.Table.from_pylist(asked), out / "pairs.parquet")
    return out


def pair(url: str, query: str, title: str | None = None, content: str = "") -> dict[str, Any]:
    """A row of pairs.parquet."""
    title = f"title of {url}" if title is None else title
    return {"query": query, "url": url, "title": title, "content": content, "show": 10, "click": 5}
