"""The files of a click log: which they are, their columns and types, and text files made into Parquet.

A log is one file, a folder of Parquet parts, or a glob (`logs/day-*.parquet`) of files of one kind, with the
same columns. Text files (.csv, .tsv) are always parsed by DuckDB's strict reader, whichever engine judges
them: what a quote or a line break means is settled once.
"""

import codecs
import csv
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import DataError

TEXTS = ("query", "url", "title", "content")
COUNTS = ("show", "click")
SIZES = ("width", "height")
REQUIRED = TEXTS + COUNTS
SEPARATORS = {".csv": ",", ".tsv": "\t"}


class ClickLogError(DataError):
    """A click log that cannot be read as it is."""


@dataclass(frozen=True)
class LogFile:
    """One file of the log. `parquet` holds its rows in order; it is `path` itself, or made from it. `types`:
    of the columns that a click log may have."""

    path: Path
    parquet: Path
    types: dict[str, str]
    rows: int

    @property
    def separator(self) -> str | None:
        """Of a text file; None for Parquet."""
        return SEPARATORS.get(self.path.suffix.lower())


def find_log_files(path: Path) -> list[Path]:
    """The files that `click_log` names, in the order of their names. ClickLogError if there are none, or if
    they are of several kinds."""
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(path.rglob("*.parquet"))
        if not found:
            raise ClickLogError(f"{path}: no .parquet file in this folder. Check `click_log` in the recipe.")
    else:
        named = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = sorted(Path(name) for name in named if Path(name).is_file())
        if not found:
            raise ClickLogError(f"{path}: no such click log. Check `click_log` in the recipe.")
    suffixes = {file.suffix.lower() for file in found}
    if not suffixes <= {*SEPARATORS, ".parquet"}:
        odd = next(file for file in found if file.suffix.lower() not in {*SEPARATORS, ".parquet"})
        raise ClickLogError(
            f"{odd}: '{odd.suffix}' is no ending of a click log; allowed: .csv, .tsv, .parquet"
        )
    if len(suffixes) > 1:
        raise ClickLogError(f"{path}: files of several kinds ({', '.join(sorted(suffixes))}). Name one kind.")
    return found


def open_log_files(path: Path, scratch: Path) -> list[LogFile]:
    """Look at every file: its columns, types and number of rows; text files are made into Parquet in
    `scratch`. Raises ClickLogError."""
    files = []
    for number, file in enumerate(find_log_files(path)):
        separator = SEPARATORS.get(file.suffix.lower())
        if separator is None:
            files.append(_look_at_parquet(file))
        else:
            files.append(_parse_text(file, separator, scratch / f"log-{number:05}.parquet"))
        _check_alike(files[-1], files[0])
    if not any(file.rows for file in files):
        raise ClickLogError(f"{path}: the click log has zero rows. Write at least one row under the header.")
    return files


def _check_alike(file: LogFile, first: LogFile) -> None:
    """An engine reads all files by the types of one: a double read as a whole number would be rounded."""
    if file.types.keys() != first.types.keys():
        raise ClickLogError(
            f"{file.path}: width and height stand in one of this file and {first.path.name} alone. Give them "
            "to all files of a log, or to none."
        )
    for column, kind in file.types.items():
        if kind != first.types[column]:
            raise ClickLogError(
                f"{file.path}: column '{column}' is of type {kind}, but {first.types[column]} in "
                f"{first.path.name}. Write all files of a log with the same types."
            )


def _check_columns(path: Path, names: Sequence[str], found: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ClickLogError(f"{path}: column '{twice[0]}' stands twice; {found}. Rename one of them.")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ClickLogError(
            f"{path}: column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))} missing; {found}. "
            f"A click log needs {', '.join(REQUIRED)}, and may have {', '.join(SIZES)}."
        )
    one = [name for name in SIZES if name in names]
    if len(one) == 1:
        raise ClickLogError(
            f"{path}: column '{one[0]}' stands without its fellow; give both of {', '.join(SIZES)}."
        )


# --------------------------------------------------------------------------------------------------- parquet


def _look_at_parquet(path: Path) -> LogFile:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ClickLogError(f"{path}: not a readable Parquet file ({error}). Write it again.") from error
    _check_columns(path, schema.names, f"its columns are {', '.join(schema.names)}")
    types = {}
    for column in [name for name in REQUIRED + SIZES if name in schema.names]:
        kind = schema.field(column).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if column in TEXTS and not text:
            raise ClickLogError(
                f"{path}: column '{column}' is of type {kind}, not string. Write it as a string."
            )
        if column not in TEXTS and not number:
            raise ClickLogError(
                f"{path}: column '{column}' is of type {kind}, not a whole number. Write it as int64."
            )
        types[column] = "string" if text else str(kind)
    return LogFile(path, path, types, rows)


# ------------------------------------------------------------------------------------------------ text files


def _parse_text(path: Path, separator: str, parquet: Path) -> LogFile:
    check_utf8(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    if not header:
        raise ClickLogError(
            f"{path}: the file is empty: zero rows and no header. "
            f"The first line must name the columns: {separator.join(REQUIRED)}"
        )
    _check_columns(path, header, f"line 1 (the header) has {', '.join(map(repr, header))}")
    connection = ibis.duckdb.connect(temp_directory=str(parquet.parent))
    try:
        table = connection.read_csv(
            path,
            delim=separator,
            quote='"',
            escape='"',
            header=True,
            auto_detect=False,
            strict_mode=True,
            columns=dict.fromkeys(header, "VARCHAR"),
        )
        known = [name for name in REQUIRED + SIZES if name in header]
        connection.to_parquet(table.select(known), parquet)
    except (duckdb.InvalidInputException, duckdb.ConversionException) as error:
        raise _unreadable_text(path, error) from error
    finally:
        connection.disconnect()
    return LogFile(path, parquet, dict.fromkeys(known, "string"), pq.read_metadata(parquet).num_rows)


def _unreadable_text(path: Path, error: duckdb.Error) -> ClickLogError:
    """What DuckDB says of a file that it cannot parse, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = "; ".join(lines[:3]).replace("Invalid Input Error: ", "").replace("CSV Error on Line:", "line")
    return ClickLogError(
        f"{path}: {said}. Mend that line: quote fields that hold the separator or a line break, and double "
        "the quotes inside them."
    )


def check_utf8(path: Path, block_bytes: int = 1 << 24) -> None:
    """Read a text file through once; ClickLogError names the line of the first invalid UTF-8 or NUL."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, done, pending = 1, 0, 0
    with path.open("rb") as file:
        while True:
            block = file.read(block_bytes)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = (
                    done - pending + error.start
                )  # the decoder had kept `pending` bytes of the block before
                raise _utf8_problem(path, start, lines, block, start - done) from error
            if b"\0" in block:
                at = block.index(b"\0")
                line = lines + block[:at].count(b"\n")
                raise ClickLogError(
                    f"{path}: line {line}: a NUL byte at offset {done + at}: not a text file."
                )
            if not block:
                return
            pending = len(decoder.getstate()[0])
            lines += block.count(b"\n")
            done += len(block)


def _utf8_problem(path: Path, offset: int, lines: int, block: bytes, in_block: int) -> ClickLogError:
    line = lines + block[: max(in_block, 0)].count(b"\n")
    with path.open("rb") as file:
        file.seek(offset)
        found = file.read(4)
    return ClickLogError(
        f"{path}: line {line}: invalid UTF-8 at byte {offset} ({found.hex(' ')}). "
        "Write the log as UTF-8, say with `iconv -f GB18030 -t UTF-8`."
    )


def line_of_row(path: Path, separator: str, row: int) -> int:
    """The line where data row `row` begins; fields may hold line breaks, so lines are not rows."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        next(reader)
        rows, before = -1, reader.line_num
        for fields in reader:
            rows += bool(fields)  # an empty line is no row
            if rows == row and fields:
                return before + 1
            before = reader.line_num
    return before
