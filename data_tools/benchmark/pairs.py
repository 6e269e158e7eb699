"""From candidates to the pairs of a benchmark: one text a picture, 8:1:1, as many negatives as positives.

Every picture stands in one pair and every text too, as in Zero's Table A, which counts as many images as
texts as pairs (ICM: 320K/320K, 40K/40K, 40K/40K). So a matching set of n pairs takes n pictures: half of them
have their own text, and the other half have each other's, within their split. A picture alone, or a text
alone, tells nothing of the label. The paper does not say where its negatives come from; these are drawn at
random, and annotators may turn a pair over.

No text in two splits: of pictures with the same text (see text_forms.py) or the same bytes, one is taken.

What depends on what: every draw is a seeded hash of a key, so neither the shards of the corpus nor their
order matter. Memory: DuckDB sorts out of core; a block of negatives is about `BLOCK` pictures with their
texts.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend

from data_tools.benchmark.texts import TextRules, choose_text, near, own_texts, set_of
from data_tools.errors import DataError
from data_tools.shards import ShardIndex
from data_tools.splits import unit_hash
from data_tools.text_forms import same_form

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
BLOCK = 1000  # pictures whose texts are dealt out among themselves
ROWS = 5000  # of a batch that is read or written
ROW_GROUP = 20_480  # rows of DuckDB's files: a reader holds one group
REASONS = {
    "no_text": "the record has no such text",
    "few_clicks": "under min_click clicks",
    "bad_length": "the text has under min_words or over max_words words",
    "repeated_picture": "another key has the same bytes (sha256)",
    "repeated_text": "another picture with more clicks has the same text",
    "not_drawn": "there are enough pairs",
}

_CANDIDATES = pa.schema(
    {
        "key": pa.string(),
        "place": pa.int64(),  # in the index of the corpus
        "sha256": pa.string(),
        "text": pa.string(),
        "lang": pa.string(),
        "same": pa.string(),  # equal for texts that count as one
        "click": pa.int64(),
        "draw": pa.float64(),
        "own": pa.list_(pa.string()),
        "reason": pa.string(),
    }
)
PAIRS = pa.schema(
    {
        "id": pa.string(),
        "key": pa.string(),
        "place": pa.int64(),
        "text": pa.string(),
        "lang": pa.string(),
        "same": pa.string(),
        "label": pa.int8(),  # 1: the text is the picture's
        "split": pa.string(),
        "text_key": pa.string(),  # the picture whose text it is
        "draw": pa.float64(),
    }
)


def connect(scratch: Path, memory_limit: str | None = None) -> Backend:
    """A DuckDB that spills to `scratch` beyond `memory_limit` (say "8GB"; None: its own default)."""
    settings = {"temp_directory": str(scratch / "spill")}
    if memory_limit is not None:
        settings["memory_limit"] = memory_limit
    connection: Backend = ibis.duckdb.connect(**settings)
    return connection


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, one after the other."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            yield from batch.to_pylist()


def write_rows(rows: Iterator[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Write rows to a Parquet file, `ROWS` at a time."""
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


# ------------------------------------------------------------------------------------------------ candidates


def write_candidates(
    index: ShardIndex,
    name: str,
    sets: Sequence[str],
    rules: TextRules,
    path: Path,
    advance: Callable[[], None],
) -> tuple[list[str], int]:
    """Every picture of the set's part, with its text or the reason why it has none; the labels that its
    records have, and how many pictures belong to the other sets. `advance` is called for each sample."""
    labels: set[str] = set()
    others = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal others
        for place, key in enumerate(index.keys):
            advance()
            if set_of(key, sets) != name:
                others += 1
                continue
            record = index.record(place)
            labels.update(record["labels"])
            chosen = choose_text(record, rules)
            yield {
                "key": key,
                "place": place,
                "sha256": record["sha256"],
                "text": chosen.text,
                "lang": chosen.lang,
                "same": same_form(chosen.text),
                "click": chosen.click,
                "draw": unit_hash(rules.seed, name, key),
                "own": own_texts(record),
                "reason": chosen.reason,
            }

    write_rows(rows(), _CANDIDATES, path)
    return sorted(labels), others


def sort_out(connection: Backend, candidates: Path, out: Path, wanted: int, half: bool) -> int:
    """Give every candidate that is not taken its reason, and every other its `place_in_draw`, 0, 1 …

    `half`: an even number is taken. Returns how many are: `wanted`, or as many as there are.
    """
    rows = connection.read_parquet(candidates)
    rows = _repeated(rows, "repeated_picture", rows.sha256, [rows.key])
    rows = _repeated(rows, "repeated_text", rows.same, [rows.click.desc(), rows.key])
    ranked = ibis.row_number().over(group_by=rows.reason.isnull(), order_by=[rows.draw, rows.key])
    rows = rows.mutate(place_in_draw=ibis.ifelse(rows.reason.isnull(), ranked, ibis.null("int64")))
    found = min(wanted, int(connection.execute(rows.place_in_draw.count())))
    taken = found - found % 2 if half else found
    beyond = rows.place_in_draw >= taken
    rows = rows.mutate(reason=ibis.ifelse(beyond.fill_null(False), "not_drawn", rows.reason))
    connection.to_parquet(rows.order_by(rows.place_in_draw, rows.key), out, row_group_size=ROW_GROUP)
    return taken


def _repeated(rows: ir.Table, reason: str, by: ir.Value, order: list[ir.Value]) -> ir.Table:
    """All but the first of equal rows among those without a reason get one."""
    rows = rows.mutate(copy_=ibis.row_number().over(group_by=[rows.reason.isnull(), by], order_by=order))
    again = rows.reason.isnull() & (rows.copy_ > 0)
    return rows.mutate(reason=ibis.ifelse(again, reason, rows.reason)).drop("copy_")


def split_sizes(count: int, shares: Sequence[int]) -> dict[SplitName, int]:
    """8:1:1 of `count`, val and test rounded half up, the rest to train. DataError if one were under 2."""
    total = sum(shares)
    val, test = ((2 * count * share + total) // (2 * total) for share in shares[1:])
    sizes = dict(zip(SPLITS, (count - val - test, val, test), strict=True))
    if min(sizes.values()) < 2:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"{count} pictures are left for each label, which is too few to divide ({said}; each needs 2): "
            "hold out a larger split in the shard stage, raise `pairs`, or lower min_click"
        )
    return sizes


# ----------------------------------------------------------------------------------------------------- pairs


def write_pairs(
    chosen: Path,
    name: str,
    taken: int,
    matching: bool,
    shares: Sequence[int],
    path: Path,
    advance: Callable[[], None],
) -> None:
    """The pairs of what `sort_out` took: positives first, and for a matching set as many negatives."""
    sizes = split_sizes(taken // 2 if matching else taken, shares)
    rows = (row for row in read_rows(chosen) if row["reason"] is None)

    def pairs() -> Iterator[dict[str, Any]]:
        for label in (1, 0) if matching else (1,):
            for split, size in sizes.items():
                for block in _blocks(rows, size):
                    givers = range(len(block)) if label else deal_texts(block)
                    for row, giver in zip(block, givers, strict=True):
                        advance()
                        yield _pair(name, row, block[giver], label, split)

    write_rows(pairs(), PAIRS, path)


def _blocks(rows: Iterator[dict[str, Any]], count: int) -> Iterator[list[dict[str, Any]]]:
    """The next `count` rows, in blocks of about `BLOCK` that differ by one row at most."""
    blocks = max(1, count // BLOCK)
    for number in range(blocks):
        yield list(islice(rows, (number + 1) * count // blocks - number * count // blocks))


def deal_texts(block: Sequence[dict[str, Any]]) -> list[int]:
    """For each row whose text it gets: a permutation under which no text is the picture's own, or near to one
    that is, or of a picture that shares a text with it.

    Each row gets the next one's; where that is forbidden, two rows exchange theirs. Raises DataError where no
    exchange helps.
    """
    count = len(block)
    giver = [(place + 1) % count for place in range(count)]

    def may(place: int, other: int) -> bool:
        return place != other and not related(block[place], block[other])

    for place in range(count):
        if may(place, giver[place]):
            continue
        for step in range(1, count):
            other = (place + step) % count
            if may(place, giver[other]) and may(other, giver[place]):
                giver[place], giver[other] = giver[other], giver[place]
                break
        else:
            raise DataError(
                f"picture {block[place]['key']}: no text among {count} can be its negative: all are near "
                "to its own; hold out a larger split in the shard stage, or raise `pairs`"
            )
    return giver


def related(row: dict[str, Any], giver: dict[str, Any]) -> bool:
    """Whether the giver's text might be true of the row's picture."""
    return (
        row["sha256"] == giver["sha256"]
        or not set(row["own"]).isdisjoint(giver["own"])
        or any(near(giver["same"], own) for own in row["own"])
    )


def _pair(name: str, row: dict[str, Any], giver: dict[str, Any], label: int, split: str) -> dict[str, Any]:
    said = "\0".join((row["key"], giver["key"], giver["text"]))
    return {
        "id": f"{name}-{hashlib.blake2b(said.encode(), digest_size=8).hexdigest()}",
        "key": row["key"],
        "place": row["place"],
        "text": giver["text"],
        "lang": giver["lang"],
        "same": giver["same"],
        "label": label,
        "split": split,
        "text_key": giver["key"],
        "draw": row["draw"],
    }


def reasons(connection: Backend, chosen: Path) -> Counter[str]:
    """How many candidates were left out, by reason."""
    rows = connection.read_parquet(chosen)
    found = connection.to_pyarrow(
        rows.filter(rows.reason.notnull()).group_by("reason").agg(n=lambda t: t.count())
    )
    return Counter({row["reason"]: int(row["n"]) for row in found.to_pylist()})
