"""The CSV of an annotation sheet: columns, verdicts, and texts that no spreadsheet takes for a formula.

A spreadsheet runs a cell that begins with = + - @ (a tab or a carriage return before it, or the full-width
form, do too). Such texts get an apostrophe before them, as do texts that already have one there, so that
`restored` gives back every text exactly. The script of the page (templates/sheet.js) does the same.
"""

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError

COLUMNS = ("id", "split", "key", "text", "label", "verdict", "corrected_text", "annotator", "note")
NEEDED = ("id", "verdict")  # of a sheet that is read back
VERDICTS = ("match", "no match", "drop")
_RISKY = "=+-@\t\r\n＝＋－＠"
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SEPARATORS = ",;\t"
_LARGEST_FIELD = 1 << 20  # characters
_BLOCK = 1 << 20  # bytes


def defused(text: str) -> str:
    """The text as a cell that no spreadsheet runs."""
    return f"'{text}" if text.lstrip("'").startswith(tuple(_RISKY)) else text


def restored(cell: str) -> str:
    """The text of a cell that `defused` made; any other cell as it is."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(tuple(_RISKY)) else cell


def header() -> str:
    """The first line: a mark by which Excel knows UTF-8, and the columns."""
    return "\ufeff" + line(COLUMNS)


def line(cells: tuple[str, ...]) -> str:
    """One line of a sheet, with its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue()


@dataclass(frozen=True)
class SheetLine:
    """What a line of a filled-in sheet says. `where` names the file and the line."""

    where: str
    id: str
    verdict: str  # one of VERDICTS, or "": not judged
    corrected_text: str
    annotator: str


def read_sheet(path: Path) -> Iterator[SheetLine]:
    """The lines of a filled-in sheet: UTF-8, or UTF-16 with its mark; separated by comma, semicolon or tab.

    A line without an annotator is the file's own: its name without the ending. Raises DataError naming file,
    line, column and value for another encoding, a missing or repeated column, a line of another length, an
    unknown verdict, or a corrected text beside a verdict other than match.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such sheet. Check `corrections` in the recipe.")
    csv.field_size_limit(_LARGEST_FIELD)
    with path.open(encoding=_encoding(path), newline="") as file:
        first = file.readline()
        separator = max(_SEPARATORS, key=first.count)
        file.seek(0)
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = _columns(path, next(lines, []))
            before = lines.line_num
            for cells in lines:
                where, before = f"{path}: line {before + 1}", lines.line_num
                if any(cell.strip() for cell in cells):
                    yield _read_line(path, where, names, cells)
        except csv.Error as error:
            raise DataError(
                f"{path}: line {lines.line_num}: {error}. Quote fields that hold the separator, a quote or a "
                "line break, and double the quotes inside them."
            ) from error


def _encoding(path: Path) -> str:
    """The encoding of a file, read through once. DataError names the line of what is in none of them."""
    with path.open("rb") as file:
        start = file.read(4)
        encoding = next((name for mark, name in _BOMS if start.startswith(mark)), "utf-8")
        file.seek(0)
        decoder = codecs.getincrementaldecoder(encoding)()
        number, block = 1, b"more"
        while block:
            block = file.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, "replace")
                found = error.object[error.start : error.start + 4].hex(" ")
                raise DataError(
                    f"{path}: line {number + before.count(chr(10))}: invalid "
                    f"{encoding.upper().removesuffix('-SIG')} ({found}). Save the sheet as “CSV UTF-8”, or "
                    "turn it over with `iconv -f GB18030 -t UTF-8`."
                ) from error
            if "\0" in text:
                number += text[: text.index("\0")].count("\n")
                raise DataError(
                    f"{path}: line {number}: a NUL character: not a text file, or UTF-16 without its mark. "
                    "Save the sheet as “CSV UTF-8”."
                )
            number += text.count("\n")
    return encoding


def _columns(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise DataError(
            f"{path}: line 1: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; it has "
            f"{', '.join(names)[:200] or 'nothing'}. The first line must be {','.join(COLUMNS)}"
        )
    twice = sorted({name for name in names if name in COLUMNS and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: line 1: column {twice[0]} stands twice. Take one of them out.")
    return names


def _read_line(path: Path, where: str, names: list[str], cells: list[str]) -> SheetLine:
    if len(cells) != len(names):
        raise DataError(
            f"{where}: {len(cells)} fields, but {len(names)} columns. Quote fields that hold the separator."
        )
    values = dict(zip(names, cells, strict=True))
    verdict = " ".join(values["verdict"].split()).lower()
    text = restored(values.get("corrected_text", "")).strip()
    if not values["id"].strip():
        raise DataError(f"{where}: column id is empty. Take the ids from the sheet, one a line.")
    if verdict not in ("", *VERDICTS):
        raise DataError(
            f"{where}: column verdict: '{values['verdict'][:80]}' is none of {', '.join(VERDICTS)}. "
            "Write one of them, or leave it empty where the pair is not judged."
        )
    if text and verdict != "match":
        raise DataError(
            f"{where}: column corrected_text: '{text[:80]}' stands beside the verdict '{verdict}'. A "
            "corrected text is the picture's: write match as the verdict, or empty the text."
        )
    annotator = restored(values.get("annotator", "")).strip() or path.stem
    return SheetLine(where, values["id"].strip(), verdict, text, annotator)
