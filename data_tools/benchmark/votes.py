"""What annotators say of the pairs of a benchmark: their votes, the majority, how far they agree.

The verdict with the most votes counts; where two have as many, the pair is `undecided` and dropped. Among the
votes for `match` the same holds for the text (the pair's own, or a corrected one). A pair without votes stays
as it is. Fleiss' kappa is taken over the pairs with two votes or more, whatever their number; Cohen's between
every two annotators over the pairs that both judged.

Memory: DuckDB groups out of core; Python holds the votes on one pair at a time, and a number for every two
annotators.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from ibis.backends.duckdb import Backend

from data_tools.benchmark.pairs import read_rows, write_rows
from data_tools.benchmark.sheet_csv import VERDICTS, SheetLine, read_sheet
from data_tools.errors import DataError
from data_tools.log.rules import count_words
from data_tools.text_forms import same_form

UNDECIDED = "undecided"
_VOTES = pa.schema(
    {name: pa.string() for name in ("id", "annotator", "verdict", "corrected_text", "where")}
    | {"number": pa.int64()}
)
DECISIONS = pa.schema(
    {
        "id": pa.string(),
        "verdict": pa.string(),  # of VERDICTS, or UNDECIDED
        "corrected_text": pa.string(),  # null: the pair's own
        "corrected_same": pa.string(),
        "votes": pa.int64(),
    }
)


def write_votes(paths: Sequence[Path], words: tuple[int, int], path: Path) -> int:
    """All votes of filled-in sheets into one Parquet file; how many lines have no verdict.

    `paths`: CSV files, and folders of which all *.csv are read. `words`: the least and the most words of a
    corrected text. Raises DataError: see `read_sheet`.
    """
    blank = 0

    def votes() -> Iterator[dict[str, Any]]:
        nonlocal blank
        number = 0
        for sheet in _sheets(paths):
            for line in read_sheet(sheet):
                if not line.verdict:
                    blank += 1
                    continue
                _check_words(line, words)
                number += 1
                yield {**vars(line), "corrected_text": line.corrected_text or None, "number": number}

    write_rows(votes(), _VOTES, path)
    return blank


def _sheets(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: no *.csv in this folder. Check `corrections` in the recipe.")
        yield from found


def _check_words(line: SheetLine, words: tuple[int, int]) -> None:
    if line.corrected_text and not words[0] <= count_words(line.corrected_text) <= words[1]:
        raise DataError(
            f"{line.where}: column corrected_text: '{line.corrected_text[:80]}' has "
            f"{count_words(line.corrected_text)} words; allowed: {words[0]} … {words[1]} "
            "(min_words, max_words)"
        )


def check_votes(connection: Backend, votes: Path, pairs: Path) -> None:
    """DataError for an id that no pair has, and for an annotator who says two things of one pair."""
    said = connection.read_parquet(votes)
    known = connection.read_parquet(pairs)
    unknown = connection.to_pyarrow(said.anti_join(known, "id").order_by("number").limit(1)).to_pylist()
    if unknown:
        raise DataError(
            f"{unknown[0]['where']}: column id: '{unknown[0]['id'][:80]}' is of no pair of this set. The "
            "sheet was made with another set, seed, corpus or rule; give one that this stage wrote."
        )
    opinion = said.verdict + "\0" + said.corrected_text.fill_null("")
    twice = (
        said.mutate(opinion=opinion)
        .group_by(["id", "annotator"])
        .agg(opinions=lambda t: t.opinion.nunique(), last=lambda t: t.number.max())
        .filter(lambda t: t.opinions > 1)
    )
    first = said.join(twice, said.number == twice["last"]).order_by("number").limit(1)
    found = connection.to_pyarrow(first.select(said.id, said.annotator, said["where"])).to_pylist()
    if found:
        raise DataError(
            f"{found[0]['where']}: annotator '{found[0]['annotator'][:80]}' said something else of "
            f"{found[0]['id']} before. Take one of the two lines out."
        )


def write_decisions(connection: Backend, votes: Path, scratch: Path, path: Path) -> dict[str, Any]:
    """One decision for each pair with votes; the agreement: see `Agreement.summary`."""
    said = connection.read_parquet(votes).select("id", "annotator", "verdict", "corrected_text").distinct()
    connection.to_parquet(said.order_by("id", "annotator"), scratch)
    agreement = Agreement()

    def decisions() -> Iterator[dict[str, Any]]:
        for identity, group in groupby(read_rows(scratch), key=lambda row: row["id"]):
            rows = list(group)
            agreement.add({row["annotator"]: row["verdict"] for row in rows})
            verdict, text = decide([(row["verdict"], row["corrected_text"]) for row in rows])
            yield {
                "id": identity,
                "verdict": verdict,
                "corrected_text": text,
                "corrected_same": None if text is None else same_form(text),
                "votes": len(rows),
            }

    write_rows(decisions(), DECISIONS, path)
    return agreement.summary()


def decide(votes: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """The verdict of the majority and its text (None: the pair's own), or UNDECIDED for a tie of either."""
    verdict = _most([verdict for verdict, _ in votes])
    if verdict is None:
        return UNDECIDED, None
    texts = [text or "" for one, text in votes if one == verdict]
    text = _most(texts)
    return (UNDECIDED, None) if text is None else (verdict, text or None)


def _most(values: Sequence[str]) -> str | None:
    """The value that occurs most often; None where two do."""
    ranked = Counter(values).most_common(2)
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


class Agreement:
    """Counts from which the kappas are taken; a pair's verdicts are added one pair at a time."""

    def __init__(self) -> None:
        self._judged: Counter[str] = Counter()
        self._between: defaultdict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
        self._verdicts: Counter[str] = Counter()  # of pairs with two votes or more
        self._pairs = 0
        self._agreed = 0.0

    def add(self, verdicts: Mapping[str, str]) -> None:
        """The verdicts on one pair by annotator."""
        names = sorted(verdicts)
        self._judged.update(names)
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                self._between[one, other][verdicts[one], verdicts[other]] += 1
        count = len(names)
        if count > 1:
            by_verdict = Counter(verdicts.values())
            self._verdicts.update(by_verdict)
            self._pairs += 1
            self._agreed += sum(n * (n - 1) for n in by_verdict.values()) / (count * (count - 1))

    def summary(self) -> dict[str, Any]:
        """{annotators: {name: pairs}, pairs_judged_twice, fleiss_kappa, between: [{annotators, pairs, agreed,
        cohen_kappa}]}; a kappa is null where it is not defined: no such pairs, or one verdict alone."""
        total = sum(self._verdicts.values())
        by_chance = sum((n / total) ** 2 for n in self._verdicts.values()) if total else 1.0
        return {
            "annotators": dict(sorted(self._judged.items())),
            "pairs_judged_twice": self._pairs,
            "fleiss_kappa": _kappa(self._agreed / self._pairs, by_chance) if self._pairs else None,
            "between": [_between(names, table) for names, table in sorted(self._between.items())],
        }


def _between(names: tuple[str, str], table: Counter[tuple[str, str]]) -> dict[str, Any]:
    count = sum(table.values())
    agreed = sum(n for (one, other), n in table.items() if one == other) / count
    by_chance = 0.0
    for verdict in VERDICTS:
        ones = sum(n for (one, _), n in table.items() if one == verdict)
        others = sum(n for (_, other), n in table.items() if other == verdict)
        by_chance += ones * others / count**2
    return {
        "annotators": list(names),
        "pairs": count,
        "agreed": agreed,
        "cohen_kappa": _kappa(agreed, by_chance),
    }


def _kappa(agreed: float, by_chance: float) -> float | None:
    return None if by_chance >= 1 else (agreed - by_chance) / (1 - by_chance)
