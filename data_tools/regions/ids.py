"""Which entry of feature files belongs to which sample: by an id that both name."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_tools.regions.store import RegionError

_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"([0-9]+)$")


def compile_id(pattern: str | None) -> re.Pattern[str] | None:
    """The regular expression on a picture's URL whose group `id` is its id; RegionError where it is wrong."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RegionError(f"id: '{pattern}' is no regular expression: {error}") from error
    if "id" not in compiled.groupindex:
        raise RegionError(f"id: '{pattern}' has no group (?P<id>...)")
    return compiled


def plain_id(text: str) -> str:
    """An id as it is compared: no folders, no ending of a picture; a number without leading zeros."""
    name = _PICTURE.sub("", PurePosixPath(text.strip()).name)
    return str(int(name)) if name.isascii() and name.isdigit() else name


def ids_of_sample(record: Mapping[str, Any], pattern: re.Pattern[str] | None) -> Iterator[str]:
    """The ids that a sample may have in the files, the likeliest first.

    By `pattern` on its URL; without one the URL's file name, and the number that it ends with:
    COCO_val2014_000000391895.jpg is 391895 too. A record without a URL goes by its key.
    """
    url = str(record.get("url") or record["key"]).split("?")[0].split("#")[0]
    if pattern is not None:
        found = pattern.search(url)
        if found and found["id"]:
            yield plain_id(found["id"])
        return
    name = plain_id(url)
    yield name
    number = _LAST_NUMBER.search(name)
    if number and number[1] != name:
        yield plain_id(number[1])


@dataclass
class Entries:
    """Entries of feature files by id: entry → (part, place in it)."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, part: int, ids: Iterable[str], where: str) -> None:
        """The ids of a part, in the order of its entries. RegionError for one that stands twice."""
        for place, text in enumerate(ids):
            own = plain_id(text)
            if not own:
                raise RegionError(f"{where}: the id of entry {place} is empty; give one a picture")
            if own in self.places:
                raise RegionError(
                    f"{where}: entry {place}: the id '{own}' stands a second time; leave one of them out, or "
                    "set `repeats` where each picture has several entries"
                )
            self.places[own] = (part, place)


def match(
    entries: Entries, records: Iterable[Mapping[str, Any]], pattern: re.Pattern[str] | None
) -> list[tuple[int, int] | None]:
    """For each sample (part, place), or None. RegionError where two samples claim one entry."""
    found: list[tuple[int, int] | None] = []
    taken: dict[tuple[int, int], str] = {}
    for record in records:
        ids = ids_of_sample(record, pattern)
        place = next((entries.places[one] for one in ids if one in entries.places), None)
        if place is not None and place in taken:
            raise RegionError(
                f"id: samples {taken[place]} and {record['key']} both go by the same id; give an expression "
                "`id` that tells them apart"
            )
        if place is not None:
            taken[place] = str(record["key"])
        found.append(place)
    return found


def collapsed(ids: Sequence[str], repeats: int, where: str) -> list[str]:
    """One id of each `repeats` that follow each other; RegionError where these differ."""
    if len(ids) % repeats:
        raise RegionError(f"{where}: {len(ids)} ids are no multiple of repeats: {repeats}")
    for place in range(0, len(ids), repeats):
        group = ids[place : place + repeats]
        if len(set(group)) > 1:
            raise RegionError(
                f"{where}: ids {place} … {place + repeats - 1} are not the same ('{group[0]}', …); set "
                "repeats to the number of entries that each picture has"
            )
    return list(ids[::repeats])
