"""What importers give with a picture beside its queries: captions, classes, licence, and the split of their
own.

Rows of several sources, or of pictures that are equal byte for byte, meet in one record. A caption whose own
split is another than the record's is refused: the captions of a held-out picture must not reach the training.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ibis
import ibis.expr.types as ir

_TYPES = {
    "captions": "array<struct<text: string, lang: string>>",
    "split": "string",
    "classes": "array<string>",
    "licence": "string",
    "source": "string",
}


@dataclass
class Given:
    """What of it goes into a record."""

    captions: list[dict[str, str]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    licence: str | None = None
    refused: int = 0  # captions of other splits


def with_given(pairs: ir.Table) -> ir.Table:
    """The pairs with all columns of an importer: null where a click log has none."""
    absent = {name: ibis.null(kind) for name, kind in _TYPES.items() if name not in pairs.columns}
    return pairs.mutate(**absent) if absent else pairs


def given_of(pairs: ir.Table, fetched: ir.Table) -> ir.Table:
    """Each kept URL's given entries (url and _TYPES), with those of the equal pictures, as one list in the
    order of the rows. `pairs` has `file_row_number`, `fetched` has url and kept_url."""
    said = pairs.filter(pairs.source.notnull())
    joined = said.join(fetched.select("url", "kept_url"), "url")
    one = ibis.struct({name: joined[name] for name in ("url", *_TYPES)})
    return joined.group_by("kept_url").agg(given=one.collect(order_by=joined.file_row_number))


def given_splits(entries: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Of each URL, the splits that sources put its picture into. Where those of a record differ, the first
    rule that takes one of them decides."""
    splits: dict[str, set[str]] = {entry["url"]: set() for entry in entries}
    for entry in entries:
        if entry["split"] is not None:
            splits[entry["url"]].add(entry["split"])
    return splits


def merge_given(entries: list[dict[str, Any]], belongs: Callable[[str, str | None], bool]) -> Given:
    """One record's captions (equal texts once), classes, sources and licence.

    belongs: whether texts of this URL and this source's own split may stand in the record. Classes are those
    of all entries, as they are of the picture itself; licences of what is kept stand side by side.
    """
    given = Given()
    licences: dict[str, None] = {}
    texts: dict[str, dict[str, str]] = {}
    for entry in entries:
        captions = entry["captions"] or []
        given.classes += [name for name in entry["classes"] or [] if name not in given.classes]
        if not belongs(entry["url"], entry["split"]):
            given.refused += len(captions)
            continue
        for caption in captions:
            texts.setdefault(caption["text"], caption)
        licences |= {entry["licence"]: None} if entry["licence"] else {}
        given.sources += [entry["source"]] if entry["source"] not in given.sources else []
    given.captions = list(texts.values())
    given.licence = "; ".join(licences) or None
    return given
