"""What earlier crawls fetched is not asked for again: their pictures, and their failures that are for good.

A changed rule of the filter, or of the pictures, gives the crawl a new directory beside the earlier ones.
Tars of those are taken over by hard links (copies where there can be none), and each picture that is used is
checked by its sha256. The result is that of a crawl that fetches: only directories that were allowed to ask
the same are looked at, pictures go through the present rules, and a failure counts only where the rules were
the same.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.pictures import PictureRules
from data_tools.web import pieces as crawl_pieces
from data_tools.web.pieces import SCHEMA, size_problem

PICTURES = "pictures.parquet"  # the table of a crawl that is done
_TERMS = "fetched_under.json"
_TABLE = "reused.parquet"
# What another try would not change, as long as the rules and the site are the same.
_FOR_GOOD = {
    "not_found",
    "disallowed",
    "too_large",
    "not_an_image",
    "unsupported_format",
    "bomb",
    "too_small",
    "bad_aspect",
}
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS}
_BATCH = 10_000


@dataclass(frozen=True)
class Terms:
    """Under what a crawl fetched. Pictures need equal `access`; failures all of it."""

    access: str  # what decides whether a URL may be asked for
    rules: PictureRules
    max_bytes: int
    own: str | None  # the prefix of the stage's own site: its folder may have changed, it is asked again

    def write(self, folder: Path) -> None:
        """Note them in a crawl's folder, for the crawls after it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_TERMS}.tmp").write_text(json.dumps(asdict(self)))
        (folder / f"{_TERMS}.tmp").replace(folder / _TERMS)

    @classmethod
    def read(cls, folder: Path) -> "Terms | None":
        """Those of a crawl's folder; None where none are noted, or not as this version writes them."""
        try:
            content = json.loads((folder / _TERMS).read_text())
            return cls(**content | {"rules": PictureRules(**content["rules"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none (between file systems, or with too many of one file)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").replace(target)


def reuse(
    urls: pa.LargeStringArray,
    folder: Path,
    terms: Terms,
    earlier: Sequence[Path],
    on_progress: Callable[[int], None],
) -> pa.Table:
    """Rows (SCHEMA) of those of `urls` that the crawls in the folders `earlier` have; the first that has one.

    Found once: a crawl that goes on reads what it found in the beginning. Tars are linked into `folder`/tars.
    Memory grows with the rows of one earlier crawl, and with those that are used.

    Raises:
        OSError: `folder` cannot be written.
    """
    known = _found_before(urls, folder, terms)
    if known is not None:
        on_progress(known.num_rows)
        return known
    shutil.rmtree(folder / "tars", ignore_errors=True)
    (folder / "tars").mkdir(parents=True)
    parts = [SCHEMA.empty_table()]
    left = urls if terms.own is None else urls.filter(pc.invert(pc.starts_with(urls, terms.own)))
    tars = 0
    for crawl in earlier:
        theirs = Terms.read(crawl)
        if theirs is None or theirs.access != terms.access or not len(left):
            continue
        usable = _checked(_usable(_wanted(crawl, left), theirs, terms), crawl, on_progress)
        moved, tars = _linked(usable, crawl, folder, tars)
        parts.append(moved)
        left = left.filter(pc.invert(pc.is_in(left, pc.cast(moved["url"], pa.large_string()))))
    found = pa.concat_tables(parts)
    pq.write_table(found, folder / "tars" / f"{_TABLE}.tmp")
    (folder / "tars" / f"{_TABLE}.tmp").replace(folder / "tars" / _TABLE)
    return found


def _found_before(urls: pa.LargeStringArray, folder: Path, terms: Terms) -> pa.Table | None:
    """What an earlier start of this crawl found; None if there was none, or not of this crawl."""
    if Terms.read(folder) != terms:
        return None
    try:
        found = pq.read_table(folder / "tars" / _TABLE, schema=SCHEMA)
    except (OSError, pa.ArrowException):
        return None
    there = all((folder / name).is_file() for name in pc.unique(found["tar"].drop_null()).to_pylist())
    ours = pc.all(pc.is_in(pc.cast(found["url"], pa.large_string()), urls), min_count=0).as_py()
    return found if there and ours else None


def _wanted(crawl: Path, urls: pa.LargeStringArray) -> pa.RecordBatchReader:
    """Rows of a crawl whose URL is among `urls`, joined by DuckDB as a stream."""
    connection = duckdb.connect()
    connection.register("wanted", pa.table({"url": urls}))
    connection.register("theirs", pa.RecordBatchReader.from_batches(SCHEMA, _rows_of(crawl)))
    return connection.sql("FROM theirs SEMI JOIN wanted USING (url)").to_arrow_reader(_BATCH)


def _rows_of(crawl: Path) -> Iterator[pa.RecordBatch]:
    """Rows of a crawl: its table; without one, what it took over and its pieces that are done."""
    try:
        with pq.ParquetFile(crawl / PICTURES) as file:
            if file.schema_arrow.equals(SCHEMA):
                yield from file.iter_batches(_BATCH)
                return
    except (OSError, pa.ArrowException):  # it is not done
        pass
    with suppress(OSError, pa.ArrowException):
        yield from pq.read_table(crawl / "tars" / _TABLE, schema=SCHEMA).to_batches()
    for path in sorted((crawl / "tars").glob("*_stats.json")):
        piece = int(path.name.partition("_")[0])
        if crawl_pieces.is_done(crawl / "tars", piece):
            yield from crawl_pieces.read_piece(crawl / "tars", piece).select(SCHEMA.names).to_batches()


def _usable(rows: pa.RecordBatchReader, theirs: Terms, ours: Terms) -> Iterator[pa.Table]:
    """Their rows as ours: pictures by our rules; failures for good, under the same rules."""
    same = (theirs.rules, theirs.max_bytes) == (ours.rules, ours.max_bytes)
    for batch in rows:
        found = []
        for row in batch.to_pylist():
            if theirs.own is not None and row["url"].startswith(theirs.own):
                continue
            if row["status"] == "ok":
                problem = size_problem(row["width"], row["height"], ours.rules)
                if row["bytes"] > ours.max_bytes:
                    problem = "too_large", f"{row['bytes']} bytes are more than {ours.max_bytes}"
                if problem is not None:
                    row = {"url": row["url"], "status": problem[0], "detail": problem[1]}
                found.append(row)
            elif same and _is_for_good(row["status"], row["detail"] or ""):
                found.append(row)
        yield pa.Table.from_pylist(found, SCHEMA)


def _is_for_good(status: str, detail: str) -> bool:
    return status in _FOR_GOOD or (
        status == "http_error" and re.match(r"HTTP Error 4(?!08|25|29)\d\d", detail) is not None
    )


def _checked(tables: Iterable[pa.Table], crawl: Path, on_progress: Callable[[int], None]) -> pa.Table:
    """The rows less the pictures whose bytes are not there or have changed."""
    good = [SCHEMA.empty_table()]
    for rows in tables:
        rows = rows.sort_by([("tar", "ascending"), ("offset", "ascending")])
        fine = [row["tar"] is None or _is_whole(crawl, row) for row in rows.to_pylist()]
        good.append(rows.filter(pa.array(fine, pa.bool_())))
        on_progress(sum(fine))
    return pa.concat_tables(good)


def _is_whole(crawl: Path, row: dict[str, object]) -> bool:
    try:
        with (crawl / str(row["tar"])).open("rb") as tar:
            tar.seek(int(str(row["offset"])))
            data = tar.read(int(str(row["bytes"])))
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == row["sha256"]


def _linked(rows: pa.Table, crawl: Path, folder: Path, tars: int) -> tuple[pa.Table, int]:
    """The rows with their tars linked into `folder`; how many tars there are now."""
    moved: dict[str, str] = {}
    for name in pc.unique(rows["tar"].drop_null()).to_pylist():
        moved[name] = f"tars/reused-{tars:05d}.tar"
        link(crawl / name, folder / moved[name])
        tars += 1
    names = pa.array([moved.get(name) for name in rows["tar"].to_pylist()], pa.string())
    return rows.set_column(SCHEMA.get_field_index("tar"), "tar", names), tars
