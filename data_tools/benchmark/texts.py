"""The one text of a picture in a benchmark made from a log, and when two texts are too near for a negative.

Zero, Sec. 2.2. ICM and ICR ask for "a corresponding caption text, which describes the image in detail", whose
"less relevant pairs" were filtered out by "the number of clicks": that is the log's content ("a detailed
description surrounding the image on the web page", Appendix A; the captions shown in Figure B are such), and
the title where there is no usable content. IQM and IQR "randomly select queries in the candidate set after
performing the cleaning": a query is drawn among the picture's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.log.rules import count_words
from data_tools.splits import unit_hash
from data_tools.text_forms import same_form

SetName = Literal["icm", "iqm", "icr", "iqr"]
_BYTES_WITHIN = 6  # least UTF-8 length of a text that is near to those that hold it: two Han characters
_LIKENESS = 0.5  # Jaccard index of pairs of characters from which two texts are near


@dataclass(frozen=True)
class Benchmark:
    """What a set is: whether it asks for match or no match, its texts, and the paper's number of pairs."""

    matching: bool
    queries: bool
    pairs: int


SETS: dict[str, Benchmark] = {
    "icm": Benchmark(matching=True, queries=False, pairs=400_000),
    "iqm": Benchmark(matching=True, queries=True, pairs=400_000),
    "icr": Benchmark(matching=False, queries=False, pairs=200_000),
    "iqr": Benchmark(matching=False, queries=True, pairs=200_000),
}


@dataclass(frozen=True)
class TextRules:
    """Which text of a record is taken. `captions`: fields, the first that has a usable text gives it."""

    queries: bool
    captions: tuple[str, ...] = ("content", "title")
    min_click: int = 1
    min_words: int = 2
    max_words: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """The text of a picture, or the reason why it has none."""

    text: str = ""
    lang: str = ""
    click: int = 0  # of the pair: the picture's for a caption, the query's own for a query
    reason: str | None = None


def set_of(key: str, sets: Sequence[str]) -> str:
    """Which of `sets` a picture belongs to: the same for every seed, so that sets never share a picture.

    The shares are as the paper's sizes: ICM and IQM get twice as many as ICR and IQR.
    """
    names = sorted(set(sets))
    place = unit_hash(0, "benchmark", key) * sum(SETS[name].pairs for name in names)
    for name in names[:-1]:
        place -= SETS[name].pairs
        if place < 0:
            return name
    return names[-1]


def choose_text(record: dict[str, Any], rules: TextRules) -> Chosen:
    """The caption, or the query drawn for this key; else `few_clicks`, `no_text` or `bad_length`."""
    found = list(_queries(record) if rules.queries else _captions(record, rules.captions))
    if not found:
        return Chosen(reason="no_text")
    found = [one for one in found if one.click >= rules.min_click]
    if not found:
        return Chosen(reason="few_clicks")
    found = [one for one in found if rules.min_words <= count_words(one.text) <= rules.max_words]
    if not found:
        return Chosen(reason="bad_length")
    if not rules.queries:
        return found[0]
    return min(found, key=lambda one: (unit_hash(rules.seed, record["key"], one.text), one.text))


def _captions(record: dict[str, Any], fields: Sequence[str]) -> Iterator[Chosen]:
    for field in fields:
        text = (record.get(field) or "").strip()
        if text:
            yield Chosen(text, record.get("lang") or "", int(record.get("click") or 0))


def _queries(record: dict[str, Any]) -> Iterator[Chosen]:
    for query in record.get("queries") or []:
        text = query["text"].strip()
        if text:
            yield Chosen(text, query.get("lang") or "", int(query.get("click") or 0))


def own_texts(record: dict[str, Any]) -> list[str]:
    """All that is said of a picture, in one form (text_forms.py), sorted: none of it may be its negative."""
    texts = [record.get("title") or "", record.get("content") or ""]
    for field in ("other_titles", "other_contents", "queries", "captions"):
        texts += [one["text"] if isinstance(one, dict) else one for one in record.get(field) or []]
    return sorted({same_form(text) for text in texts if text.strip()})


def near(one: str, other: str) -> bool:
    """Whether two forms say about the same: equal, one within the other, or half of their pairs of
    characters in common."""
    short, long = sorted((one, other), key=len)
    if short == long:
        return True
    if short in long and len(short.encode()) >= _BYTES_WITHIN:
        return True
    ours, theirs = _bigrams(short), _bigrams(long)
    together = len(ours | theirs)
    return together > 0 and len(ours & theirs) >= _LIKENESS * together


def _bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}
