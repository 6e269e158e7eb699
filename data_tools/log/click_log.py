"""Reading a click log (.csv, .tsv, .parquet), every row checked: no row is lost silently.

The log's columns: query, url, title, content (text), show, click (whole numbers), and where the log has them
width, height (whole numbers in pixels, may be empty). Other columns are left alone. The first thing that is
wrong stops the reading with a ClickLogError that names the file, the line (of text files; the row of
.parquet), the column, the value and the remedy.

The checks are Ibis expressions: the engine that judges the log says whether any row is bad, and DuckDB, file
by file, which is the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir

from data_tools.log.engines import Engine, SparkEngine
from data_tools.log.files import (
    REQUIRED,
    SIZES,
    TEXTS,
    ClickLogError,
    LogFile,
    line_of_row,
    open_log_files,
)

_ROW = "file_row_number"  # DuckDB's name: 0 for the first row of data


@dataclass(frozen=True)
class ClickLog:
    """`table`: query, url, title, content: string (never null), show, click: int64 (0 <= click <= show), and
    width, height: int64 or null if the log has both."""

    table: ir.Table
    rows: int


@dataclass(frozen=True)
class _Check:
    column: str
    bad: ir.BooleanValue
    problem: str
    remedy: str


def read_click_log(path: Path, engine: Engine) -> ClickLog:
    """The log that `path` names (see data_tools.log.files), as a table of the engine.

    Raises:
        ClickLogError: no such file, unknown ending, invalid UTF-8, a missing column, a wrong type, a negative
            count, more clicks than shows, a size under 1 px, zero rows, a line with too few or too many
            fields.
    """
    files = open_log_files(path, engine.scratch)
    raw = engine.read_parquet([file.parquet for file in files if file.rows])
    text = files[0].separator is not None
    checks, columns = _checked(raw, text)
    if isinstance(engine, SparkEngine):  # DuckDB refuses such a file by itself
        checks += [
            _Check(name, ~_is_valid_utf8(raw[name]), "is not UTF-8", "Write the log as UTF-8.")
            for name in TEXTS
        ]
    any_bad = ibis.or_(*(check.bad.fill_null(False) for check in checks))
    if engine.connection.execute(raw.aggregate(bad=any_bad.any()))["bad"].iloc[0]:
        raise _first_problem(files)
    return ClickLog(raw.select(**columns), sum(file.rows for file in files))


def _checked(raw: ir.Table, text: bool) -> tuple[list[_Check], dict[str, ir.Value]]:
    """What to check of each row, in the order of telling, and the log's columns where all is well."""
    columns: dict[str, ir.Value] = {name: raw[name].fill_null("") for name in TEXTS}
    checks = [_Check("url", columns["url"] == "", "is empty", "Every row needs the picture's URL.")]
    for name in (*REQUIRED[len(TEXTS) :], *(name for name in SIZES if name in raw.columns)):
        number, wrong = _number_in_text(raw, name) if text else _number(raw, name)
        columns[name] = number
        what = "a whole number, or empty" if name in SIZES else "a whole number"
        checks.append(_Check(name, wrong, f"is not {what}", "Write digits alone, without separators."))
        least = 1 if name in SIZES else 0
        problem = "is under 1 px" if name in SIZES else "is negative"
        checks.append(_Check(name, number < least, problem, f"The least is {least}; drop or mend the row."))
    over = columns["click"] > columns["show"]
    remedy = "A result cannot be clicked more often than shown."
    checks.append(_Check("click", over, "is more than its show", remedy))
    return checks, columns


def _number_in_text(raw: ir.Table, column: str) -> tuple[ir.IntegerValue, ir.BooleanValue]:
    text = raw[column]
    whole = text.re_search("^-?[0-9]{1,18}$") & ~text.re_search("[^0-9-]")  # Java's $ allows a line break
    empty = text.isnull() if column in SIZES else ibis.literal(False)
    return text.try_cast("int64"), ~(whole.fill_null(False) | empty)


def _number(raw: ir.Table, column: str) -> tuple[ir.IntegerValue, ir.BooleanValue]:
    value = raw[column]
    missing = value.isnull()
    if value.type().is_floating():
        missing = missing | value.isnan()
        value = ibis.ifelse(missing, ibis.null(value.type()), value)
    number = value.try_cast("int64")
    whole = (number == value).fill_null(False)
    return number, ~(whole | missing) if column in SIZES else ~whole


@ibis.udf.scalar.builtin
def is_valid_utf8(text: str) -> bool:  # type: ignore[empty-body]
    """Spark's: whether the bytes of a string are UTF-8."""


def _is_valid_utf8(text: ir.StringValue) -> ir.BooleanValue:
    return is_valid_utf8(text.fill_null(""))


def _first_problem(files: Sequence[LogFile]) -> ClickLogError:
    """The first bad row of the first file that has one."""
    for file in files:
        connection = ibis.duckdb.connect()
        raw = connection.read_parquet(file.parquet, file_row_number=True, hive_partitioning=False)
        checks, _ = _checked(raw, file.separator is not None)
        firsts = {f"c{i}": raw[_ROW].min(where=check.bad.fill_null(False)) for i, check in enumerate(checks)}
        found = connection.to_pyarrow(raw.aggregate(**firsts)).to_pylist()[0]
        rows = [(row, i) for i, row in enumerate(found.values()) if row is not None]
        if rows:
            row, i = min(rows)
            values = connection.to_pyarrow(raw.filter(raw[_ROW] == row)).to_pylist()[0]
            return _problem(file, checks[i], row, values)
    return ClickLogError(
        f"{files[0].path.parent}: a text of the click log is not UTF-8. Write the log as UTF-8."
    )


def _problem(file: LogFile, check: _Check, row: int, values: dict[str, object]) -> ClickLogError:
    if file.separator is None:
        where = f"row {row + 1}"
    else:
        where = f"line {line_of_row(file.path, file.separator, row)}"
    shown = f"'{values[check.column]}'"
    if check.column == "click" and "show" in check.problem:
        shown += f" (show is '{values['show']}')"
    return ClickLogError(
        f"{file.path}: {where}: column '{check.column}' {check.problem}: {shown}. {check.remedy}"
    )
