"""From pairs and crawled pictures to records: one a picture, with all its titles, contents and queries, in
the order of keys.

A picture's title and content are those of its row with the most shows; where its rows have others too (a page
that changed, a picture on several pages), these follow in other_titles and other_contents.

Pictures that are equal byte for byte (sha256) become one record: that of the first URL in sorted order, into
which the queries of the others are merged (a query's shows and clicks add up), and what importers gave with
them (given.py). So do near duplicates, where the clean stage found them: their `same_as` is the sha256 of the
picture that is kept. Nothing else of the others is kept, and no query whose URL's labels, or whose source's
own split, belong to another split: the texts of a held-out concept must not reach the training.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.given import Given, given_of, with_given

RECORD = (
    "key",
    "url",
    "title",
    "content",
    "titles",
    "contents",
    "sha256",
    "width",
    "height",
    "tar",
    "offset",
    "bytes",
    "queries",
    "given",
)
KEY_DIGITS = 20  # hexadecimal digits of the URL's sha256: 80 bits, no collision to fear among billions


@dataclass(frozen=True)
class Languages:
    """What a text's script says about its language: codes for texts of Han characters, and for all others."""

    han: str = "zh"
    other: str = "en"

    def of(self, text: str) -> str:
        """`han` if any character is Han, and `other` if none is."""
        return self.han if any("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in text) else self.other


def read_records(crawl_out: Path, scratch: Path) -> tuple[Iterator[dict[str, Any]], int, pa.Table]:
    """Records in the order of their keys, as a stream; how many there are; and the duplicates (url, kept_url,
    sha256).

    Everything is joined and sorted by DuckDB, which spills to disk, into the file `scratch`; that is then
    streamed. A record has key, url, title, content, titles, contents (all of them, those of the most shows
    first), sha256, width, height, tar, offset, bytes, and queries: a list of text, url (of the equal picture
    that it came from), split (the source's), show, click in the order of texts and URLs; and given: what
    importers gave, in the order of their rows.
    """
    connection = ibis.duckdb.connect()
    pictures = connection.read_parquet(crawl_out / "pictures.parquet")
    pairs = with_given(connection.read_parquet(crawl_out / "pairs.parquet", file_row_number=True))
    if "same_as" not in pictures.columns:
        pictures = pictures.mutate(same_as=ibis.null("string"))
    fetched = pictures.filter((pictures.status == "ok") | pictures.same_as.notnull())
    fetched = fetched.mutate(shown_=ibis.coalesce(fetched.same_as, fetched.sha256))
    first = fetched.url.min(where=fetched.status == "ok").over(group_by=fetched.shown_)
    fetched = fetched.mutate(kept_url=first)
    kept = fetched.filter(fetched.url == fetched.kept_url)
    kept = kept.mutate(key=kept.url.hexdigest("sha256").left(KEY_DIGITS))
    duplicates = (
        fetched.filter((fetched.status == "ok") & (fetched.url != fetched.kept_url))
        .select("url", "kept_url", "sha256")
        .order_by("url")
    )
    records = (
        kept.left_join(_pages(pairs), "url")
        .left_join(_all_of(pairs, "title"), "url")
        .left_join(_all_of(pairs, "content"), "url")
        .left_join(_queries(pairs, fetched), "kept_url")
        .drop("kept_url_right")
        .left_join(given_of(pairs, fetched), "kept_url")
        .select(RECORD)
        .order_by("key")
    )
    count = int(connection.execute(kept.count()))
    connection.to_parquet(records, scratch)
    return _stream(scratch), count, connection.to_pyarrow(duplicates)


def _pages(pairs: ir.Table) -> ir.Table:
    """Title and content of each URL, from its row with the most shows; ties go to the smaller texts."""
    best = ibis.row_number().over(
        group_by=pairs.url, order_by=[pairs.show.desc(), pairs.title, pairs.content]
    )
    first = pairs.mutate(place_=best)
    return first.filter(first.place_ == 0).select("url", "title", "content")


def _all_of(pairs: ir.Table, column: str) -> ir.Table:
    """Each URL's different texts of a column as one list, those of the most shows first."""
    texts = pairs.filter(pairs[column].fill_null("") != "")
    each = texts.group_by("url", column).agg(most=texts.show.max())
    return each.group_by("url").agg(
        **{f"{column}s": each[column].collect(order_by=[each.most.desc(), each[column]])}
    )


def _queries(pairs: ir.Table, fetched: ir.Table) -> ir.Table:
    """Each kept URL's queries, with those of the equal pictures, as one list."""
    asked = pairs.filter(pairs["query"].fill_null("") != "")
    joined = asked.join(fetched.select("url", "kept_url"), "url")
    one = ibis.struct(
        {
            "text": joined["query"],
            "url": joined.url,
            "split": joined.split,
            "show": joined.show,
            "click": joined.click,
        }
    )
    return joined.group_by("kept_url").agg(queries=one.collect(order_by=[joined["query"], joined.url]))


def _stream(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=1000)
        yield from _rows(batches)


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in batch.to_pylist():
            row["queries"], row["given"] = row["queries"] or [], row["given"] or []
            yield row


def merge_queries(
    queries: list[dict[str, Any]], belongs: Callable[[str, str | None], bool]
) -> tuple[list[dict[str, Any]], int]:
    """Queries whose URL and source's split `belongs` accepts, equal texts added up; and how many it
    refused."""
    merged: dict[str, dict[str, Any]] = {}
    refused = 0
    for query in queries:
        if not belongs(query["url"], query["split"]):
            refused += 1
            continue
        found = merged.setdefault(query["text"], {"text": query["text"], "show": 0, "click": 0})
        found["show"] += query["show"]
        found["click"] += query["click"]
    return list(merged.values()), refused


def record_json(
    row: dict[str, Any], labels: dict[str, str], split: str, licence: str, languages: Languages, given: Given
) -> dict[str, Any]:
    """What a shard's <key>.json holds. show and click are sums over the queries; ctr is null without any.
    lang is that of the title, else of the content, else of the first caption."""
    queries = [
        {"text": q["text"], "lang": languages.of(q["text"]), **_rates(q["show"], q["click"])}
        for q in row["queries"]
    ]
    show, click = (sum(int(q[name]) for q in row["queries"]) for name in ("show", "click"))
    title, content = row["title"] or "", row["content"] or ""
    return {
        "key": row["key"],
        "title": title,
        "content": content,
        "other_titles": [text for text in row["titles"] or () if text != title],
        "other_contents": [text for text in row["contents"] or () if text != content],
        "queries": queries,
        "captions": given.captions,
        "lang": languages.of(title or content)
        if title or content or not given.captions
        else given.captions[0]["lang"],
        **_rates(show, click),
        "url": row["url"],
        "sha256": row["sha256"],
        "width": row["width"],
        "height": row["height"],
        "labels": labels,
        "classes": given.classes,
        "sources": given.sources,
        "licence": licence,
        "split": split,
    }


def _rates(show: int, click: int) -> dict[str, float | int | None]:
    return {"show": int(show), "click": int(click), "ctr": click / show if show else None}
