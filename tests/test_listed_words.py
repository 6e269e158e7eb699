"""Listed words: whole words or parts of a text, in any case, one list for all texts or one a language."""

from pathlib import Path

import ibis
import pytest

from data_tools.errors import DataError
from data_tools.log.listed_words import (
    WordLists,
    first_listed,
    holds_listed,
    listed_pattern,
    read_listed_words,
    read_word_lists,
)


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("a blorptox", True),
        ("BLORPTOX!", True),
        ("红blorptox红", True),
        ("blorptoxes", False),
        ("éblorptox", False),
        ("他说禁词了", True),
        ("c++ is", True),
        ("a.b", True),
        ("axb", False),
        ("one $x(1) two", True),
    ],
)
def test_listed_words_match_as_documented(text: str, hit: bool) -> None:
    lists = WordLists.of_all(("Blorptox", "禁词", "C++", "a.b", "$x(1)"))
    assert holds([text], lists) == [hit]
    assert (first_listed(text, lists) is not None) == hit


def test_case_is_that_of_every_alphabet_and_of_no_locale() -> None:
    lists = WordLists.of_all(("Ёлка", "σοφός", "istanbul", "straße"))
    texts = ["ЁЛКА", "ёлка!", "ΣΟΦΌΣ", "ISTANBUL", "İstanbul", "ıstanbul", "STRASSE", "Straße"]
    assert holds(texts, lists) == [True, True, True, True, False, False, False, True]


def test_a_text_is_held_against_the_list_of_its_language() -> None:
    lists = WordLists(han=("禁词", "bad"), other=("worse",))
    texts = ["bad", "worse", "worse 熊猫", "bad 熊猫", "有禁词", "ばかり worse", "𠀀 worse"]
    assert holds(texts, lists) == [False, True, False, True, True, True, False]
    assert holds(["bad", "禁词"], WordLists(han=("禁词",))) == [False, True]


def test_a_list_a_language_is_read_by_its_code(tmp_path: Path) -> None:
    for name, word in (("zh.txt", "禁词"), ("en.txt", "worse")):
        (tmp_path / name).write_text(f"{word}\n", encoding="utf-8")
    paths = {"zh": tmp_path / "zh.txt", "en": tmp_path / "en.txt"}
    assert read_word_lists(paths, "zh", "en") == WordLists(("禁词",), ("worse",))
    assert read_word_lists({"en": paths["en"]}, "zh", "en") == WordLists((), ("worse",))
    assert read_word_lists(paths["zh"], "zh", "en") == WordLists.of_all(("禁词",))
    assert not WordLists()


def holds(texts: list[str], lists: WordLists) -> list[bool]:
    table = ibis.memtable({"i": range(len(texts)), "text": texts})
    found = ibis.duckdb.connect().to_pyarrow(
        table.order_by("i").select(holds=holds_listed(table.text, lists))
    )
    return found["holds"].to_pylist()


def test_no_listed_words_is_no_pattern() -> None:
    assert listed_pattern(()) is None


def test_word_list_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# comment\n\n  one two \n词\n", encoding="utf-8")
    assert read_listed_words(path) == ("one two", "词")
    path.write_text("fine\nbad[word\n")
    with pytest.raises(DataError, match="line 2"):
        read_listed_words(path)
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match="no words"):
        read_listed_words(path)
    path.write_bytes("词".encode("gb18030"))
    with pytest.raises(DataError, match="invalid UTF-8"):
        read_listed_words(path)
    with pytest.raises(DataError, match="no such word list"):
        read_listed_words(tmp_path / "none.txt")
