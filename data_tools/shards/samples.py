"""The samples of one shard, sound or damaged, with what is wrong: the ground of `shards check` and `repair`.

With an index a sample is its bytes: they are looked for where the index says, and wherever a member has the
sample's name, and must have the index's checksums. Without one a sample is a picture and a JSON record of one
key; checksums are the records' own where most records have their picture's.

What grows with a shard is the list of its members.
"""

import io
import json
import tarfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from data_tools.pictures import PictureError, open_picture
from data_tools.shards.findings import Examined, Place, Sample, safe_name, split_name
from data_tools.shards.format import BLOCK, RECORD_CRC, padded
from data_tools.shards.tar_scan import PLAIN, Header, Member, TarFile, Walk, scan

# What a sample shows: a picture, or a video's features.
SHOWN = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "npy"})
_Test = Callable[["Place", dict[str, Any]], bool]
RECORD_BYTES = 64 << 20  # the largest record, and the largest picture that is decoded
MAX_PIXELS = 100_000_000


def examine(
    file: TarFile, shard: str, rows: list[dict[str, Any]] | None, decode: bool, sha256: str | None = None
) -> Examined:
    """All that can be told of one shard.

    Args:
        shard: what findings call it.
        rows: of the index, those of this shard; None without an index.
        decode: decode every picture that is otherwise sound.
        sha256: of the whole file, as its manifest says.
    """
    found = scan(file)
    made = _Shard(file, found.headers, Examined(shard, found.size, found.sha256), rows, decode)
    walk = Walk(file, found, made.holds)
    made.take(walk.members)
    for fault in walk.faults:
        key = made.key_at(fault.offset, split_name(fault.name)[0] if fault.name else "")
        made.out.say(fault.kind, key, fault.offset, fault.detail)
    if rows is None:
        made.judge_by_records()
    else:
        made.judge_by_index()
    if sha256 not in (None, found.sha256) and not made.out.findings:
        made.say_checksum()
    made.out.findings.sort(key=lambda finding: finding.offset)
    return made.out


class _Shard:
    """The members of a shard by key, and the judgement on each key."""

    def __init__(
        self,
        file: TarFile,
        headers: list[Header],
        out: Examined,
        rows: list[dict[str, Any]] | None,
        decode: bool,
    ) -> None:
        self.out, self._file, self._headers, self._decode = out, file, headers, decode
        self._rows = self._sound_rows(rows or [])
        self._members: dict[str, list[tuple[str, Member]]] = {}  # key: extension, member
        self._order: list[str] = []  # the keys as their members come

    def _sound_rows(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The index's rows by key, but those that tell of no bytes, or of a key once more."""
        sound: dict[str, dict[str, Any]] = {}
        for row in rows:
            numbers = [row[f"{part}_{what}"] for part in ("image", "json") for what in ("offset", "bytes")]
            if not row["key"] or not row["sha256"] or any(n is None or n < 0 for n in numbers):
                self.out.say("index", row["key"] or "", 0, "a row of the index tells of no bytes")
            elif row["key"] in sound:
                self.out.say("duplicate", row["key"], row["image_offset"], "the index has the key twice")
            else:
                sound[row["key"]] = row
        return sound

    def say_checksum(self) -> None:
        """The shard is not the manifest's, and nothing else is wrong with it."""
        if self._rows and all(row.get(RECORD_CRC) is not None for row in self._rows.values()):
            said = "the checksum is not the manifest's; no sample reads what differs"
            self.out.say("bytes", "", 0, said)
        else:
            said = "the checksum is not the manifest's; without checksums of records none can be named"
            self.out.say("checksum", "", 0, said)

    # ------------------------------------------------------------------------------------ members

    def take(self, members: list[Member]) -> None:
        """Sort members by key; those that are no plain files, or whose names lead elsewhere, are told."""
        for member in members:
            key, extension = split_name(member.name)
            if member.type not in PLAIN:
                if member.type != tarfile.DIRTYPE:
                    self.out.say("not_a_file", key, member.header, f"a member of type {member.type!r}")
            elif not safe_name(member.name):
                self.out.lose("name", key, member.header, f"the name '{member.name[:200]}' is not safe")
            else:
                self._members.setdefault(key, []).append((extension, member))
                if not self._order or self._order[-1] != key:
                    self._order.append(key)

    def holds(self, member: Member, followed: bool) -> bool:
        """Whether a member's bytes are its own, though they hold a header.

        Its checksum tells, the index's or the record's; where there is none, that it can be read and that
        the tar goes on where it ends. With an index, a member that is not listed yields to what is in it.
        """
        key, extension = split_name(member.name)
        place, row = Place(member.offset, member.size, extension), self._rows.get(key)
        if row is not None:
            return self._is_record(place, row) if extension == "json" else self._is_picture(place, row)
        if self._rows or extension not in SHOWN | {"json"}:
            return False
        if extension == "json":
            return followed and isinstance(self._json(place), dict)
        told = self._sha256_told.get(key)
        if told and self._sha256(place) == told:
            return True
        return not told and followed and self._undecodable(key, place) is None

    @cached_property
    def _sha256_told(self) -> dict[str, Any]:
        """What records say of their pictures; read only where tars are mixed, as it takes all of them."""
        told: dict[str, Any] = {}
        for header in self._headers:
            key, extension = split_name(header.name)
            if extension == "json":
                record = self._json(Place(header.offset + BLOCK, header.size))
                if isinstance(record, dict):
                    told.setdefault(key, record.get("sha256"))
        return told

    def key_at(self, offset: int, key: str) -> str:
        """The key of the index's sample that a byte belongs to, where none is known."""
        if key:
            return key
        number = bisect_right(self._starts, (offset, "~")) - 1
        if number < 0:
            return ""
        row = self._rows[self._starts[number][1]]
        ends = max(row[f"{part}_offset"] + padded(row[f"{part}_bytes"]) for part in ("image", "json"))
        return str(row["key"]) if offset < ends else ""

    @cached_property
    def _starts(self) -> list[tuple[int, str]]:
        """Where the index has each sample's first header."""
        rows = self._rows.values()
        return sorted((min(row["image_offset"], row["json_offset"]) - BLOCK, row["key"]) for row in rows)

    # -------------------------------------------------------------------------------- with an index

    def judge_by_index(self) -> None:
        told = {finding.key for finding in self.out.findings}
        for row in self._rows.values():
            self._judge_row(row, self._members.pop(row["key"], []), row["key"] in told)
        for key, members in self._members.items():
            self.out.say("unindexed", key, members[0][1].header, "the index has no such sample here")
        self.out.keys = len(self._rows) + len(self._members)
        self._pairs(listed=False)

    def _judge_row(self, row: dict[str, Any], mine: list[tuple[str, Member]], told: bool) -> None:
        """One sample of the index; `mine`: the members of its name; `told`: a fault of it is said already."""
        out, key = self.out, row["key"]
        places = [Place(member.offset, member.size, extension) for extension, member in mine]
        images = [place for place in places if place.extension != "json"]
        records = [place for place in places if place.extension == "json"]
        image = self._find(Place(row["image_offset"], row["image_bytes"]), images, row, self._is_picture)
        record = self._find(Place(row["json_offset"], row["json_bytes"]), records, row, self._is_record)
        if image is None:
            self._lost(key, row["image_offset"], "picture", row["image_bytes"])
        if record is None:
            self._lost(key, row["json_offset"], "record", row["json_bytes"])
        if image is None or record is None or self._damaged_picture(key, image):
            return
        if (image.offset, record.offset) != (row["image_offset"], row["json_offset"]):
            said = f"the index has it at bytes {row['image_offset']:,} and {row['json_offset']:,}"
            out.say("moved", key, image.offset, said)
        elif not told:
            known = {place.offset for place in places}
            for place in (image, record):
                if place.offset not in known:
                    out.say("header", key, place.offset - BLOCK, "no header of its name stands there")
            self._copies(key, mine)
        others = tuple(p for p in images if p.extension not in SHOWN and p.offset != image.offset)
        crc32 = self._crc32(record)
        out.samples.append(Sample(key, image, record, row["sha256"], crc32, listed=True, others=others))

    def _find(self, listed: Place, named: list[Place], row: dict[str, Any], test: _Test) -> Place | None:
        """Where a sample's picture or record is whole: where the index says, else where its name is."""
        for place in sorted(named, key=lambda place: place.offset != listed.offset):
            if test(place, row):
                return place
        return listed if test(listed, row) else None

    def _is_picture(self, place: Place, row: dict[str, Any]) -> bool:
        return place.size == row["image_bytes"] and self._sha256(place) == row["sha256"]

    def _is_record(self, place: Place, row: dict[str, Any]) -> bool:
        """By its CRC, or, under an index without one, by what it says."""
        if place.size != row["json_bytes"]:
            return False
        if row.get(RECORD_CRC) is not None:
            return bool(self._crc32(place) == row[RECORD_CRC])
        record = self._json(place)
        return isinstance(record, dict) and all(record.get(name) == row[name] for name in ("key", "sha256"))

    def _lost(self, key: str, offset: int, what: str, size: int) -> None:
        if offset + size > self._file.size:
            self.out.lose("truncated", key, offset, f"the {what} lies beyond the file's end")
        else:
            self.out.lose("data", key, offset, f"the {what} is not the one that the index's checksum tells")

    def _copies(self, key: str, mine: list[tuple[str, Member]]) -> None:
        """A key whose members are not two: said once."""
        counts = Counter(extension for extension, _ in mine)
        more = [extension for extension, count in counts.items() if count > 1]
        if more:
            last = max(member.header for extension, member in mine if extension in more)
            self.out.say("duplicate", key, last, f"{counts[more[0]]} members {key}.{more[0]}")

    # ----------------------------------------------------------------------------- without an index

    def judge_by_records(self) -> None:
        self.out.keys = len(self._members)
        self._pairs(listed=True)
        told = {finding.key for finding in self.out.findings if finding.kind.startswith("duplicate")}
        for key, places in Counter(self._order).items():
            if places > 1 and key not in told:
                offset = self._members[key][-1][1].header
                self.out.say("interleaved", key, offset, f"its members stand at {places} places")

    def _pairs(self, listed: bool) -> None:
        """A picture and a record of each key that is left; checksums where most records tell them."""
        found: list[tuple[Sample, bool | None]] = []
        usual = self._usual_extensions() if listed else frozenset[str]()
        for key, members in self._members.items():
            for missing in sorted(usual - {extension for extension, _ in members} - SHOWN - {"json"}):
                self.out.say("partner", key, members[0][1].header, f"{key}.{missing} is missing")
            found += self._pair(key, members, listed)
        told = [agrees for _, agrees in found if agrees is not None]
        trusted = 2 * sum(told) > len(told)  # img2dataset tells of the picture before it made it smaller
        for sample, agrees in found:
            if trusted and agrees is False:
                self.out.lose(
                    "data", sample.key, sample.image.offset, "not the picture of the record's checksum"
                )
            elif not self._damaged_picture(sample.key, sample.image):
                self.out.samples.append(sample)

    def _usual_extensions(self) -> frozenset[str]:
        """What more than half of the samples have beside a picture."""
        counts = Counter(e for members in self._members.values() for e in {e for e, _ in members})
        return frozenset(e for e, count in counts.items() if 2 * count > len(self._members))

    def _pair(
        self, key: str, members: list[tuple[str, Member]], listed: bool
    ) -> Iterator[tuple[Sample, bool | None]]:
        """The sample, and whether its record's checksum is its picture's; nothing where it has no two."""
        places = [Place(m.offset, m.size, extension) for extension, m in members]
        pictures = [p for p in places if p.extension in SHOWN]
        same = [p for p in pictures if p.extension == pictures[0].extension]
        record = self._one_of(key, [p for p in places if p.extension == "json"], self._reads)
        told = None if record is None else self._json(record)
        wanted = told.get("sha256") if isinstance(told, dict) else None
        image = self._one_of(
            key, same, lambda place: self._sha256(place) == wanted, partial(self._opens, key)
        )
        start = members[0][1].header
        if image is None or record is None:
            what = " and no ".join(n for n, p in (("picture", image), ("record", record)) if p is None)
            self.out.lose("partner", key, start, f"it has no {what}")
            return
        if not isinstance(told, dict):
            self.out.lose("record", key, record.offset, "the record is no JSON object")
            return
        if told.get("key", key) != key:
            self.out.lose("record", key, record.offset, f"the record's key is {str(told['key'])[:100]!r}")
            return
        sha256 = self._sha256(image)
        agrees = wanted == sha256 if wanted else None
        first = {p.extension: p for p in reversed(places) if p.extension not in (image.extension, "json")}
        others = tuple(sorted(first.values(), key=lambda place: place.offset))
        yield Sample(key, image, record, sha256, self._crc32(record), listed, others), agrees

    def _one_of(self, key: str, places: list[Place], *sound: Callable[[Place], bool]) -> Place | None:
        """The only one; of several the first that the first test holds sound, or the next test.

        It is said that there are several, and whether their bytes differ.
        """
        if len(places) < 2:
            return places[0] if places else None
        sums = {self._sha256(place) for place in places}
        said = "with equal bytes" if len(sums) == 1 else "with bytes that differ"
        names = "two" if len(places) == 2 else str(len(places))
        where = ", ".join(str(place.offset) for place in places[:10])
        kind = "duplicate" if len(sums) == 1 else "duplicate_differs"
        self.out.say(
            kind, key, places[1].offset, f"{names} of {key}.{places[0].extension} at {where}, {said}"
        )
        return next((place for test in sound for place in places if test(place)), places[0])

    def _reads(self, place: Place) -> bool:
        return isinstance(self._json(place), dict)

    def _opens(self, key: str, place: Place) -> bool:
        return self._undecodable(key, place) is None

    # ------------------------------------------------------------------------------------ bytes

    def _damaged_picture(self, key: str, image: Place) -> bool:
        """Whether it cannot be decoded, where that was asked for; the sample is lost then."""
        said = self._undecodable(key, image) if self._decode else None
        if said is not None:
            self.out.lose("undecodable", key, image.offset, said)
        return said is not None

    def _undecodable(self, key: str, place: Place) -> str | None:
        if place.size > RECORD_BYTES:
            return f"{place.size:,} bytes are more than a picture of {RECORD_BYTES:,} that is decoded"
        data = self._file.read(place.offset, place.size)
        try:
            if data.startswith(b"\x93NUMPY"):
                np.load(io.BytesIO(data), allow_pickle=False)
            else:
                open_picture(data, max_pixels=MAX_PIXELS, name=key)
        except PictureError as error:
            return f"{error.reason}: {error.detail}"
        except (ValueError, EOFError, SyntaxError, MemoryError) as error:
            return f"features: {error}"
        return None

    def _json(self, place: Place) -> Any:
        """What a record's bytes mean; None where they are no JSON."""
        if place.size > RECORD_BYTES:
            return None
        try:
            return json.loads(self._file.read(place.offset, place.size))
        except (ValueError, RecursionError):
            return None

    def _sha256(self, place: Place) -> str:
        return self._file.sha256(place.offset, place.size)

    def _crc32(self, place: Place) -> int:
        return zlib.crc32(self._file.read(place.offset, min(place.size, RECORD_BYTES)))
