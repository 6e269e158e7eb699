"""Listed words: lists of words that no text may hold, one for all texts or one a language, as regular
expressions.

A word written in Latin, Greek or Cyrillic letters matches as a whole word; any other word (say a Chinese one,
which has no spaces around it) matches anywhere in the text; both in upper and lower case.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir

from data_tools.errors import DataError

LETTER = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"  # what makes a listed word a "whole" word
HAN = "\u3400-\u9fff\U00020000-\U0010ffff"  # data_tools.records.Languages calls a text with one of these Han


@dataclass(frozen=True)
class WordLists:
    """Words for texts with a Han character, and words for all others; the same words in both where there is
    one list for all."""

    han: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @classmethod
    def of_all(cls, words: tuple[str, ...]) -> "WordLists":
        return cls(words, words)

    def __bool__(self) -> bool:
        return bool(self.han or self.other)


def holds_listed(text: ir.StringValue, lists: WordLists) -> ir.BooleanValue:
    """Whether a text (not null) holds a word of its list."""
    han, other = (listed_pattern(words) for words in (lists.han, lists.other))
    if han == other:
        return _holds(text, han)
    return ibis.ifelse(text.re_search(f"[{HAN}]"), _holds(text, han), _holds(text, other))


def first_listed(text: str, lists: WordLists) -> str | None:
    """The first word of its list that one Python string holds, or None."""
    words = lists.han if re.search(f"[{HAN}]", text) else lists.other
    return next((word for word in words if re.search(str(listed_pattern((word,))), text)), None)


def _holds(text: ir.StringValue, pattern: str | None) -> ir.BooleanValue:
    return ibis.literal(False) if pattern is None else text.re_search(pattern)


def listed_pattern(words: tuple[str, ...]) -> str | None:
    """One regular expression; None for an empty list."""
    distinct = sorted({word.lower() for word in words})
    whole = [word for word in distinct if re.fullmatch(f"[{LETTER}](.*[{LETTER}])?", word)]
    anywhere = [word for word in distinct if word not in set(whole)]
    patterns = [_in_any_case(word) for word in anywhere]
    if whole:
        patterns.append(f"(?:^|[^{LETTER}])(?:{'|'.join(map(_in_any_case, whole))})(?:$|[^{LETTER}])")
    return "|".join(patterns) or None


def _in_any_case(word: str) -> str:
    """Each letter as the class of its cases: (?i) and lower() mean other letters in other engines."""
    return "".join(_cases(character) for character in word)


def _cases(character: str) -> str:
    lower, upper = character.lower(), character.upper()
    cases = sorted({c for c in (character, lower, upper, upper.lower()) if len(c) == 1})
    return f"[{''.join(cases)}]" if len(cases) > 1 or character in ".*+?(){}|$" else character


def read_word_lists(paths: Path | Mapping[str, Path], han: str, other: str) -> WordLists:
    """The lists of a recipe: one file for all texts, or one a language (`han`, `other`: the two codes)."""
    if isinstance(paths, Path):
        return WordLists.of_all(read_listed_words(paths))
    words = {code: read_listed_words(path) for code, path in paths.items()}
    return WordLists(words.get(han, ()), words.get(other, ()))


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
