"""The crawl: from a list of URLs to tars of pictures as fetched, and one status a URL. Killed anywhere, it
goes on.

The sorted URLs are cut into pieces; img2dataset (in worker processes, see fetch.py) fetches a piece at a
time. A piece counts as done when its tar, Parquet and statistics are there, parse, and hold every URL; any
other remains of it are removed and it is fetched again.
"""

import hashlib
import json
import multiprocessing
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError
from data_tools.opener import Guard, failure_reason, url_problem
from data_tools.pictures import PictureRules

# Each URL has the status ok or exactly one of these.
REASONS = {
    "bad_url": "not http(s), or no host: not tried",
    "private_address": "the host is of a private, local or reserved network (allow_private is false)",
    "unreachable": "no connection: name, network or protocol error",
    "timeout": "no answer, or no end of it, within timeout_s",
    "not_found": "HTTP 404 or 410",
    "http_error": "any other HTTP error",
    "disallowed": "the site's X-Robots-Tag forbids such use",
    "too_large": "more than max_bytes",
    "not_an_image": "a page, or anything else that is no picture",
    "unsupported_format": "a picture, but not JPEG, PNG or WebP",
    "bomb": "more than max_pixels",
    "truncated": "a picture that cannot be decoded to its end",
    "too_small": "a side under min_side_px",
    "bad_aspect": "the longer side over max_aspect times the shorter",
}

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


class CrawlError(DataError):
    """A crawl that cannot go on."""


@dataclass(frozen=True)
class CrawlOptions:
    """How to fetch; none of it changes what a reachable web gives, but for the guard's limits."""

    guard: Guard
    processes: int = 2
    threads: int = 16
    retries: int = 1
    urls_per_piece: int = 500


def crawl(
    urls: list[str],
    folder: Path,
    rules: PictureRules,
    options: CrawlOptions,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> pa.Table | None:
    """Fetch all URLs into `folder`/tars; the table has one row a URL, sorted by URL, as SCHEMA says.

    Args:
        on_progress: called with a number of URLs that are done.
        should_stop: asked between pieces; when true, running pieces are finished and None is returned.

    Raises:
        CrawlError: a worker died.
        OSError: the disk is full; pieces that were complete stay.
    """
    refused = {url: problem for url in sorted(set(urls)) if (problem := url_problem(url)) is not None}
    good = [url for url in sorted(set(urls)) if url not in refused]
    on_progress(len(refused))
    tars = folder / "tars"
    pieces = _prepare(tars, good, options.urls_per_piece)
    todo = [i for i, piece in enumerate(pieces) if not _is_done(tars, i, piece)]
    on_progress(len(good) - sum(len(pieces[i]) for i in todo))
    for i in todo:
        _remove_piece(tars, i)
    if todo and not _fetch(todo, pieces, tars, rules, options, on_progress, should_stop):
        return None
    for leftover in tars.glob(".piece-*"):
        shutil.rmtree(leftover)
    return _collect(folder, pieces, refused)


def _prepare(tars: Path, urls: list[str], per_piece: int) -> list[list[str]]:
    """Cut the URLs into pieces; remains of a crawl of other URLs or other pieces are removed."""
    pieces = [urls[i : i + per_piece] for i in range(0, len(urls), per_piece)]
    plan = json.dumps(
        {"urls": hashlib.sha256("\n".join(urls).encode()).hexdigest(), "urls_per_piece": per_piece}
    )
    path = tars / "plan.txt"
    if not path.is_file() or path.read_text() != plan:
        shutil.rmtree(tars, ignore_errors=True)
        tars.mkdir(parents=True)
        unfinished = tars / "plan.tmp"
        unfinished.write_text(plan)
        unfinished.replace(path)
    for leftover in tars.glob(".piece-*"):
        shutil.rmtree(leftover)
    return pieces


def _files(tars: Path, piece: int) -> tuple[Path, Path, Path]:
    return tars / f"{piece:05d}.tar", tars / f"{piece:05d}.parquet", tars / f"{piece:05d}_stats.json"


def _remove_piece(tars: Path, piece: int) -> None:
    for path in reversed(_files(tars, piece)):
        path.unlink(missing_ok=True)


def _is_done(tars: Path, piece: int, urls: list[str]) -> bool:
    tar, rows, stats = _files(tars, piece)
    try:
        count = json.loads(stats.read_text())["count"]
        found = pq.read_table(rows, columns=["url", "status"])
        with tarfile.open(tar) as opened:
            members = sum(not member.name.endswith(".json") for member in opened)
    except (OSError, ValueError, KeyError, pa.ArrowException, tarfile.TarError):
        return False
    successes = found["status"].to_pylist().count("success")
    return count == len(urls) and sorted(found["url"].to_pylist()) == urls and members == successes


def _fetch(
    todo: list[int],
    pieces: list[list[str]],
    tars: Path,
    rules: PictureRules,
    options: CrawlOptions,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Fetch the pieces of `todo` in worker processes. Whether all were fetched, not stopped before."""
    arguments = (tars, rules, options.guard, options.threads, options.retries, options.urls_per_piece)
    context = multiprocessing.get_context("spawn")
    left, running = list(reversed(todo)), dict[Future[int], int]()
    with ProcessPoolExecutor(
        min(options.processes, len(todo)), context, initializer=_start_worker, initargs=arguments
    ) as pool:
        while left or running:
            while left and len(running) < options.processes and not should_stop():
                piece = left.pop()
                running[pool.submit(_fetch_piece, piece, _url_list(tars, piece, pieces[piece]))] = piece
            if not running:
                return False
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                piece = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise CrawlError(
                        f"{tars}: a crawl process was killed while fetching piece {piece} (out of memory?). "
                        "Finished pieces are kept: run again, with fewer `processes` or `threads`."
                    ) from error
                on_progress(len(pieces[piece]))
    return True


def _start_worker(*arguments: Any) -> None:
    from data_tools import fetch  # img2dataset takes seconds to import: in the workers alone

    fetch.start_worker(*arguments)


def _fetch_piece(piece: int, url_list: str) -> int:
    from data_tools import fetch

    return fetch.fetch_piece(piece, url_list)


def _url_list(tars: Path, piece: int, urls: list[str]) -> str:
    """img2dataset's input of one piece: an Arrow file with a column url, which it removes in the end."""
    path = tars / f".piece-{piece:05d}-urls"
    path.mkdir(exist_ok=True)
    table = pa.table({"url": pa.array(urls, pa.string())})
    with pa.ipc.new_file(str(path / "urls.feather"), table.schema) as writer:
        writer.write_table(table)
    return str(path / "urls.feather")


def _collect(folder: Path, pieces: list[list[str]], refused: dict[str, str]) -> pa.Table:
    """Every URL's status, and where its picture lies."""
    rows: list[dict[str, Any]] = [
        {"url": url, "status": "bad_url", "detail": problem} for url, problem in refused.items()
    ]
    for i in range(len(pieces)):
        tar, parquet, _ = _files(folder / "tars", i)
        with tarfile.open(tar) as opened:
            places = {
                member.name.partition(".")[0]: (member.offset_data, member.size)
                for member in opened
                if not member.name.endswith(".json")
            }
        for row in pq.read_table(parquet).to_pylist():
            if row["status"] == "success":
                offset, size = places[row["key"]]
                found = {"status": "ok", "tar": f"tars/{tar.name}", "offset": offset, "bytes": size}
                found |= {name: row[name] for name in ("sha256", "width", "height")}
            elif row["status"] == "failed_to_resize":  # the look at the picture: "reason: detail"
                reason, _, detail = row["error_message"].partition(": ")
                found = {"status": reason, "detail": detail}
            else:
                found = {"status": failure_reason(row["error_message"]), "detail": row["error_message"]}
            rows.append({"url": row["url"], **found})
    rows.sort(key=lambda row: str(row["url"]))
    return pa.Table.from_pylist(rows, SCHEMA)


def require_some(table: pa.Table, folders: Sequence[Path]) -> None:
    """Raise CrawlError for a crawl without a picture. Its tars are removed: the next run asks again."""
    statuses = Counter(table["status"].to_pylist())
    if statuses["ok"]:
        return
    for folder in folders:
        shutil.rmtree(folder / "tars", ignore_errors=True)
    said = ", ".join(f"{reason} {count}" for reason, count in statuses.most_common())
    first = next((detail for detail in table["detail"].to_pylist() if detail), "")
    raise CrawlError(
        f"{folders[0] / 'tars'}: not one of {table.num_rows} URLs gave a picture ({said}; the first: "
        f"{first}). Check the network, `local_site` and the size rules, then run again."
    )
