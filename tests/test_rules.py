"""The filter's rules: one reason a row, in the documented order; words counted alike in SQL and Python."""

import math
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.log.listed_words import WordLists
from data_tools.log.rules import REASONS, FilterRules, Subset, count_words, exactly, judge, word_count
from tests.data_helpers import row

SIZES: dict[str, Any] = {"width": 200, "height": 200}


def judged(rows: list[dict[str, Any]], **rules: Any) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    for name in ("width", "height"):
        if name in frame:
            frame[name] = frame[name].astype("Int64")
    connection = ibis.duckdb.connect()
    return connection.execute(judge(ibis.memtable(frame), FilterRules(**rules)))


def reasons(rows: list[dict[str, Any]], **rules: Any) -> list[str | None]:
    """In the order of the rows, which must differ in url."""
    frame = judged(rows, **rules).set_index("url")["reason"]
    return [frame[r["url"]] if isinstance(frame[r["url"]], str) else None for r in rows]


BREAKS: dict[str, dict[str, Any]] = {
    "bad_url": {"url": "ftp://site.example/x.webp"},
    "too_small": {"width": 99, "height": 300},
    "bad_aspect": {"width": 801, "height": 200},
    "query_too_short": {"query": "panda"},
    "query_too_long": {"query": "a " * 129},
    "title_too_short": {"title": "panda"},
    "title_too_long": {"title": "红" * 129},
    "content_too_long": {"content": "a " * 129},
    "listed_word": {"content": "what a Blorptox, really"},
    "few_shows": {"show": 19, "click": 19},
    "low_ctr": {"show": 100, "click": 9},
}


@pytest.mark.parametrize("reason", BREAKS)
def test_each_rule_alone(reason: str) -> None:
    good = row(**SIZES, url="http://site.example/good.webp")
    bad = row(**SIZES) | BREAKS[reason]
    assert reasons([good, bad], listed_words=WordLists.of_all(("blorptox",))) == [None, reason]


def test_a_row_that_breaks_several_rules_has_the_first_reason() -> None:
    names = list(BREAKS)
    assert names == [name for name in REASONS if name in BREAKS]  # the documented order
    for place, name in enumerate(names):
        changes: dict[str, Any] = {}
        for later in reversed(names[place:]):
            changes |= BREAKS[later]
        assert reasons([row(**SIZES) | changes], listed_words=WordLists.of_all(("blorptox",))) == [name]


def test_limits_are_inclusive() -> None:
    rows = [
        row(url="http://a.example/1", width=100, height=400),
        row(url="http://a.example/2", width=400, height=100),
        row(url="http://a.example/3", query="a " * 128, title="红" * 128, content="b " * 128),
        row(url="http://a.example/4", query="红色", show=20, click=2),
    ]
    assert reasons([r | {k: r.get(k, 200) for k in SIZES} for r in rows]) == [None] * 4


def test_sizes_that_the_log_has_not_are_no_reason() -> None:
    assert reasons([row(width=None, height=None)]) == [None]
    assert reasons([row()]) == [None]  # a log without the columns
    assert reasons([row(width=500, height=None)]) == [None]
    assert reasons([row(width=50, height=None)]) == ["too_small"]  # whatever the other side is


def test_a_row_never_shown_is_few_shows_even_without_a_minimum() -> None:
    assert reasons([row(show=0, click=0)], min_show=0, min_ctr=0.0) == ["few_shows"]


def test_no_row_is_lost_or_made(tmp_path: Path) -> None:
    rows = [
        row(query=f"query {i % 7}", url=f"http://a.example/{i}", show=i, click=i // 3) for i in range(300)
    ]
    frame = judged(rows, best_per_query=5)
    assert sorted(frame["url"]) == sorted(r["url"] for r in rows)
    assert set(frame["reason"].dropna()) <= set(REASONS)


def test_best_per_query_ranks_what_is_left_and_breaks_ties_by_shows_then_url() -> None:
    rows = [
        row(url="http://a.example/low", show=100, click=20),
        row(url="http://a.example/b", show=100, click=50),
        row(url="http://a.example/a", show=100, click=50),
        row(url="http://a.example/more", show=200, click=100),
        row(url="http://a.example/top-but-small", show=100, click=99, width=10, height=10),
        row(url="http://a.example/other", query="blue bird", show=100, click=11),
    ]
    rows = [{"width": None, "height": None} | r for r in rows]
    assert reasons(rows, best_per_query=2) == [
        "not_among_best",
        "not_among_best",
        None,
        None,
        "too_small",  # it does not take a place
        None,
    ]
    assert reasons(rows, best_per_query=None).count("not_among_best") == 0


def test_the_same_pair_twice_keeps_the_row_with_more_shows() -> None:
    frame = judged([row(show=50, click=20), row(show=80, click=20), row(show=80, click=30)])
    kept = frame[frame["reason"].isna()]
    assert kept[["show", "click"]].to_numpy().tolist() == [[80, 30]]
    assert frame["reason"].dropna().tolist() == ["repeated_pair"] * 2


def test_wilson_bound() -> None:
    def lower(click: int, show: int) -> float:  # Wilson 1927, as textbooks write it
        z, p = 1.959963984540054, click / show
        centre = (p + z * z / (2 * show)) / (1 + z * z / show)
        half = z / (1 + z * z / show) * math.sqrt(p * (1 - p) / show + z * z / (4 * show * show))
        return centre - half

    bound = lower(30, 100)
    assert reasons([row()], ctr_bound="wilson", min_ctr=bound - 1e-9) == [None]
    assert reasons([row()], ctr_bound="wilson", min_ctr=bound + 1e-9) == ["low_ctr"]
    few = [
        row(url="http://a.example/few", show=10, click=5),
        row(url="http://a.example/many", show=1000, click=490),
    ]
    assert reasons(few, ctr_bound="wilson", min_show=1, best_per_query=1) == ["not_among_best", None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("   ", 0),
        ("panda", 1),
        ("hello, world", 2),
        ("a\u00a0b\u3000c\td\ne", 5),
        ("红色熊猫", 4),
        ("红色 panda 2024", 4),
        ("panda熊猫panda", 4),
        ("你好，世界！", 4),
        ("，。！", 0),
        ("パンダの絵", 5),
        ("ー", 1),
        ("𠀀𠮷", 2),
        ("빨간 판다", 2),
        ("красная панда", 2),
        ("don't stop", 2),
        ("- -", 2),
    ],
)
def test_words_are_counted_as_documented(text: str, words: int) -> None:
    assert count_words(text) == words
    connection = ibis.duckdb.connect()
    assert connection.execute(word_count(ibis.literal(text))) == words


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=15, deadline=None)
@given(st.lists(ANY_TEXT, max_size=60))
def test_sql_and_python_count_the_same(texts: list[str]) -> None:
    connection = ibis.duckdb.connect()
    table = ibis.memtable(pd.DataFrame({"i": range(len(texts) + 1), "s": [*texts, "end"]}))
    found = connection.execute(table.mutate(n=word_count(table.s)).order_by("i"))["n"].tolist()
    assert found == [count_words(text) for text in [*texts, "end"]]


HOSTILE_TEXT = st.text(
    st.sampled_from("a,.\u2019 \t\n\x0b\x85\u00a0\u3000\u200b红パー，。…é🐼𠀀-\x01"), max_size=25
)


@settings(max_examples=30, deadline=None)
@given(st.lists(HOSTILE_TEXT, max_size=200))
def test_separators_in_any_order_are_counted_by_the_plain_rule(texts: list[str]) -> None:
    table = ibis.memtable({"i": range(len(texts) + 1), "s": [*texts, ""]})
    found = ibis.duckdb.connect().to_pyarrow(table.order_by("i").select(n=word_count(table.s)))
    assert found["n"].to_pylist() == [count_words(text) for text in [*texts, ""]]


@pytest.mark.parametrize("number", [0.1, 0.07, 1 / 3, 1.0, 4.0, 1.959963984540054, 5e-324, 0.1 + 2**-55])
def test_doubles_reach_the_engine_to_the_last_bit(number: float) -> None:
    assert ibis.duckdb.connect().execute(exactly(number)) == number


def drawn(rows: list[dict[str, Any]], share: float, seed: int = 0) -> pd.DataFrame:
    frame = judged(rows, best_per_query=None, subset=Subset(share, seed))
    assert set(frame["reason"].dropna()) <= {"not_in_subset"}
    return frame[frame["reason"].isna()]


def zipf_rows(pictures: int) -> list[dict[str, Any]]:
    """Three queries a picture, the k-th of 200 queries with a chance of 1/k."""
    rng = np.random.default_rng(3)
    chances = 1 / np.arange(1, 201)
    rows = []
    for number in range(pictures):
        for query in rng.choice(200, 3, replace=False, p=chances / chances.sum()):
            rows.append(row(query=f"query {query}", url=f"http://a.example/{number}"))
    return rows


def test_a_subset_keeps_the_query_distribution() -> None:
    rows, share = zipf_rows(20_000), 0.1
    kept = drawn(rows, share)
    assert abs(kept["url"].nunique() / 20_000 - share) < 4 * math.sqrt(share * (1 - share) / 20_000)
    assert (kept.groupby("url").size() == 3).all()  # a picture comes with all its rows
    before = pd.Series([r["query"] for r in rows]).value_counts()
    after = kept["query"].value_counts().reindex(before.index, fill_value=0)
    # Draws of independent pictures: each count is binomial, their squared deviations add up to chi-square.
    chi_square = ((after - share * before) ** 2 / (before * share * (1 - share))).sum()
    assert chi_square < 200 + 4 * math.sqrt(2 * 200)
    total_variation = (after / after.sum() - before / before.sum()).abs().sum() / 2
    assert total_variation < 0.06  # 6,000 rows of 200 queries by chance alone: about 0.05
    for stratum in np.array_split(before.index, 5):  # frequent queries as well as rare ones
        n = before[stratum].sum()
        assert abs(after[stratum].sum() - share * n) < 4 * math.sqrt(n * share * (1 - share))


def test_a_smaller_subset_is_part_of_a_larger_one_and_a_seed_draws_others() -> None:
    rows = zipf_rows(500)
    small, large = (set(drawn(rows, share)["url"]) for share in (0.2, 0.5))
    assert small < large
    assert set(drawn(rows[:600], 0.2)["url"]) == small & {r["url"] for r in rows[:600]}
    assert set(drawn(rows, 0.2, seed=1)["url"]) != small
    assert len(drawn(rows, 1.0)) == len(rows)


def test_the_subset_is_drawn_from_what_all_other_rules_leave() -> None:
    rows = [row(url=f"http://a.example/{i}", show=100, click=20 + i) for i in range(40)]
    whole = judged(rows, best_per_query=10)
    part = judged(rows, best_per_query=10, subset=Subset(0.5))
    assert (part["reason"] == "not_among_best").sum() == (whole["reason"] == "not_among_best").sum() == 30
    assert set(part[part["reason"].isna()]["url"]) < set(whole[whole["reason"].isna()]["url"])


def test_the_expression_compiles_for_spark() -> None:
    names = {"query": "string", "url": "string", "title": "string", "content": "string"}
    numbers = dict.fromkeys(("show", "click", "width", "height"), "int64")
    log = ibis.table(names | numbers, name="log")
    rules = FilterRules(listed_words=WordLists(("词",), ("one",)), subset=Subset(0.5), ctr_bound="wilson")
    sql = ibis.to_sql(judge(log, rules), dialect="databricks")  # Spark SQL; needs no Spark to write it
    assert sql.count("ROW_NUMBER() OVER") == 2
    assert "\\\\" not in sql  # a backslash would read differently in Spark's string literals
