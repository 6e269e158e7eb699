"""The sets that a corpus must not hold: their pictures' fingerprints, and their texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.clean.fingerprint_files import FingerprintError, open_fingerprints, row, write_rows
from data_tools.clean.fingerprints import fingerprint
from data_tools.clean.near_duplicates import Pictures
from data_tools.pictures import PictureError, open_picture
from data_tools.shards import ShardIndex
from data_tools.text_forms import text_key


@dataclass(frozen=True)
class HeldOut:
    """A set to check against: a split of the corpus that is being made, or another corpus."""

    name: str
    split: str | None
    texts: bool  # whether its texts must not be there either
    index: ShardIndex | None = None  # None: of the corpus that is being made


@dataclass(frozen=True)
class HeldOutSet:
    """What is looked for. Memory: 1.7 kB of disk and 112 bytes a picture, some 150 bytes a text."""

    held_out: HeldOut
    samples: list[str]  # keys
    sha256: pa.Array
    pictures: Pictures
    pictures_of: np.ndarray  # the place in `samples` of each row of `pictures`
    texts: dict[int, int]  # text_key: place in `samples`

    @property
    def corpus_sha256(self) -> str | None:
        """Of the other corpus' samples; None for a split of this one."""
        return None if self.held_out.index is None else self.held_out.index.sha256


def texts_of(record: dict[str, Any]) -> Iterator[str]:
    """All texts of a record: titles, contents, queries, captions."""
    for name in ("title", "content"):
        if record.get(name):
            yield record[name]
    for name in ("other_titles", "other_contents", "queries", "captions"):
        for one in record.get(name) or []:
            yield one["text"] if isinstance(one, dict) else one


def read_corpus(
    held_out: HeldOut, cache: Path, max_pixels: int, on_progress: Callable[[int], None]
) -> HeldOutSet:
    """A set that is another corpus. Its fingerprints are made once and kept in `cache`.

    Raises:
        CorpusError: the corpus is damaged. FingerprintError: one of its pictures cannot be decoded.
    """
    index = held_out.index
    if index is None:
        raise ValueError(f"{held_out.name}: a split of the corpus that is being made")
    records = (index.record(i) for i in range(len(index)))
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{index.sha256}.parquet"
    texts: dict[int, int] = {}
    sums = []

    def rows() -> Iterator[dict[str, object]]:
        for i in range(len(index)):
            name = index.where(i)
            try:
                picture = open_picture(index.image_bytes(i), max_pixels=max_pixels, name=name)
            except PictureError as error:
                raise FingerprintError(f"{error}. Run its shard stage again.") from error
            on_progress(1)
            yield row(index.keys[i], "", fingerprint(picture), None)

    if path.is_file():
        on_progress(len(index))
    else:
        write_rows(rows(), path)
    for place, record in enumerate(records):
        sums.append(record["sha256"])
        if held_out.texts:
            add_texts(texts, record, place)
    pictures = open_fingerprints(path, cache).pictures
    sha256 = pa.array(sums, pa.string())
    return HeldOutSet(held_out, list(index.keys), sha256, pictures, np.arange(len(pictures)), texts)


def add_texts(texts: dict[int, int], record: dict[str, Any], place: int) -> None:
    """Note the record's texts as those of sample `place`; the first sample with a text stands for it."""
    for text in texts_of(record):
        key = text_key(text)
        if key is not None:
            texts.setdefault(key, place)
