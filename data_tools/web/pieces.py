"""The files of one piece of a crawl: whether they are whole, and what they say.

00012.tar          the pictures as fetched (and img2dataset's JSON of each)
00012.parquet      a row a URL: its reason, its checksum, how long it took
00012_stats.json   img2dataset's statistics, written last
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.pictures import PictureRules

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tar", pa.string()),  # relative to the crawl's folder
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
SECONDS = pa.field("seconds", pa.float32())  # beside SCHEMA until the statistics are made
DIGITS = 5  # of a piece's number in its files' names


def size_problem(width: int, height: int, rules: PictureRules) -> tuple[str, str] | None:
    """Reason and detail against a picture of this size; None: it keeps the rules."""
    if width * height > rules.max_pixels:
        return "bomb", f"{width} x {height} px are more than max_pixels = {rules.max_pixels}"
    if min(width, height) < rules.min_side_px:
        return "too_small", f"{width} x {height} px"
    if max(width, height) > rules.max_aspect * min(width, height):
        return "bad_aspect", f"{width} x {height} px"
    return None


def files_of(tars: Path, piece: int) -> tuple[Path, Path, Path]:
    """The tar, the Parquet and the statistics of a piece."""
    name = f"{piece:0{DIGITS}d}"
    return tars / f"{name}.tar", tars / f"{name}.parquet", tars / f"{name}_stats.json"


def remove(tars: Path, piece: int) -> None:
    """Remove what there is of a piece."""
    for path in reversed(files_of(tars, piece)):
        path.unlink(missing_ok=True)


def is_done(tars: Path, piece: int, urls: list[str] | None = None) -> bool:
    """Whether a piece's files parse and belong together; with `urls`: and hold just these."""
    tar, rows, stats = files_of(tars, piece)
    try:
        count = json.loads(stats.read_text())["count"]
        found = pq.read_table(rows, columns=["url", "reason", "seconds"])
        with tarfile.open(tar) as opened:
            members = sum(not member.name.endswith(".json") for member in opened)
    except (OSError, ValueError, KeyError, pa.ArrowException, tarfile.TarError):
        return False
    if urls is not None and sorted(found["url"].to_pylist()) != sorted(urls):
        return False
    return bool(count == found.num_rows and members == found["reason"].to_pylist().count("ok"))


def read_piece(tars: Path, piece: int) -> pa.Table:
    """The rows of a piece that is done: SCHEMA and `seconds`."""
    tar, rows, _ = files_of(tars, piece)
    with tarfile.open(tar) as opened:
        places = {
            member.name.partition(".")[0]: (member.offset_data, member.size)
            for member in opened
            if not member.name.endswith(".json")
        }
    found: list[dict[str, Any]] = []
    for row in pq.read_table(rows).to_pylist():
        kept = {"url": row["url"], "status": row["reason"], "seconds": row["seconds"]}
        if row["reason"] == "ok":
            offset, size = places[row["key"]]
            kept |= {"tar": f"{tars.name}/{tar.name}", "offset": offset, "bytes": size}
            kept |= {name: row[name] for name in ("sha256", "width", "height")}
        else:
            kept["detail"] = row["error_message"]
        found.append(kept)
    return pa.Table.from_pylist(found, SCHEMA.append(SECONDS))
