"""Queries and the pictures that answer them: Zero's pre-training set and benchmarks, MUGE's retrieval set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import BadLines, Dropped, Row, Source, member, sure_lines, web_lines
from data_tools.corpora.web import csv_rows
from data_tools.errors import DataError

ZERO_COLUMNS = ("Title", "Content", "ImageQuery", "ImageUrl")


def zero(source: Source) -> Iterator[Row | Dropped]:
    """Zero's entries: Url, Title, Content, Keywords, ImageKey, ImageUrl, ImageQuery, as .csv with a header, a
    JSON list, or JSON a line; Show and Click where a file has them.

    An entry without a query is kept for its title and content. Entries without Show have 0 shows and no CTR.
    """
    for path in source.files["pairs"]:
        for where, entry in _zero_entries(path):
            yield entry if isinstance(entry, Dropped) else _zero_row(path, where, entry)


def _zero_row(path: Path, where: str, entry: dict[str, Any]) -> Row | Dropped:
    query, title, content, url = (
        str(entry.get(name) or "").strip() for name in ("ImageQuery", "Title", "Content", "ImageUrl")
    )
    place = f"{path.name}: {where}"
    if not url:
        return Dropped("no_picture", place, text=query or title)
    if not (query or title or content):
        return Dropped("no_text", place, url=url)
    show, click = (_count(entry.get(name), f"{path}: {where}: '{name}'") for name in ("Show", "Click"))
    if click > show:
        raise DataError(
            f"{path}: {where}: 'Click' {click} is more than 'Show' {show}. Mend or drop the entry."
        )
    return Row(url, query=query, title=title, content=content, show=show, click=click)


def _zero_entries(path: Path) -> Iterator[tuple[str, dict[str, Any] | Dropped]]:
    if path.suffix.lower() == ".csv":
        for number, row in csv_rows(path, ZERO_COLUMNS):
            yield f"line {number}", row
        return
    if _first_character(path) == "[":
        for place, entry in entries(path):
            where = f"[{place}]"
            member(entry, "ImageUrl", str, f"{path}: {where}")
            yield where, entry
        return
    bad, number = BadLines(path, "a JSON object with ImageUrl"), 0
    for number, line in web_lines(path):
        problem, entry = _json_object(line)
        if problem is None and "ImageUrl" not in entry:
            problem = "no 'ImageUrl'"
        yield f"line {number}", bad.drop(number, problem) if problem else entry
    bad.check(number)


def _first_character(path: Path) -> str:
    for _, line in web_lines(path):
        if line is None or line.strip():
            return (line or "").strip()[:1]
    return ""


def _json_object(line: str | None) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with the line, or None and its object."""
    if line is None:
        return "invalid UTF-8", {}
    try:
        found = json.loads(line)
    except ValueError as error:
        return f"invalid JSON ({error})", {}
    return (None, found) if isinstance(found, dict) else ("no JSON object", {})


def _count(value: Any, where: str) -> int:
    text = "0" if value in (None, "") else str(value)
    if not text.isascii() or not text.isdigit():
        raise DataError(f"{where} is {text[:20]!r}, not a whole number from 0.")
    return int(text)


PAIR_SPLITS = ("train", "val", "test")


def zero_pairs(source: Source) -> Iterator[Row | Dropped]:
    """Zero's ICM, IQM, ICR and IQR: {"text", "image_path"} a line, in ICM and IQM "label" too, 1 for a match.

    All pictures lie in one folder, whatever folders `image_path` names. The label goes into the URL, as
    `?match=1` or `?match=0`, of which a shard stage makes a label (`labels`, `pair_labels`).
    """
    for split in PAIR_SPLITS:
        for path in source.files.get(split, ()):
            for number, line in sure_lines(path):
                if line.strip():
                    yield _labelled_pair(source, path, number, line, split)


def _labelled_pair(source: Source, path: Path, number: int, line: str, split: str) -> Row | Dropped:
    where, place = f"{path}: line {number}", f"{path.name}: line {number}"
    problem, entry = _json_object(line)
    if problem:
        raise DataError(f"{where}: {problem}. Fetch the file again.")
    text = member(entry, "text", str, where).strip()
    name = member(entry, "image_path", str, where).strip().rpartition("/")[2]
    label = str(entry.get("label", ""))
    if label not in ("", "0", "1"):
        raise DataError(f"{where}: 'label' is {label[:20]!r}, not 1 (match) or 0.")
    if not name:
        return Dropped("no_picture", place, text=text)
    url = source.url(name) + (f"?match={label}" if label else "")
    return Row(url, captions=(text,), split=split) if text else Dropped("no_text", place, url=url)


def muge(source: Source) -> Iterator[Row | Dropped]:
    """MR_train_queries.jsonl, MR_valid_queries.jsonl: {"query_id", "query_text", "item_ids": […]} a line. The
    picture of an item is `<id>.jpg` under `images`; MR_<split>_imgs.tsv holds them, which the crawl's
    local_site serves.

    A query without items (MR_test_queries.jsonl) has no answer: it is dropped as `no_picture`.
    """
    for path in source.files["queries"]:
        for number, line in sure_lines(path):
            if not line.strip():
                continue
            problem, entry = _json_object(line)
            where = f"{path}: line {number}"
            if problem:
                raise DataError(f"{where}: {problem}. Fetch the file again.")
            text = member(entry, "query_text", str, where).strip()
            items = entry.get("item_ids") or []
            if not isinstance(items, list) or not all(isinstance(item, int | str) for item in items):
                raise DataError(f"{where}: 'item_ids' is {str(items)[:40]!r}, not a list of ids.")
            place = f"{path.name}: line {number}"
            if not text:
                yield Dropped("no_text", place)
            elif not items:
                yield Dropped("no_picture", place, text=text)
            else:
                for item in items:
                    yield Row(source.url(f"{item}.jpg"), query=text)
