"""What a corpus holds: samples, splits, licences, labels; of some of its records languages and lengths."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.shards import ShardIndex
from data_tools.shards.files import CorpusError, DirectoryFiles
from data_tools.shards.format import INDEX, read_manifest

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MOST_VALUES = 20  # of a label, the most frequent


def describe(directory: Path, records: int, seed: int) -> dict[str, Any]:
    """The figures of a corpus: from its manifest and index, and from `records` records drawn by `seed`.

    What grows with the corpus is one column of the index at a time.

    Raises:
        CorpusError: no corpus, or a damaged one.
    """
    files = DirectoryFiles(directory)
    manifest = read_manifest(files)
    index = directory / "index.parquet"
    shards = [int(shard["bytes"]) for shard in manifest["shards"]]
    found: dict[str, Any] = {
        "samples": sum(manifest["splits"].values()),
        "shards": len(shards),
        "bytes": sum(shards),
        "shard_bytes": _spread(np.array(shards)),
        "splits": manifest["splits"],
        "licences": manifest.get("licences", {}),
    }
    try:
        names = pq.read_schema(index).names
        if not set(INDEX) <= set(names):
            raise CorpusError(f"{index}: the index lacks columns. Run the shard stage again.")
        found["labels"] = {
            name.removeprefix("label_"): _values(pq.read_table(index, columns=[name])[name])
            for name in names
            if name.startswith("label_")
        }
        pictures = {
            name: _spread(pq.read_table(index, columns=[name])[name].drop_null().to_numpy())
            for name in ("image_bytes", "width", "height", "json_bytes")
        }
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"{index}: the index cannot be read ({error}). Run the shard stage again."
        ) from error
    found["pictures"] = {name: pictures[name] for name in ("image_bytes", "width", "height")}
    found["record_bytes"] = pictures["json_bytes"]
    return found | {"records": _of_records(directory, records, seed)}


def _of_records(directory: Path, count: int, seed: int) -> dict[str, Any]:
    """Languages and lengths of texts, of some samples."""
    index = ShardIndex.open(directory)
    picked = drawn(len(index), count, seed)
    languages: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {"title": [], "content": [], "query": [], "caption": []}
    queries = []
    for i in picked.tolist():
        record = index.record(i)
        languages[str(record.get("lang") or "unknown")] += 1
        texts = {"title": [record.get("title")], "content": [record.get("content")]}
        texts["query"] = [query.get("text") for query in record.get("queries") or ()]
        texts["caption"] = [_caption(caption) for caption in record.get("captions") or ()]
        queries.append(len(texts["query"]))
        for name, values in texts.items():
            lengths[name] += [len(value) for value in values if isinstance(value, str) and value]
    index.close()
    return {
        "read": len(picked),
        "languages": dict(languages.most_common()),
        "queries_a_sample": _spread(np.array(queries)),
        "characters": {name: _spread(np.array(values)) for name, values in lengths.items() if values},
    }


def _caption(caption: Any) -> Any:
    return caption.get("text") if isinstance(caption, dict) else caption


def _values(column: pa.ChunkedArray) -> dict[str, Any]:
    """How many values a label has, and the most frequent."""
    counted = pc.value_counts(column)
    order = pc.sort_indices(counted.field("counts"), sort_keys=[("", "descending")])
    top = counted.take(order[:MOST_VALUES])
    return {
        "values": len(counted),
        "most": {str(row["values"] or ""): int(row["counts"]) for row in top.to_pylist()},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Quantiles and the mean; nothing of nothing."""
    if not len(values):
        return {}
    spread = {f"{quantile:.0%}": float(np.quantile(values, quantile)) for quantile in QUANTILES}
    return spread | {"mean": float(values.mean())}


def drawn(total: int, count: int, seed: int) -> np.ndarray:
    """`count` different numbers below `total`, in order; all of them where there are no more."""
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


def one_sample(directory: Path, key: str) -> tuple[dict[str, Any], bytes, str]:
    """A sample's record, its picture's bytes, and where it is. CorpusError: there is none of that key."""
    index = ShardIndex.open(directory)
    try:
        i = index.keys.index(key)
    except ValueError as error:
        raise CorpusError(f"{directory}: no sample has the key '{key}'") from error
    found = index.record(i), index.image_bytes(i), index.where(i)
    index.close()
    return found


def record_text(record: dict[str, Any]) -> str:
    """A record as people read it."""
    return json.dumps(record, ensure_ascii=False, indent=1)
