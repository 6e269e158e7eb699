"""The crawl: from a list of URLs to tars of pictures as fetched, and one status a URL. Killed anywhere, it
goes on; and it ends by itself, whatever the servers do.

What earlier crawls have is taken over (reuse.py). The rest is cut into pieces (plan.py), which
worker processes (processes.py) or Spark (spark.py) fetch (fetch.py). A piece counts as done when
its tar, Parquet and statistics are there, parse, and hold every URL; any other remains of it are removed and
it is fetched again.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_tools.pictures import PictureRules
from data_tools.web import pieces as crawl_pieces
from data_tools.web import statistics as crawl_statistics
from data_tools.web.opener import Guard, url_problem
from data_tools.web.pieces import DIGITS, SCHEMA
from data_tools.web.plan import NO_LANE, Plan, keep, make_plan
from data_tools.web.politeness import Limits
from data_tools.web.processes import CrawlError, Workers
from data_tools.web.reuse import Terms, reuse
from data_tools.web.settings import FetchSettings

# Each URL has the status ok or exactly one of these.
REASONS = {
    "bad_url": "not http(s), or no host: not tried; or redirected to such",
    "private_address": "the host is of a private, local or reserved network (allow_private is false)",
    "unreachable": "no connection: name, network or protocol error",
    "timeout": "no answer, or no end of it, within timeout_s or request_deadline_s",
    "not_found": "HTTP 404 or 410",
    "too_many_requests": "HTTP 429, after all retries or with a Retry-After beyond retry_after_max_s",
    "http_error": "any other HTTP error, or more than five redirects",
    "robots": "the host's robots.txt disallows it, or cannot be had (5xx)",
    "disallowed": "the site's X-Robots-Tag forbids such use",
    "deadline": "its piece took longer than piece_deadline_s",
    "too_large": "more than max_bytes",
    "not_an_image": "a page, or anything else that is no picture",
    "unsupported_format": "a picture, but not JPEG, PNG or WebP; or packed in an unknown way",
    "bomb": "more than max_pixels",
    "truncated": "a picture that cannot be decoded to its end",
    "stuck": "decoding the picture ended or held up a process, twice",
    "too_small": "a side under min_side_px",
    "bad_aspect": "the longer side over max_aspect times the shorter",
}


_TOGETHER = 200  # statistics of pieces that are held before they are added up


@dataclass(frozen=True)
class CrawlOptions:
    """How to fetch."""

    guard: Guard
    limits: Limits
    robots: bool = True
    distributor: Literal["processes", "spark"] = "processes"
    processes: int = 2
    threads: int = 16
    urls_per_piece: int = 500
    stall_limit_s: float = 120.0

    def terms(self, rules: PictureRules) -> Terms:
        """What a later crawl must know to take pictures over from this one."""
        guard = self.guard
        access = f"{guard.user_agent} {self.robots} {guard.allow_private} {guard.use_proxy}"
        own = guard.mirror.url_prefix if guard.mirror else None
        return Terms(access, rules, guard.max_bytes, own)


@dataclass(frozen=True)
class Crawled:
    """`pictures`: a row a URL, sorted by URL, as SCHEMA says. `statistics`: see crawl_statistics."""

    pictures: pa.Table
    statistics: pa.Table


def crawl(
    urls: pa.ChunkedArray,
    folder: Path,
    rules: PictureRules,
    options: CrawlOptions,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
    earlier: Sequence[Path] = (),
) -> Crawled | None:
    """Fetch all URLs into `folder`/tars. Memory grows with the bytes of the URLs and the rows of the result.

    Args:
        on_progress: called with a number of URLs that are done.
        should_stop: asked before each piece; when true, running pieces are finished and None is returned.
        earlier: folders of other crawls, whose pictures are taken over; the first that has one.

    Raises:
        CrawlError: worker processes die.
        OSError: the disk is full; pieces that were complete stay.
    """
    good, refused = _sorted_out(urls)
    on_progress(refused.num_rows)
    terms = options.terms(rules)
    reused = reuse(good, folder, terms, earlier, on_progress)
    terms.write(folder)
    if reused.num_rows:
        good = good.filter(pc.invert(pc.is_in(good, pc.cast(reused["url"], pa.large_string()))))
    plan = make_plan(good, options.guard.is_own, options.urls_per_piece)
    tars = folder / "tars"
    keep(plan, tars)
    todo = []
    for piece in range(len(plan)):
        if crawl_pieces.is_done(tars, piece, plan.piece(piece).to_pylist()):
            on_progress(plan.size(piece))
        else:
            crawl_pieces.remove(tars, piece)
            todo.append(piece)
    if todo and not _fetch(todo, plan, tars, rules, options, on_progress, should_stop):
        return None
    for leftover in tars.glob(".piece-*"):
        shutil.rmtree(leftover)
    return _collect(tars, len(plan), refused, reused)


def _sorted_out(urls: pa.ChunkedArray) -> tuple[pa.LargeStringArray, pa.Table]:
    """The different URLs, sorted, that can be asked for; and rows of the others."""
    distinct = pc.unique(pc.cast(urls, pa.large_string()))
    distinct = distinct.take(pc.sort_indices(distinct))
    problems: dict[str, str] = {}
    for start in range(0, len(distinct), 100_000):
        for url in distinct.slice(start, 100_000).to_pylist():
            problem = url_problem(url)
            if problem is not None:
                problems[url] = problem
    rows = [{"url": url, "status": "bad_url", "detail": problem} for url, problem in problems.items()]
    bad = pa.array(list(problems), pa.large_string())
    return distinct.filter(pc.invert(pc.is_in(distinct, bad))), pa.Table.from_pylist(rows, SCHEMA)


def _fetch(
    todo: list[int],
    plan: Plan,
    tars: Path,
    rules: PictureRules,
    options: CrawlOptions,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Fetch the pieces of `todo`. Whether all were fetched, not stopped before."""
    lanes = [(piece, int(plan.lanes[piece])) for piece in todo]

    def url_list(piece: int) -> Path:
        return _url_list(tars, piece, plan)

    def on_done(piece: int) -> None:
        on_progress(plan.size(piece))

    settings = FetchSettings(
        tars, rules, options.guard, options.limits, options.robots, options.threads, options.urls_per_piece
    )
    if options.distributor == "spark":
        from data_tools.web import spark as crawl_spark

        return crawl_spark.fetch(lanes, url_list, settings, options.processes, on_done, should_stop)
    most = sum(lane == NO_LANE for _, lane in lanes) + len({lane for _, lane in lanes} - {NO_LANE})
    processes = min(options.processes, most)
    workers = Workers(settings, processes, options.stall_limit_s)
    return workers.run(lanes, url_list, on_done, should_stop)


def _url_list(tars: Path, piece: int, plan: Plan) -> Path:
    """The URLs of one piece for its worker: an Arrow file with a column url, which it removes in the end."""
    path = tars / f".piece-{piece:0{DIGITS}d}-urls" / "urls.feather"
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"url": plan.piece(piece)})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def _collect(tars: Path, pieces: int, refused: pa.Table, reused: pa.Table) -> Crawled:
    """Every URL's status, where its picture lies, and the statistics."""
    tables = [refused, reused]
    statistics = [
        crawl_statistics.of_rows(refused, reused=False),
        crawl_statistics.of_rows(reused, reused=True),
    ]
    for piece in range(pieces):
        rows = crawl_pieces.read_piece(tars, piece)
        statistics.append(crawl_statistics.of_rows(rows, reused=False))
        if len(statistics) > _TOGETHER:
            statistics = [crawl_statistics.joined(statistics)]
        tables.append(rows.select(SCHEMA.names))
    pictures = pa.concat_tables(tables).sort_by("url").combine_chunks()
    return Crawled(pictures, crawl_statistics.joined(statistics))


def require_some(table: pa.Table, folders: Sequence[Path]) -> None:
    """Raise CrawlError for a crawl without a picture. Its tars are removed: the next run asks again."""
    statuses = {row["values"]: row["counts"] for row in pc.value_counts(table["status"]).to_pylist()}
    if statuses.get("ok"):
        return
    for folder in folders:
        shutil.rmtree(folder / "tars", ignore_errors=True)
    said = ", ".join(f"{reason} {count}" for reason, count in Counter(statuses).most_common())
    details = table["detail"].drop_null()
    first = details[0].as_py() if len(details) else ""
    raise CrawlError(
        f"{folders[0] / 'tars'}: not one of {table.num_rows} URLs gave a picture ({said}; the first: "
        f"{first}). Check the network, `local_site` and the size rules, then run again."
    )
