"""DuckDB and Spark give the same bytes; buckets change nothing; logs of many files are one log."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.errors import DataError
from data_tools.log import engines
from data_tools.log.click_log import read_click_log
from data_tools.log.engines import DuckdbEngine, EngineOptions, open_engine
from data_tools.log.files import ClickLogError
from data_tools.spark import java_bytes
from demo import corpus as demo_corpus
from stages.base import StageError, Stopped
from stages.filter import Config, run
from tests.data_helpers import make_job, row, write_log
from tests.hostile_log import hostile_rows, write_hostile_log

FILES = ("pairs.parquet", "dropped.parquet", "measures.parquet")
STRICT: dict[str, Any] = {
    "listed_words": Path("words.txt"),
    "ctr_bound": "wilson",
    "min_ctr": 0.07,
    "min_show": 1,
    "min_words": 1,
    "best_per_query": 2,
    "subset": {"share": 0.7, "seed": 11},
}


def hashes(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}


def filtered(place: Path, name: str, **config: Any) -> tuple[dict[str, str], dict[str, int]]:
    """What the stage made of a config, in the directory `name`: hashes of its files, and its counts."""
    job = make_job(place / name)
    report = run(Config(**config), job)
    assert not (job.directory / "spill").exists()
    return hashes(job.out), report.counts


def test_buckets_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile_log(tmp_path / "log", 3000, seed=1)
    whole = filtered(tmp_path, "whole", click_log=Path("log"), **STRICT)
    for rows in (1000, 150):
        monkeypatch.setattr(DuckdbEngine, "bucket_rows", rows)
        assert filtered(tmp_path, f"by{rows}", click_log=Path("log"), **STRICT) == whole
    assert whole[1]["kept"] > 20
    reasons = {name for name, n in whole[1].items() if n}
    assert {
        "dropped_repeated_pair",
        "dropped_not_among_best",
        "dropped_low_ctr",
        "dropped_listed_word",
    } <= reasons


def test_a_log_is_the_same_in_any_parts_and_any_order(tmp_path: Path) -> None:
    rows = [r for r in hostile_rows(500, seed=2) if r["query"] != "long words"]
    table = pa.Table.from_pylist(rows)
    one = tmp_path / "one.parquet"
    pq.write_table(table, one)
    (tmp_path / "parts" / "day").mkdir(parents=True)
    for part in range(4):
        shuffled = table.slice(part * 130, 130).take(list(reversed(range(len(table.slice(part * 130, 130))))))
        pq.write_table(shuffled, tmp_path / "parts" / "day" / f"{9 - part}.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "parts" / "day" / "empty.parquet")
    expected = filtered(tmp_path, "a", click_log=one)
    assert filtered(tmp_path, "b", click_log=tmp_path / "parts") == expected
    assert filtered(tmp_path, "c", click_log=tmp_path / "parts" / "*" / "?*.parquet") == expected


def test_text_files_of_a_glob_are_one_log_and_the_bad_line_names_its_file(tmp_path: Path) -> None:
    rows = [row(url=f"http://a.example/{i}", content='a "quoted",\nline') for i in range(6)]
    write_log(tmp_path / "all.csv", rows)
    for part in range(3):
        write_log(tmp_path / f"part-{part}.csv", rows[part * 2 : part * 2 + 2])
    expected = filtered(tmp_path, "one", click_log=tmp_path / "all.csv")
    assert filtered(tmp_path, "glob", click_log=tmp_path / "part-*.csv") == expected
    write_log(tmp_path / "part-1.csv", [rows[0], rows[1] | {"click": 101}])
    with pytest.raises(StageError, match=r"part-1\.csv: line 4: column 'click' is more than its show: '101'"):
        filtered(tmp_path, "bad", click_log=tmp_path / "part-*.csv")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no .parquet file in this folder"),
        ({"a.parquet": row(), "b.parquet": row(show="7")}, r"b.parquet: column 'show' is of type string"),
        (
            {"a.parquet": row(), "b.parquet": row(show=100.0)},
            r"b.parquet: column 'show' is of type double, but",
        ),
        ({"a.parquet": row(), "b.parquet": row(width=1, height=1)}, r"b.parquet: width and height"),
        ({"a.parquet": row(), "b.parquet": row(click=-1)}, r"b.parquet: row 1: column 'click' is negative"),
    ],
)
def test_what_is_wrong_with_one_file_of_many(tmp_path: Path, files: dict[str, Any], says: str) -> None:
    (tmp_path / "log").mkdir()
    for name, content in files.items():
        pq.write_table(pa.Table.from_pylist([content]), tmp_path / "log" / name)
    with (
        open_engine("duckdb", tmp_path / "scratch", EngineOptions(1)) as engine,
        pytest.raises(ClickLogError, match=says),
    ):
        read_click_log(tmp_path / "log", engine)


def test_files_of_two_kinds_are_no_log(tmp_path: Path) -> None:
    write_log(tmp_path / "a.csv", [row()])
    write_log(tmp_path / "a.tsv", [row()])
    with pytest.raises(StageError, match=r"several kinds \(\.csv, \.tsv\)"):
        filtered(tmp_path, "x", click_log=tmp_path / "a.*")


def test_asked_to_stop_it_stops_and_leaves_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", [row()])
    job = make_job(tmp_path / "filter", should_stop=lambda: True)
    with pytest.raises(Stopped):
        run(Config(click_log=Path("log.csv")), job)
    assert not list(job.directory.rglob("*.parquet*"))


@pytest.mark.usefixtures("spark")
def test_a_missing_java_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.csv", [row()])
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(StageError, match=r"JAVA_HOME=.*nowhere has no bin/java.*extra `spark`"):
        filtered(tmp_path, "x", click_log=Path("log.csv"), engine="spark")
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match=r"no java on PATH.*engine: duckdb"):
        filtered(tmp_path, "x", click_log=Path("log.csv"), engine="spark")
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(StageError, match=r"Spark: .*pyspark.*extra `spark`"):
        filtered(tmp_path, "x", click_log=Path("log.csv"), engine="spark")


@pytest.mark.parametrize(("written", "java"), [("8GB", "7629m"), ("7.5 GiB", "7680m"), ("512MB", "488m")])
def test_an_amount_of_memory_reaches_java(written: str, java: str) -> None:
    assert java_bytes(written) == java
    with pytest.raises(DataError, match="no amount of memory"):
        java_bytes("much")


def test_what_duckdb_says_is_told_with_a_remedy() -> None:
    assert "Raise `memory_limit`" in str(engines.mendable(duckdb.OutOfMemoryException("no more\nstack")))
    assert engines.mendable(duckdb.ConversionException("no number")) == "no number. Write the log again."
    assert engines.mendable(duckdb.CatalogException("no such table")) is None  # a bug, and no fault of a file


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_spark_gives_the_same_bytes(tmp_path: Path) -> None:
    """On the demo's log, on a hostile one in parts, and from a text file; bad rows are told alike."""
    demo_corpus.build(tmp_path / "demo", seed=7, limit=150)
    log = write_hostile_log(tmp_path / "a [log], {of} *stars*", 2000, seed=4)
    lists = {"zh": Path("words.txt"), "en": Path("latin.txt")}
    (tmp_path / "latin.txt").write_text("red panda\n'\n", encoding="utf-8")
    hostile_text = [r | {"query": "a\n'b' c", "title": 'x "y" \\n z'} for r in [row()] * 3]
    write_log(tmp_path / "text.csv", hostile_text)
    few = {"conf": {"spark.sql.shuffle.partitions": "4"}}  # for few rows
    cases = {
        "demo": {"click_log": tmp_path / "demo" / "click_log.csv", "best_per_query": 6},
        "hostile": {"click_log": log, **STRICT, "listed_words": lists},
        "text": {"click_log": Path("text.csv")},
    }
    for name, case in cases.items():
        by_duckdb = filtered(tmp_path, f"{name}-duckdb", **case)
        assert filtered(tmp_path, f"{name}-spark", engine="spark", spark=few, **case) == by_duckdb, name
    write_log(tmp_path / "text.csv", [*hostile_text, row(click=101)])
    said = []
    for engine in ("duckdb", "spark"):
        with pytest.raises(StageError, match=r"text.csv: line 8: column 'click'") as caught:
            filtered(tmp_path, "bad", click_log=Path("text.csv"), engine=engine)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_text_that_is_not_utf8_is_refused_by_both(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()])
    bad = pa.array([b"\xba\xec panda"]).view(pa.string())
    place = table.column_names.index("title")
    pq.write_table(table.set_column(place, "title", bad), tmp_path / "log.parquet")
    for engine in ("duckdb", "spark"):
        with pytest.raises(StageError, match=r"(?i)utf-?8"):
            filtered(tmp_path, engine, click_log=Path("log.parquet"), engine=engine)
