"""Why rows of a corpus are where they are: the rows of one URL or query in a filter's files, each with its
reason in numbers, and what later stages dropped.

DuckDB reads the files by predicate: of a query only the row groups that may hold it, of a URL the URLs alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from data_tools.log.judged_files import DROPPED_COLUMNS
from data_tools.log.listed_words import first_listed
from data_tools.log.rules import (
    DRAW_DIGITS,
    REASONS,
    FilterRules,
    count_words,
    decide_alone,
    draw,
    measure,
    rank_in_query,
)

_RANKED = ("not_among_best", "not_in_subset")  # dropped after the ranking, as what is kept


@dataclass(frozen=True)
class Row:
    """One row of the log. `reason` is None for a kept one; `detail` tells its numbers."""

    query: str
    url: str
    show: int
    click: int
    reason: str | None
    detail: str


def find_rows(out: Path, rules: FilterRules, text: str) -> list[Row]:
    """All rows of a filter's out/ whose URL is `text`, or, where there are none, whose query is (the other
    way round for a text without '://'), in the order of queries and URLs. `rules`: those that the filter ran
    by."""
    connection = ibis.duckdb.connect()
    pairs = connection.read_parquet(out / "pairs.parquet")
    dropped = connection.read_parquet(out / "dropped.parquet")
    log = pairs.mutate(reason=ibis.null("string")).union(dropped)
    found: list[dict[str, Any]] = []
    for column in ("url", "query") if "://" in text else ("query", "url"):
        found = connection.to_pyarrow(log.filter(log[column] == text)).to_pylist()
        if found:
            break
    ranked = [row for row in found if row["reason"] in (None, *_RANKED)]
    ranks = _ranks(connection, log, rules, {r["query"] for r in ranked}, {r["url"] for r in ranked})
    place: dict[str | None, int] = {None: -1, **{reason: i for i, reason in enumerate(REASONS)}}
    found.sort(key=lambda row: (row["query"], row["url"], place[row["reason"]], -row["show"], -row["click"]))
    kept_show = {
        (r["query"], r["url"]): (r["show"], r["click"]) for r in found if r["reason"] != "repeated_pair"
    }
    rows = []
    for row in found:
        pair = (row["query"], row["url"])
        detail = _detail(row, rules, ranks.get(pair), kept_show.get(pair))
        rows.append(Row(*pair, row["show"], row["click"], row["reason"], detail))
    return rows


def _ranks(
    connection: Backend, log: ir.Table, rules: FilterRules, queries: set[str], urls: set[str]
) -> dict[tuple[str, str], int]:
    """The place (1: best) of each row of these queries and URLs that came as far as the ranking."""
    if rules.best_per_query is None or not queries:
        return {}
    rows = log.filter(log["query"].isin(sorted(queries)))
    ranked = rows.filter(rows.reason.isnull() | rows.reason.isin(_RANKED))
    alone = decide_alone(measure(ranked.drop("ctr", "reason"), replace(rules, subset=None)), rules)
    places = alone.select("query", "url", place=rank_in_query(alone, "url") + 1)
    wanted = connection.to_pyarrow(places.filter(places.url.isin(sorted(urls)))).to_pylist()
    return {(row["query"], row["url"]): row["place"] for row in wanted}


def _detail(
    row: Mapping[str, Any], rules: FilterRules, rank: int | None, kept: tuple[int, int] | None
) -> str:
    """The numbers behind a row's reason."""
    reason, ctr = row["reason"], row["ctr"]
    if reason in (None, *_RANKED):
        place = "" if rank is None else f", rank {rank} of best_per_query {rules.best_per_query}"
        if reason == "not_among_best":
            return place.removeprefix(", ")
        if reason == "not_in_subset" and rules.subset is not None:
            return f"{_drawn(row['url'], rules.subset.seed):.4f} drawn ≥ subset.share {rules.subset.share:g}"
        return f"ctr {ctr:.4g} ≥ min_ctr {rules.min_ctr:g}{place}"
    if reason == "low_ctr" and rules.ctr_bound == "wilson":
        return (
            f"the lower bound of ctr {ctr:.4g} ({row['click']} of {row['show']}) < min_ctr {rules.min_ctr:g}"
        )
    if reason == "low_ctr":
        return f"ctr {ctr:.4g} < min_ctr {rules.min_ctr:g}"
    if reason == "few_shows":
        return f"show {row['show']} < min_show {max(rules.min_show, 1)}"
    if reason == "too_small":
        return f"{_size(row)} px: a side < min_side_px {rules.min_side_px}"
    if reason == "bad_aspect":
        return f"{_size(row)} px: aspect > max_aspect {rules.max_aspect:g}"
    if reason == "repeated_pair":
        shows = "" if kept is None else f" (show {kept[0]}, click {kept[1]})"
        return f"show {row['show']}, click {row['click']}: another row of the pair stands for it{shows}"
    if reason == "listed_word":
        held = {name: first_listed(row[name], rules.listed_words) for name in ("query", "title", "content")}
        return ", ".join(f"{name} holds '{word}'" for name, word in held.items() if word is not None)
    if reason == "bad_url":
        return REASONS[reason]
    name, _, side = reason.partition("_too_")
    words = count_words(row[name])
    return (
        f"{words} < min_words {rules.min_words}"
        if side == "short"
        else f"{words} > max_words {rules.max_words}"
    )


def _size(row: Mapping[str, Any]) -> str:
    return " x ".join("?" if row[side] is None else str(row[side]) for side in ("width", "height"))


def _drawn(url: str, seed: int) -> float:
    digits: str = ibis.duckdb.connect().execute(draw(ibis.literal(url), seed))
    return int(digits, 16) / 16**DRAW_DIGITS


def dropped_later(out: Path, urls: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of these URLs, those that a stage after the filter dropped: the reason, and what else its
    dropped.parquet says (`detail`, or its other columns by name)."""
    connection = ibis.duckdb.connect()
    dropped = connection.read_parquet(out / "dropped.parquet")
    found = {}
    for row in connection.to_pyarrow(dropped.filter(dropped.url.isin(list(urls)))).to_pylist():
        told = {k: v for k, v in row.items() if k not in {*DROPPED_COLUMNS, "detail"} and v is not None}
        parts = [str(row["detail"])] if row.get("detail") else []
        parts += [f"{name} {value}" for name, value in told.items()]
        found[row["url"]] = (str(row["reason"]), ", ".join(parts))
    return found
