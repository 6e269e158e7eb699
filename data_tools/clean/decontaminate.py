"""Decontamination: what a model is evaluated on is taken out of what it is trained on.

Works between the records (records.py) and the shards: the file of records is read once to see whose split
each is, and written again without what leaked. A record whose picture is one of a held-out set, be it
resaved, resized, cropped or mirrored, is dropped (`leaked_picture`). A text that is one of theirs
(text_forms.py) is taken out of the record, be it a title, a content, a query or a caption; a record of which
no text is left is dropped (`leaked_text`).

Memory: some 90 bytes a record and the hashes of all pictures (112 bytes each), so 23 million records take 5
GB.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.clean.fingerprint_files import FingerprintError, Opened
from data_tools.clean.held_out import HeldOut, HeldOutSet, add_texts, texts_of
from data_tools.clean.near_duplicates import Pictures, matches
from data_tools.clean.same_picture import Limits
from data_tools.given import merge_given
from data_tools.record_splits import COLUMNS, RecordSplits
from data_tools.text_forms import text_key

REASONS = {
    "leaked_picture": "the picture is one of a set that is evaluated on, or a near duplicate of one",
    "leaked_text": "no text is left once those of the sets that are evaluated on are taken out",
}
_BATCH = 1000
DROPPED = pa.schema([("url", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
ITSELF = "itself"  # in `checked`: a split of the corpus that the manifest is of


class Stop(Exception):
    """It was asked to stop."""


@dataclass
class Outcome:
    """What was found."""

    dropped: list[dict[str, str]] = field(default_factory=list)  # rows of DROPPED
    texts_taken_out: int = 0  # of records that stay
    kept: int = 0
    checked: list[dict[str, Any]] = field(default_factory=list)  # for the manifest

    def counts(self) -> dict[str, int]:
        found = Counter(one["reason"] for one in self.dropped)
        return {f"dropped_{reason}": found[reason] for reason in REASONS} | {
            "leaked_texts_taken_out": self.texts_taken_out
        }


class Records:
    """The records of the corpus that is being made: a Parquet file as records.read_records writes it."""

    def __init__(self, path: Path, splits: RecordSplits) -> None:
        self.path, self.splits = path, splits
        names: dict[str, int] = {}
        codes: list[np.ndarray] = []
        sums: list[pa.Array] = []
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=[*COLUMNS, "sha256"]):
                of = [splits.of(row) for row in batch.select(COLUMNS).to_pylist()]
                found = [names.setdefault(split, len(names)) for split in of]
                codes.append(np.array(found, np.int16))
                sums.append(batch["sha256"])
        self._names, self._codes = names, np.concatenate([np.zeros(0, np.int16), *codes])
        self.sha256 = pa.chunked_array(sums, pa.string())

    def __len__(self) -> int:
        return len(self._codes)

    def of(self, splits: Sequence[str]) -> np.ndarray:
        """Places of the records of these splits, in order."""
        wanted = [self._names[split] for split in splits if split in self._names]
        return np.flatnonzero(np.isin(self._codes, wanted))

    def split(self, place: int) -> str:
        return list(self._names)[int(self._codes[place])]

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """All records, some at a time."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH):
                yield batch.to_pylist()

    def schema(self) -> pa.Schema:
        return pq.read_schema(self.path)

    def own_texts(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        """Those of a record's texts that its split may have, as the shard's record names them."""
        belongs = self.splits.belongs(row, self.split(place))
        return {
            "title": row["title"],
            "content": row["content"],
            "other_titles": row["titles"],
            "other_contents": row["contents"],
            "queries": [q for q in row["queries"] or [] if belongs(q["url"], q["split"])],
            "captions": merge_given(row["given"] or [], belongs).captions,
        }


def own_set(held_out: HeldOut, records: Records, opened: Opened) -> HeldOutSet:
    """The set that is a split of the corpus itself; `opened`: the fingerprints of its pictures."""
    places = records.of([str(held_out.split)])
    sums = records.sha256.take(places).combine_chunks()
    rows = _rows_of(opened, sums)
    samples, texts, start = list[str](), dict[int, int](), 0
    for batch in records.rows():
        for place in places[
            np.searchsorted(places, start) : np.searchsorted(places, start + len(batch))
        ].tolist():
            row = batch[place - start]
            if held_out.texts:
                add_texts(texts, records.own_texts(row, place), len(samples))
            samples.append(row["key"])
        start += len(batch)
    return HeldOutSet(held_out, samples, sums, _some(opened.pictures, rows), np.arange(len(rows)), texts)


def _rows_of(opened: Opened, sums: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Where the fingerprint of each picture is."""
    found = pc.index_in(sums, value_set=opened.sha256.combine_chunks())
    if found.null_count:
        missing = sums.filter(pc.is_null(found))[0]
        raise FingerprintError(
            f"{found.null_count} pictures have no fingerprint (the first: sha256 {missing}). Run the clean "
            "stage again."
        )
    rows: np.ndarray = found.to_numpy().astype(np.int64)
    return rows


def _some(pictures: Pictures, rows: np.ndarray) -> Pictures:
    return Pictures(pictures.hashes[rows], pictures.grey[rows], pictures.colour[rows])


def decontaminate(
    records: Records,
    opened: Opened,
    sets: Sequence[HeldOutSet],
    sources: Sequence[str],
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    """Write the file of records again, without what leaked from `sets` into the splits `sources`.

    Args:
        opened: fingerprints of the corpus' pictures.
        on_progress: called with a number of steps done, of `len(sets) * hash_index.steps(within=False, …)`.

    Raises:
        Stop: `should_stop` said so; the file is as it was.
    """
    places = records.of(sources)
    outcome = Outcome()
    leaked: dict[int, tuple[int, str]] = {}  # place of a record: the set, and what to say
    for number, one in enumerate(sets):
        for place, detail in _leaked_pictures(records, places, opened, one, on_progress, should_stop):
            leaked.setdefault(place, (number, detail))
    wanted = np.zeros(len(records), bool)  # whose texts are looked at
    if any(one.texts for one in sets):
        wanted[places] = True
    found = [Counter[str]() for _ in sets]
    unfinished = records.path.with_name(f"{records.path.name}.clean")
    schema, start = records.schema(), 0
    with pq.ParquetWriter(unfinished, schema) as writer:
        for batch in records.rows():
            if should_stop():
                raise Stop
            kept = []
            for place, row in enumerate(batch, start):
                if place in leaked:
                    number, detail = leaked[place]
                    found[number]["pictures"] += 1
                    outcome.dropped.append({"url": row["url"], "reason": "leaked_picture", "detail": detail})
                elif not wanted[place] or _take_out_texts(records, row, place, sets, found, outcome):
                    kept.append(row)
            writer.write_table(pa.Table.from_pylist(kept, schema))
            outcome.kept += len(kept)
            start += len(batch)
    unfinished.replace(records.path)
    outcome.checked = [_said(one, sources, leaks) for one, leaks in zip(sets, found, strict=True)]
    return outcome


def _leaked_pictures(
    records: Records,
    places: np.ndarray,
    opened: Opened,
    held: HeldOutSet,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Iterator[tuple[int, str]]:
    """Places of records whose picture is one of the set's, and what to say of each."""
    sums = records.sha256.take(places)
    equal = pc.index_in(sums, value_set=held.sha256).to_numpy(zero_copy_only=False)
    for n in np.flatnonzero(~np.isnan(equal)).tolist():
        yield int(places[n]), f"{held.held_out.name}: {held.samples[int(equal[n])]} (the same bytes)"
    rows = _rows_of(opened, sums)

    def stop_between(_: int) -> None:
        if should_stop():
            raise Stop

    same = matches(
        opened.pictures,
        held.pictures,
        Limits(),
        among=rows,
        on_progress=on_progress,
        on_verified=stop_between,
        should_stop=should_stop,
    )
    if same is None:
        raise Stop
    order = np.argsort(rows, kind="stable")
    at = places[order[np.searchsorted(rows, same.pairs[:, 0], sorter=order)]]
    found = (at, same.pairs[:, 1], same.mirrored, same.correlation)
    for place, other, mirror, likeness in zip(*(column.tolist() for column in found), strict=True):
        sample = held.samples[int(held.pictures_of[other])]
        yield (
            place,
            f"{held.held_out.name}: {sample} (correlation {likeness:.3f}{', in a mirror' if mirror else ''})",
        )


def _take_out_texts(
    records: Records,
    row: dict[str, Any],
    place: int,
    sets: Sequence[HeldOutSet],
    found: Sequence[Counter[str]],
    outcome: Outcome,
) -> bool:
    """Take the sets' texts out of a record. Whether any text of its split is left."""
    last, taken = "", 0

    def is_leak(text: str | None) -> bool:
        nonlocal last, taken
        key = text_key(text) if text else None
        number = next((n for n, one in enumerate(sets) if key is not None and key in one.texts), None)
        if number is None or key is None:
            return False
        found[number]["texts"] += 1
        last = f"{sets[number].held_out.name}: {sets[number].samples[sets[number].texts[key]]}"
        taken += 1
        return True

    had_none = next(texts_of(records.own_texts(row, place)), None) is None
    for name in ("title", "content"):
        others = [text for text in row[f"{name}s"] or [] if text != row[name] and not is_leak(text)]
        if is_leak(row[name]):
            row[name] = others[0] if others else None
        row[f"{name}s"] = others
    row["queries"] = [query for query in row["queries"] or [] if not is_leak(query["text"])]
    for entry in row["given"] or []:
        entry["captions"] = [one for one in entry["captions"] or [] if not is_leak(one["text"])]
    if not taken or had_none or next(texts_of(records.own_texts(row, place)), None) is not None:
        outcome.texts_taken_out += taken
        return True
    outcome.dropped.append({"url": row["url"], "reason": "leaked_text", "detail": last})
    return False


def _said(held: HeldOutSet, sources: Sequence[str], leaks: Counter[str]) -> dict[str, Any]:
    """What the manifest says of one set."""
    return {
        "name": held.held_out.name,
        "corpus": held.corpus_sha256 or ITSELF,
        "split": held.held_out.split,
        "in_splits": list(sources),
        "pictures": len(held.samples),
        "texts": len(held.texts) if held.held_out.texts else None,  # null: not compared
        "leaked_pictures": leaks["pictures"],
        "leaked_texts": leaks["texts"],
    }


def note_checked(manifest: Path, checked: Sequence[dict[str, Any]]) -> None:
    """Write into a manifest.json what its corpus was checked against."""
    values = json.loads(manifest.read_text(encoding="utf-8")) | {"checked": list(checked)}
    unfinished = manifest.with_name(f"{manifest.name}.tmp")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(manifest)
