"""The filter of a click log as one Ibis expression: every row gets its CTR and at most one reason to be
dropped.

The same expression runs on DuckDB here and on Spark at scale: plain regular expressions without backslashes,
CASE, and row_number() windows, nothing else.

Words. A Han character, a kana or a bopomofo letter is one word each; all other text splits at white space and
at CJK punctuation. So "红色 panda 2024" has 4 words (红, 色, panda, 2024), "hello, world" 2, "你好，世界" 4.

Listed words. A word written in Latin, Greek or Cyrillic letters matches as a whole word, in any case; any
other word (say a Chinese one, which has no spaces around it) matches anywhere in the text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ibis
import ibis.expr.types as ir

from data_tools.errors import DataError

# The order in which a row is judged: the first rule that it breaks is its one reason.
REASONS = {
    "repeated_pair": "the same query and URL stand in the log with more shows",
    "bad_url": "the URL is not http:// or https:// with a host",
    "too_small": "the log says that a side is under min_side_px",
    "bad_aspect": "the log says that the longer side is over max_aspect times the shorter",
    "query_too_short": "the query has under min_words words",
    "query_too_long": "the query has over max_words words",
    "title_too_short": "the title has under min_words words",
    "title_too_long": "the title has over max_words words",
    "content_too_long": "the content has over max_words words",
    "listed_word": "query, title or content holds a listed word",
    "few_shows": "shown under min_show times: its CTR says little",
    "low_ctr": "the CTR is under min_ctr",
    "not_among_best": "there are best_per_query pictures of a higher CTR for the query",
}

# Written as ranges of characters, not as \p{…}, so that RE2, Java and Python read the same.
CJK = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"  # noqa: E501
SPACE = " \t\n\x0b\x0c\r\x85\u00a0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
PUNCTUATION = "\u3001-\u3004\u3008-\u3020\u302a-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
PUNCTUATION += "\u2018-\u201f\u2026"
LETTER = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"  # what makes a listed word a "whole" word

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class FilterRules:
    """The numbers of the filter. `ctr_bound`: judge by the CTR itself (`point`), or by the lower end of its
    95 %
    Wilson interval (`wilson`), which asks more of rows with few shows."""

    min_show: int = 20
    min_ctr: float = 0.1
    ctr_bound: Literal["point", "wilson"] = "point"
    best_per_query: int | None = 10
    min_words: int = 2
    max_words: int = 128
    listed_words: tuple[str, ...] = ()
    min_side_px: int = 100
    max_aspect: float = 4.0


def judge(log: ir.Table, rules: FilterRules) -> ir.Table:
    """The log's rows with two more columns: `ctr` (null where show is 0) and `reason` (null for a kept row).

    Rows are neither added nor lost. `not_among_best` ranks only the rows that broke no other rule: by CTR (or
    its bound), then shows, then URL.
    """
    first = ibis.window(
        group_by=[log.query, log.url],
        order_by=[log.show.desc(), log.click.desc(), log.title, log.content],
    )
    rows = log.mutate(
        ctr=ibis.ifelse(log.show > 0, log.click / log.show.cast("float64"), ibis.null("float64")),
        copy_=ibis.row_number().over(first),
    )
    rows = rows.mutate(score_=_score(rows, rules))
    rows = rows.mutate(reason=_first_broken(rows, rules))
    if rules.best_per_query is None:
        return rows.drop("copy_", "score_")
    rank = ibis.row_number().over(
        group_by=[rows.query, rows.reason.isnull()],
        order_by=[rows.score_.desc(), rows.show.desc(), rows.url],
    )
    rows = rows.mutate(rank_=rank)
    beyond = rows.reason.isnull() & (rows.rank_ >= rules.best_per_query)
    rows = rows.mutate(reason=ibis.ifelse(beyond, "not_among_best", rows.reason))
    return rows.drop("copy_", "score_", "rank_")


def _first_broken(rows: ir.Table, rules: FilterRules) -> ir.StringValue:
    broken: dict[str, ir.BooleanValue] = {
        "repeated_pair": rows.copy_ > 0,
        "bad_url": ~rows.url.lower().re_search("^https?://[^/?#]"),
    }
    if "width" in rows.columns and "height" in rows.columns:
        short = ibis.least(rows.width, rows.height)
        broken["too_small"] = short < rules.min_side_px
        broken["bad_aspect"] = ibis.greatest(rows.width, rows.height) > rules.max_aspect * short
    for name in ("query", "title", "content"):
        words = word_count(rows[name])
        if name != "content":
            broken[f"{name}_too_short"] = words < rules.min_words
        broken[f"{name}_too_long"] = words > rules.max_words
    listed = listed_pattern(rules.listed_words)
    if listed is not None:
        hits = [rows[name].fill_null("").lower().re_search(listed) for name in ("query", "title", "content")]
        broken["listed_word"] = hits[0] | hits[1] | hits[2]
    broken["few_shows"] = rows.show < max(rules.min_show, 1)
    broken["low_ctr"] = rows.score_ < rules.min_ctr
    cases = [(broken[reason].fill_null(False), reason) for reason in REASONS if reason in broken]
    return ibis.cases(*cases, else_=ibis.null("string"))


def _score(rows: ir.Table, rules: FilterRules) -> ir.FloatingValue:
    """The CTR, or the lower end of its Wilson interval: (p + z²/2n - z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    if rules.ctr_bound == "point":
        return rows.ctr
    n, p, z = ibis.greatest(rows.show, 1).cast("float64"), rows.ctr, Z_95
    root = (p * (1 - p) / n + z * z / (4 * n * n)).sqrt()
    return (p + z * z / (2 * n) - z * root) / (1 + z * z / n)


def word_count(text: ir.StringValue) -> ir.IntegerValue:
    """Words of a text column, by the rule in this file's docstring; null counts 0."""
    apart = text.fill_null("").re_replace(f"[{CJK}]", " x ").re_replace(f"[{SPACE}{PUNCTUATION}]+", " ")
    return apart.re_replace("[^ ]+", "x").re_replace(" +", "").length()


def count_words(text: str) -> int:
    """The same rule for one Python string."""
    apart = re.sub(f"[{SPACE}{PUNCTUATION}]+", " ", re.sub(f"[{CJK}]", " x ", text))
    return sum(word != "" for word in apart.split(" "))


def listed_pattern(words: tuple[str, ...]) -> str | None:
    """One regular expression for lower-cased texts; None for an empty list."""
    lowered = sorted({word.lower() for word in words})
    whole = [word for word in lowered if re.fullmatch(f"[{LETTER}].*[{LETTER}]|[{LETTER}]", word)]
    anywhere = [word for word in lowered if word not in set(whole)]
    patterns = [_escaped(word) for word in anywhere]
    if whole:
        patterns.append(f"(^|[^{LETTER}])({'|'.join(map(_escaped, whole))})($|[^{LETTER}])")
    return "|".join(patterns) or None


def _escaped(word: str) -> str:
    return re.sub(r"[.*+?(){}|$]", lambda found: f"[{found[0]}]", word)


def read_listed_words(path: Path) -> tuple[str, ...]:
    """Words of a list file: UTF-8, one a line, # begins a comment line. DataError for a bad file."""
    if not path.is_file():
        raise DataError(f"{path}: no such word list. Check `listed_words` in the recipe, or set it to null.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte {error.start}. Write the word list as UTF-8."
        ) from error
    words = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        if re.search(r"[\\^\[\]]", word):
            raise DataError(
                f"{path}: line {number}: '{word}' holds one of \\ ^ [ ], which no listed word may."
            )
        words.append(word)
    if not words:
        raise DataError(
            f"{path}: the word list has no words. Set `listed_words` to null to filter without one."
        )
    return tuple(words)
