"""Videos as a corpus of features: shards of <key>.npy and <key>.json with an index and a manifest, as of
pictures.

`ShardIndex.image_bytes` gives the .npy file as it was. width and height in the index are null.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpora.source import FeatureRow, Source
from data_tools.errors import DataError
from data_tools.shards import ShardWriter

UNSPLIT = "train"  # the split of a video where neither its file nor the recipe names one


def write_features(
    found: Iterable[tuple[Source, FeatureRow]],
    folder: Path,
    shard_bytes: int,
    on_row: Callable[[int], None],
) -> dict[str, Any]:
    """Write the shards, index and manifest of videos, in the order of their keys; the manifest.

    Memory grows with the captions. Raises DataError for a key that stands twice, the name of a split that is
    no name of a folder, or a file that is no .npy of frames × width numbers.
    """
    rows = sorted(found, key=lambda pair: pair[1].key)
    twice = [key for key, count in Counter(row.key for _, row in rows).items() if count > 1]
    if twice:
        raise DataError(f"sources: video '{twice[0]}' stands in them twice. Name each annotation file once.")
    splits = sorted({_split(source, row) for source, row in rows})
    writer = ShardWriter(folder, shard_bytes, splits, [])
    for source, row in rows:
        data = row.features.read_bytes()
        writer.write(data, "npy", _record(source, row, data))
        on_row(1)
    return writer.close()


def _split(source: Source, row: FeatureRow) -> str:
    split = row.split or source.split or UNSPLIT
    if not re.fullmatch("[a-z0-9_]+", split):
        raise DataError(
            f"{source.name}: video '{row.key}': the split is {split!r}; names are of a-z, 0-9 and _."
        )
    return split


def _record(source: Source, row: FeatureRow, data: bytes) -> dict[str, Any]:
    frames, width, kind = _shape(row.features, data)
    return {
        "key": row.key,
        "title": "",
        "content": "",
        "queries": [],
        "captions": [{"text": text, "lang": source.lang} for text in row.captions],
        "lang": source.lang,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": None,
        "height": None,
        "features": {"frames": frames, "width": width, "dtype": kind},
        "labels": {},
        "classes": [],
        "sources": [source.name],
        "licence": source.licence,
        "split": _split(source, row),
    }


def _shape(path: Path, data: bytes) -> tuple[int, int, str]:
    """Frames, width and type of the numbers."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as .npy ({error}). Write it with numpy.save again."
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise DataError(
            f"{path}: an array of {array.dtype} of shape {array.shape}; "
            "it must be frames × width of floating numbers."
        )
    return int(array.shape[0]), int(array.shape[1]), str(array.dtype)
