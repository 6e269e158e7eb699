"""Reading a click log (.csv, .tsv, .parquet) by Ibis on DuckDB, every row checked: no row is lost silently.

The log's columns: query, url, title, content (text), show, click (whole numbers), and where the log has them
width, height (whole numbers in pixels, may be empty). Other columns are left alone. The first thing that is
wrong stops the reading with a ClickLogError that names the file, the line (of text files; the row of
.parquet), the column, the value and the remedy.
"""

import codecs
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend

from data_tools.errors import DataError

TEXTS = ("query", "url", "title", "content")
COUNTS = ("show", "click")
SIZES = ("width", "height")
REQUIRED = TEXTS + COUNTS
SEPARATORS = {".csv": ",", ".tsv": "\t"}

ROW = "row_"  # 0 for the first row of data

_FILE_ERRORS = (duckdb.InvalidInputException, duckdb.ConversionException)  # the rest is no fault of the file


class ClickLogError(DataError):
    """A click log that cannot be read as it is."""


@dataclass(frozen=True)
class _Check:
    column: str
    bad: ir.BooleanValue
    problem: str
    remedy: str


def read_click_log(path: Path, connection: Backend) -> ir.Table:
    """The log as a table of `connection`: query, url, title, content: string (never null), show, click: int64
    (0 <= click <= show), and width, height: int64 or null if the log has both.

    Raises:
        ClickLogError: no such file, unknown ending, invalid UTF-8, a missing column, a wrong type, a negative
            count, more clicks than shows, a size under 1 px, zero rows, a line with too few or too many
            fields.
    """
    if not path.is_file():
        raise ClickLogError(f"{path}: no such click log. Check `click_log` in the recipe.")
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        raw = _read_text(path, SEPARATORS[suffix], connection)
        numbers = _numbers_from_text
    elif suffix == ".parquet":
        raw = _read_parquet(path, connection)
        numbers = _numbers_from_parquet
    else:
        raise ClickLogError(f"{path}: '{suffix}' is no ending of a click log; allowed: .csv, .tsv, .parquet")
    try:
        if connection.execute(raw.count()) == 0:
            raise ClickLogError(
                f"{path}: the click log has zero rows. Write at least one row under the header."
            )
        present = REQUIRED + (SIZES if set(SIZES) <= set(raw.columns) else ())
        return _checked(path, raw, present, numbers, connection)
    except _FILE_ERRORS as error:
        raise _duckdb_problem(path, error) from error


# ------------------------------------------------------------------------------------------------ text files


def _read_text(path: Path, separator: str, connection: Backend) -> ir.Table:
    check_utf8(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    if not header:
        raise ClickLogError(
            f"{path}: the file is empty: zero rows and no header. {_header_remedy(separator)}"
        )
    _check_columns(path, header, f"line 1 (the header) has {', '.join(map(repr, header))}")
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
        numbered = table.mutate(ibis.row_number().name(ROW))
        return connection.create_table("click_log_text", numbered, temp=True)
    except _FILE_ERRORS as error:
        raise _duckdb_problem(path, error) from error


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


def _line_of_row(path: Path, separator: str, row: int) -> int:
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


def _numbers_from_text(raw: ir.Table, column: str) -> tuple[ir.IntegerValue, ir.BooleanValue]:
    text = raw[column]
    whole = text.re_search("^-?[0-9]{1,18}$")
    empty = text.isnull() if column in SIZES else ibis.literal(False)
    return text.try_cast("int64"), ~(whole.fill_null(False) | empty)


# --------------------------------------------------------------------------------------------------- parquet


def _read_parquet(path: Path, connection: Backend) -> ir.Table:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ClickLogError(f"{path}: not a readable Parquet file ({error}). Write it again.") from error
    _check_columns(path, schema.names, f"its columns are {', '.join(schema.names)}")
    for column in REQUIRED + SIZES:
        if column not in schema.names:
            continue
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
    table = connection.read_parquet(path)
    return table.mutate(ibis.row_number().name(ROW))


def _numbers_from_parquet(raw: ir.Table, column: str) -> tuple[ir.IntegerValue, ir.BooleanValue]:
    value = raw[column]
    missing = value.isnull()
    if value.type().is_floating():
        missing = missing | value.isnan()
        value = ibis.ifelse(missing, ibis.null(value.type()), value)
    number = value.try_cast("int64")
    whole = (number == value).fill_null(False)
    return number, ~(whole | missing) if column in SIZES else ~whole


# ------------------------------------------------------------------------------------------------------- both


def _checked(
    path: Path,
    raw: ir.Table,
    present: tuple[str, ...],
    numbers: Callable[[ir.Table, str], tuple[ir.IntegerValue, ir.BooleanValue]],
    connection: Backend,
) -> ir.Table:
    checks: list[_Check] = []
    columns: dict[str, ir.Value] = {name: raw[name].fill_null("") for name in TEXTS}
    checks.append(_Check("url", columns["url"] == "", "is empty", "Every row needs the picture's URL."))
    for name in present[len(TEXTS) :]:
        number, wrong = numbers(raw, name)
        columns[name] = number
        what = "a whole number, or empty" if name in SIZES else "a whole number"
        checks.append(_Check(name, wrong, f"is not {what}", "Write digits alone, without separators."))
        least = 1 if name in SIZES else 0
        problem = "is under 1 px" if name in SIZES else "is negative"
        checks.append(_Check(name, number < least, problem, f"The least is {least}; drop or mend the row."))
    clicks_over = columns["click"] > columns["show"]
    checks.append(
        _Check(
            "click", clicks_over, "is more than its show", "A result cannot be clicked more often than shown."
        )
    )
    found = connection.execute(
        raw.aggregate(
            **{f"c{i}": raw[ROW].min(where=check.bad.fill_null(False)) for i, check in enumerate(checks)}
        )
    ).iloc[0]
    rows = {i: int(row) for i, row in enumerate(found) if row == row and row is not None}
    if rows:
        first = min(rows, key=lambda i: (rows[i], i))
        raise _row_problem(path, raw, checks[first], rows[first], connection)
    return raw.select(**columns)


def _row_problem(path: Path, raw: ir.Table, check: _Check, row: int, connection: Backend) -> ClickLogError:
    values = connection.execute(raw.filter(raw[ROW] == row)).iloc[0]
    separator = SEPARATORS.get(path.suffix.lower())
    where = f"line {_line_of_row(path, separator, row)}" if separator else f"row {row + 1}"
    shown = f"'{values[check.column]}'"
    if check.column == "click" and "show" in check.problem:
        shown += f" (show is '{values['show']}')"
    return ClickLogError(f"{path}: {where}: column '{check.column}' {check.problem}: {shown}. {check.remedy}")


def _check_columns(path: Path, names: list[str], found: str) -> None:
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


def _header_remedy(separator: str) -> str:
    return f"The first line must name the columns: {separator.join(REQUIRED)}"


def _duckdb_problem(path: Path, error: duckdb.Error) -> ClickLogError:
    """What DuckDB says of a file that it cannot parse, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = "; ".join(lines[:3]).replace("Invalid Input Error: ", "").replace("CSV Error on Line:", "line")
    return ClickLogError(
        f"{path}: {said}. Mend that line: quote fields that hold the separator or a line break, and double "
        "the quotes inside them."
    )
