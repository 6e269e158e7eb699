"""What an importer is given and what it yields: a Source, and rows or dropped entries, one at a time.

Rows come in the order of the files. Nothing here holds more than a row; what an importer itself must hold
(the answers of a question file, the list of NUS-WIDE's pictures) grows with the number of pictures of a set
that people annotated, never with a list from the web.
"""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote

from data_tools.errors import DataError

# Each dropped entry has exactly one of these. Anything else that is wrong with a file is an error.
REASONS = {
    "bad_line": "a line of a list from the web that has not the fields, the JSON or the UTF-8 of its format",
    "no_text": "an empty caption, query or sentence",
    "no_picture": "no URL, or no name of a picture",
    "no_answer": "a question without an answer",
    "no_class": "none of the classes that are kept",
    "no_split": "split lists were given, and none of them names the picture",
    "no_features": "a video without a file of features",
    "no_score": "a pair of sentences that nobody scored",
    "beyond_first": "after the first `first` pictures of the file",
}

MAX_BAD_SHARE = (
    0.01  # of the lines of a list from the web: more, and it is another file than it is said to be
)
FEW_BAD_LINES = 10  # so many are let pass in a short list


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with texts or classes: a row of pairs.parquet before the source's own values are added.
    `split` and `licence` None: the source's."""

    url: str
    captions: tuple[str, ...] = ()
    query: str = ""
    title: str = ""
    content: str = ""
    show: int = 0
    click: int = 0
    classes: tuple[str, ...] = ()
    split: str | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """An entry that is left out: its reason (a key of REASONS), and where it stood."""

    reason: str
    where: str  # file and line, or file and member
    url: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class TextPair:
    """Two sentences and how alike people found them, 0 to 5."""

    text_a: str
    text_b: str
    score: float
    split: str | None = None


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """One video: its file of features, (frames, width), and its captions."""

    key: str
    features: Path
    captions: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class Options:
    """What some formats let a recipe choose; `Format.options` names those of each."""

    first: int | None = None  # only the first so many pictures
    most_frequent: int | None = None  # only the so many classes that most pictures have
    answers: Literal["short", "full"] = "short"
    narrow_classes: bool = False


@dataclass(frozen=True)
class Source:
    """One source of an ingest: its files by role, and what holds for all its rows."""

    name: str
    files: Mapping[str, tuple[Path, ...]]
    lang: str
    licence: str  # as the format's authors state it, or as the recipe says
    images: str = ""  # the URL that the names of the pictures are put behind; ends with /
    split: str | None = None
    options: Options = field(default_factory=Options)
    licence_of_rows: bool = True  # a row may state its own; not where the recipe says one

    def file(self, role: str) -> Path:
        """The one file of a role."""
        return self.files[role][0]

    def url(self, name: str) -> str:
        """The URL of a picture that a file names by its path."""
        return self.images + quote(name.lstrip("/"))


def open_file(path: Path) -> BinaryIO:
    """The file, opened; DataError where there is none or it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}). Check `sources` in the recipe."
        ) from error


def web_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Numbers and texts of the lines, without their ends; None for a line that is not UTF-8.

    A line ends with LF or CR LF, nothing else; a byte order mark at the head is skipped.
    """
    with open_file(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None


def sure_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The same for a file that people made: a line that is not UTF-8 is a DataError. Empty lines are kept."""
    for number, text in web_lines(path):
        if text is None:
            raise DataError(
                f"{path}: line {number}: invalid UTF-8. Fetch the file again, or write it as UTF-8."
            )
        yield number, text


def names_in(path: Path) -> list[str]:
    """The lines of a list of names, without blanks around them and without empty ones."""
    return [name for _, text in sure_lines(path) if (name := text.strip())]


class BadLines:
    """The lines of a list from the web that cannot be read. A few are known to be there; many are another
    file."""

    def __init__(self, path: Path, layout: str) -> None:
        self._path, self._layout = path, layout
        self._count, self._first = 0, ""

    def drop(self, line: int, problem: str) -> Dropped:
        """One more of them."""
        self._count += 1
        self._first = self._first or f"line {line}: {problem}"
        return Dropped("bad_line", f"{self._path.name}: line {line}", text=problem)

    def check(self, lines: int) -> None:
        """DataError where too many of `lines` lines were bad, or all."""
        allowed = max(FEW_BAD_LINES, int(lines * MAX_BAD_SHARE))
        if self._count > allowed or (self._count and self._count == lines):
            raise DataError(
                f"{self._path}: {self._count} of {lines} lines are not {self._layout}; the first: "
                f"{self._first}. Is it the file of this format? Check `sources` in the recipe."
            )


def member(entry: Any, name: str, kind: type[Any] | tuple[type[Any], ...], where: str) -> Any:
    """A member of a JSON object; DataError where it is missing or of another type."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        found = "is missing" if value is None else f"is {str(value)[:40]!r}"
        raise DataError(
            f"{where}: '{name}' {found}; it must be of type {' or '.join(k.__name__ for k in kinds)}. "
            "Is it the file of this format? Check `sources` in the recipe."
        )
    return value
