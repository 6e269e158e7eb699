"""The filter of a click log as Ibis expressions: every row gets its measures, and at most one reason to be
dropped.

`measure` does what costs (texts are read once); `decide` compares its numbers with the limits, so that other
limits can be tried on stored measures (`tandem corpus whatif`) with the same result as a new run. `judge` is
both.

The same expressions run on DuckDB and on Spark and give the same rows, so they keep to what both read alike:
regular expressions without backslashes, groups that repeat (Java's recurse and overflow on a long text) or
lower() (Java and DuckDB differ beyond ASCII), an explicit place for nulls in every order, doubles as
fractions of whole numbers, and hashes by SHA-256.

Words. A Han character, a kana or a bopomofo letter is one word each; all other text splits at white space and
at CJK punctuation. So "红色 panda 2024" has 4 words (红, 色, panda, 2024), "hello, world" 2, "你好，世界" 4.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import ibis
import ibis.expr.types as ir

from data_tools.log.listed_words import WordLists, holds_listed

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
    "not_in_subset": "the picture was not drawn for the subset",
}

# Written as ranges of characters, not as \p{…}, so that RE2, Java and Python read the same.
CJK = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"  # noqa: E501
_RARE_SPACE = "\t\n\x0b\x0c\r\x85\u00a0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
SPACE = " " + _RARE_SPACE
PUNCTUATION = "\u3001-\u3004\u3008-\u3020\u302a-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
PUNCTUATION += "\u2018-\u201f\u2026"

Z_95 = 1.959963984540054
DRAW_DIGITS = 8  # hexadecimal digits of a picture's draw: shares are exact to 2^-32


@dataclass(frozen=True)
class Subset:
    """A seeded sample of pictures; see `in_subset`."""

    share: float
    seed: int = 0


@dataclass(frozen=True)
class FilterRules:
    """The numbers of the filter. `ctr_bound`: judge by the CTR itself (`point`), or by the lower end of its
    95 % Wilson interval (`wilson`), which asks more of rows with few shows."""

    min_show: int = 20
    min_ctr: float = 0.1
    ctr_bound: Literal["point", "wilson"] = "point"
    best_per_query: int | None = 10
    min_words: int = 2
    max_words: int = 128
    listed_words: WordLists = field(default_factory=WordLists)
    min_side_px: int = 100
    max_aspect: float = 4.0
    subset: Subset | None = None


def judge(log: ir.Table, rules: FilterRules) -> ir.Table:
    """The log's rows with their measures, `ctr` (null where show is 0) and `reason` (null for a kept row).

    Rows are neither added nor lost, and depend on the other rows of their query alone. `not_among_best` ranks
    only the rows that broke no rule before it: by CTR (or its bound), then shows, then URL.
    """
    return decide(measure(log, rules), rules, last="url")


# -------------------------------------------------------------------------------------------------- measures


def measure(log: ir.Table, rules: FilterRules) -> ir.Table:
    """The log's rows with what `decide` reads of them beside show, click, width and height: `copy`,
    `bad_url`, `query_words`, `title_words`, `content_words`, `listed` where there are lists, `draw` where
    there is a subset.

    `copy` numbers the rows of one query and URL, the one to keep first (0): the most shows, then clicks, then
    the smaller title and content (and width and height), so that it is the same row in every engine.
    """
    texts = {name: log[name].fill_null("") for name in ("query", "title", "content")}
    columns: dict[str, ir.Value] = {
        "copy": _copy(log),
        "bad_url": ~log.url.re_search("^[Hh][Tt][Tt][Pp][Ss]?://[^/?#]"),
        **{f"{name}_words": word_count(text) for name, text in texts.items()},
    }
    if rules.listed_words:
        hits = [holds_listed(text, rules.listed_words) for text in texts.values()]
        columns["listed"] = hits[0] | hits[1] | hits[2]
    if rules.subset is not None:
        columns["draw"] = draw(log.url, rules.subset.seed)
    return log.mutate(**columns)


def _copy(log: ir.Table) -> ir.IntegerValue:
    sizes = [log[name].asc(nulls_first=False) for name in ("width", "height") if name in log.columns]
    texts = [log[name].asc(nulls_first=False) for name in ("title", "content")]
    best_first = [log.show.desc(nulls_first=False), log.click.desc(nulls_first=False), *texts, *sizes]
    return ibis.row_number().over(ibis.window(group_by=[log.query, log.url], order_by=best_first))


def word_count(text: ir.StringValue) -> ir.IntegerValue:
    """Words of a text column, by the rule in this file's docstring; null counts 0. `count_words` is the plain
    rule; here most texts are told by their length and their spaces, as a replacement a word costs ten times
    as much."""
    text = text.fill_null("")
    apart = f"{CJK}{SPACE}{PUNCTUATION}"
    characters_alone = ~text.re_search(f"[^{CJK}]")
    separated_characters = ~text.re_search(f"[^{apart}]")
    spaced_simply = ~text.re_search(f"[{CJK}{_RARE_SPACE}{PUNCTUATION}]|  |^ | $")
    words_as_x = text.re_replace(f"[^{apart}]+", "x").re_replace(f"[{SPACE}{PUNCTUATION}]+", "")
    # The word at the end takes up the separators before it, so that an x a word is all that is left.
    each_as_x = (text + " x").re_replace(f"[{SPACE}{PUNCTUATION}]*(?:[{CJK}]|[^{apart}]+)", "x")
    return ibis.cases(
        (characters_alone, text.length()),
        (separated_characters, text.re_replace(f"[{SPACE}{PUNCTUATION}]+", "").length()),
        (spaced_simply, text.length() - text.replace(" ", "").length() + 1),
        (text.re_search(f"[{CJK}]"), words_as_x.length()),
        else_=each_as_x.length() - 1,
    )


def count_words(text: str) -> int:
    """The same rule for one Python string."""
    apart = re.sub(f"[{SPACE}{PUNCTUATION}]+", " ", re.sub(f"[{CJK}]", " x ", text))
    return sum(word != "" for word in apart.split(" "))


def draw(url: ir.StringValue, seed: int) -> ir.StringValue:
    """A number drawn for a picture from its URL and a seed, as DRAW_DIGITS hexadecimal digits."""
    return (ibis.literal(f"{seed}:") + url).hexdigest("sha256").left(DRAW_DIGITS)


# -------------------------------------------------------------------------------------------------- decisions


def decide(rows: ir.Table, rules: FilterRules, last: str) -> ir.Table:
    """Measured rows with `ctr` and `reason`. Rows of one query are equal in the column `query`; the column
    `last` orders those of one query, CTR and shows."""
    rows = decide_alone(rows, rules)
    # Two windows over all rows, not a join or a union of parts: Spark would compute the measures a part.
    late = ibis.ifelse(rows.reason.isnull(), late_reason(rows, rules, last), rows.reason)
    return rows.mutate(reason=late).drop("score")


def decide_alone(rows: ir.Table, rules: FilterRules) -> ir.Table:
    """The reasons that a row has by itself; `ctr`, and `score`, what it is ranked by."""
    ctr = ibis.ifelse(rows.show > 0, rows.click / rows.show.cast("float64"), ibis.null("float64"))
    rows = rows.mutate(ctr=ctr)
    rows = rows.mutate(score=_score(rows, rules))
    return rows.mutate(reason=_first_broken(rows, rules))


def late_reason(rows: ir.Table, rules: FilterRules, last: str) -> ir.StringValue:
    """The reasons that come after all others, of rows that have none so far: not_among_best by the rank among
    those of its query, not_in_subset by the picture's draw."""
    cases: list[tuple[ir.BooleanValue, str]] = []
    if rules.best_per_query is not None:
        cases.append((rank_in_query(rows, last) >= rules.best_per_query, "not_among_best"))
    if rules.subset is not None:
        cases.append((~in_subset(rows.draw, rules.subset), "not_in_subset"))
    return ibis.cases(*cases, else_=ibis.null("string")) if cases else ibis.null("string")


def rank_in_query(rows: ir.Table, last: str) -> ir.IntegerValue:
    """0 for the best row of a query among those that have no reason (or among those that have one): the
    highest score, then the most shows, then the smallest `last`."""
    best_first = [
        rows.score.desc(nulls_first=False),
        rows.show.desc(nulls_first=False),
        rows[last].asc(nulls_first=False),
    ]
    window = ibis.window(group_by=[rows["query"], rows.reason.isnull()], order_by=best_first)
    return ibis.row_number().over(window)


def in_subset(drawn: ir.StringValue, subset: Subset) -> ir.BooleanValue:
    """Whether a picture is in the subset: its draw is under `share`.

    A picture is drawn with all its rows, by its URL and the seed alone: it does not matter what else is in
    the log, which engine runs, or how many pictures there are; a smaller share is a part of a larger one.
    This keeps the query distribution: each query, rare or frequent, has the same expected share of its
    pictures drawn, so a query's part of the subset's rows differs from its part of all rows by the chance of
    independent draws alone (a query with n pictures keeps n·share ± √(n·share·(1 - share)) of them).
    """
    threshold = round(subset.share * 16**DRAW_DIGITS)
    if threshold >= 16**DRAW_DIGITS:
        return ibis.literal(True)
    return drawn < f"{threshold:0{DRAW_DIGITS}x}"


def _first_broken(rows: ir.Table, rules: FilterRules) -> ir.StringValue:
    broken: dict[str, ir.BooleanValue] = {"repeated_pair": rows["copy"] > 0, "bad_url": rows.bad_url}
    if "width" in rows.columns and "height" in rows.columns:
        short = ibis.least(rows.width, rows.height)
        long = ibis.greatest(rows.width, rows.height)
        broken["too_small"] = short < rules.min_side_px
        broken["bad_aspect"] = long > exactly(rules.max_aspect) * short
    for name in ("query", "title", "content"):
        words = rows[f"{name}_words"]
        if name != "content":
            broken[f"{name}_too_short"] = words < rules.min_words
        broken[f"{name}_too_long"] = words > rules.max_words
    if rules.listed_words:
        broken["listed_word"] = rows.listed
    broken["few_shows"] = rows.show < max(rules.min_show, 1)
    broken["low_ctr"] = rows.score < exactly(rules.min_ctr)
    cases = [(broken[reason].fill_null(False), reason) for reason in REASONS if reason in broken]
    return ibis.cases(*cases, else_=ibis.null("string"))


def _score(rows: ir.Table, rules: FilterRules) -> ir.FloatingValue:
    """The CTR, or the lower end of its Wilson interval: (p + z²/2n - z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    if rules.ctr_bound == "point":
        return rows.ctr
    n, p = ibis.greatest(rows.show, 1).cast("float64"), rows.ctr
    z, z_squared = exactly(Z_95), exactly(Z_95 * Z_95)
    root = (p * (1 - p) / n + z_squared / (4 * n * n)).sqrt()
    return (p + z_squared / (2 * n) - z * root) / (1 + z_squared / n)


def exactly(number: float) -> ir.FloatingValue:
    """A double that every engine reads to its last bit: decimals of 16 digits and more are not all read
    alike, quotients of whole numbers are."""
    above, below = number.as_integer_ratio()
    if below >= 2**63:  # under 10^-3 with many digits
        return ibis.literal(number).cast("float64")
    return ibis.literal(above).cast("float64") / ibis.literal(below).cast("float64")
