"""The click log's reader: every bad input stops it with file, line, column, value; no row is lost."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.log.click_log import read_click_log
from data_tools.log.engines import EngineOptions, open_engine
from data_tools.log.files import ClickLogError, check_utf8
from tests.data_helpers import COLUMNS, row, write_log


def read(path: Path) -> pd.DataFrame:
    with open_engine("duckdb", path.parent / "scratch", EngineOptions(threads=2)) as engine:
        return engine.connection.execute(read_click_log(path, engine).table)


def error_of(path: Path) -> str:
    with pytest.raises(ClickLogError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_reads_every_row_as_written(tmp_path: Path, ending: str) -> None:
    rows = [
        row(query='a "quoted", query', content="two\nlines\tand a tab"),
        row(query="红色 熊猫", title="", show=0, click=0),
        row(query="NULL", title="N/A", content="nan", show=2**40, click=2**40),
        row(query=" spaces kept ", url="https://x.example/ä.png?a=1,2#f"),
    ]
    frame = read(write_log(tmp_path / f"log.{ending}", rows))
    assert frame.to_dict("records") == rows


def test_columns_may_stand_in_any_order_and_others_are_left_alone(tmp_path: Path) -> None:
    names = ["click", "country", "url", "show", "title", "query", "content"]
    frame = read(write_log(tmp_path / "log.csv", [row(country="nl")], names))
    assert tuple(frame.columns) == COLUMNS
    assert frame.iloc[0]["show"] == 100


def test_parquet_gives_the_same_table_and_sizes_may_be_empty(tmp_path: Path) -> None:
    rows = [row(width=120, height=90), row(query="blue bird", width=None, height=None)]
    text = read(write_log(tmp_path / "log.csv", rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "log.parquet")  # pandas makes doubles of whole numbers with gaps
    binary = read(tmp_path / "log.parquet")
    pd.testing.assert_frame_equal(text, binary)
    assert text["width"].tolist()[0] == 120
    assert pd.isna(text["width"].tolist()[1])


def test_bom_windows_line_ends_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfquery,url,title,content,show,click\r\na,u,t,c,1,0\r\n\r\nb,u,t,c,2,1\r\n")
    assert read(path)["query"].tolist() == ["a", "b"]


@pytest.mark.parametrize("missing", COLUMNS)
def test_missing_column(tmp_path: Path, missing: str) -> None:
    names = [name for name in COLUMNS if name != missing]
    path = write_log(tmp_path / "log.csv", [{name: row()[name] for name in names}], names)
    said = error_of(path)
    assert f"'{missing}'" in said
    assert "line 1" in said


def test_missing_column_in_parquet(tmp_path: Path) -> None:
    pd.DataFrame([row()]).drop(columns="click").to_parquet(tmp_path / "log.parquet")
    assert "'click'" in error_of(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    ("change", "column", "says"),
    [
        ({"show": "many"}, "show", "not a whole number"),
        ({"show": "1.5"}, "show", "not a whole number"),
        ({"show": "1e3"}, "show", "not a whole number"),
        ({"show": ""}, "show", "not a whole number"),
        ({"show": "99999999999999999999"}, "show", "not a whole number"),
        ({"click": "0x1"}, "click", "not a whole number"),
        ({"show": "-1", "click": "-2"}, "show", "negative"),
        ({"click": "-2"}, "click", "negative"),
        ({"show": "5", "click": "6"}, "click", "more than its show"),
        ({"url": ""}, "url", "empty"),
        ({"width": "-1"}, "width", "under 1 px"),
        ({"height": "0"}, "height", "under 1 px"),
        ({"height": "tall"}, "height", "not a whole number, or empty"),
    ],
)
def test_bad_value_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], column: str, says: str
) -> None:
    good = row(width=100, height=100)
    rows = [good, good | {"content": "one\ntwo\nthree"}, good | change, good | change]
    said = error_of(write_log(tmp_path / "log.csv", rows))
    assert "line 6:" in said  # header, one line, three lines of one row
    assert f"column '{column}'" in said
    assert says in said
    assert f"'{change[column]}'" in said or change[column] == ""


def test_the_first_bad_line_is_reported_also_deep_in_a_large_file(tmp_path: Path) -> None:
    good = row(content="x" * 400)
    rows = [good] * 50_000  # 23 MB: several of DuckDB's buffers, read by several threads
    rows[41_234] = good | {"click": 101}
    rows[45_000] = good | {"show": "no"}
    said = error_of(write_log(tmp_path / "log.csv", rows))
    assert "line 41236:" in said
    assert "'101' (show is '100')" in said


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"show": ["many"]}, "of type"),
        ({"show": [1.5]}, "not a whole number"),
        ({"show": [None]}, "not a whole number"),
        ({"query": [7]}, "of type int64, not string"),
        ({"click": [-3]}, "negative"),
        ({"click": [300]}, "more than its show"),
    ],
)
def test_bad_parquet(tmp_path: Path, values: dict[str, list[Any]], says: str) -> None:
    frame = pd.DataFrame({name: [value] for name, value in row().items()} | values)
    frame.to_parquet(tmp_path / "log.parquet")
    said = error_of(tmp_path / "log.parquet")
    assert says in said
    assert f"'{next(iter(values))}'" in said


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and then something else")
    assert "not a readable Parquet file" in error_of(tmp_path / "log.parquet")


@pytest.mark.parametrize("text", ["", "query,url,title,content,show,click\n"])
def test_zero_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    assert "zero rows" in error_of(tmp_path / "log.csv")


def test_zero_rows_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), tmp_path / "log.parquet")
    assert "zero rows" in error_of(tmp_path / "log.parquet")


def test_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [row(), row(query="QUERY"), row()])
    data = path.read_bytes().replace(b"QUERY", "红".encode("gb18030"))
    path.write_bytes(data)
    said = error_of(path)
    assert "line 3: invalid UTF-8" in said
    assert f"byte {data.index('红'.encode('gb18030'))}" in said


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_utf8_is_checked_across_blocks(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "log.csv"
    path.write_text("ä红🐼\n" * 5, encoding="utf-8")
    check_utf8(path, block_bytes)
    path.write_bytes("ä红🐼\n".encode() * 3 + b"ab\xe7\xba\n")
    with pytest.raises(ClickLogError, match=r"line 4: invalid UTF-8 at byte 32 \(e7 ba"):
        check_utf8(path, block_bytes)
    path.write_bytes("ä\n".encode() + b"\xe7\xba")  # cut in the middle of a character
    with pytest.raises(ClickLogError, match="line 2: invalid UTF-8 at byte 3"):
        check_utf8(path, block_bytes)
    path.write_bytes("ä\n".encode() + b"a\0")
    with pytest.raises(ClickLogError, match="line 2: a NUL byte at offset 4"):
        check_utf8(path, block_bytes)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a,u,t,c,1", "Expected Number of Columns"),
        ("a,u,t,c,1,0,9", "Expected Number"),
        ('"a,u,t,c,1,0', "quote"),
    ],
)
def test_a_line_with_other_fields_is_an_error_not_a_skipped_row(tmp_path: Path, line: str, says: str) -> None:
    path = write_log(tmp_path / "log.csv", [row()])
    path.write_text(path.read_text() + line + "\n")
    said = error_of(path)
    assert says in said
    assert "line 3" in said.replace("line: 3", "line 3")


def test_unknown_ending_and_missing_file(tmp_path: Path) -> None:
    assert "no such click log" in error_of(tmp_path / "log.csv")
    (tmp_path / "log.xlsx").write_text("x")
    assert ".csv, .tsv, .parquet" in error_of(tmp_path / "log.xlsx")


def test_a_column_twice_and_one_size_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,url,title,content,show,click,show\na,u,t,c,1,0,1\n")
    assert "'show' stands twice" in error_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("query,url,title,content,show,click,width\na,u,t,c,1,0,1\n")
    assert "'width' stands without its fellow" in error_of(tmp_path / "b.csv")
