"""The filter stage: files, counts and errors around the rules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages.base import StageError
from stages.filter import Config, run
from tests.data_helpers import make_job, row, write_log


def test_kept_and_dropped_are_all_rows_with_one_reason(tmp_path: Path) -> None:
    rows = [
        row(width=200, height=100),
        row(query="blue bird", width="", height="", show=50, click=25),
        row(query="panda", width=1, height=1),
        row(query="red panda", url="http://site.example/b.webp", width="", height="", click=1),
    ]
    write_log(tmp_path / "log.csv", rows)
    (tmp_path / "words.txt").write_text("bird\n")
    job = make_job(tmp_path / "filter")
    report = run(Config(click_log=Path("log.csv")), job)
    kept = pq.read_table(job.out / "pairs.parquet").to_pylist()
    names = ["query", "url", "title", "content", "show", "click", "width", "height", "ctr"]
    assert list(kept[0]) == names
    assert [(r["query"], r["ctr"], r["width"]) for r in kept] == [
        ("blue bird", 0.5, None),
        ("red panda", 0.3, 200),
    ]
    dropped = pq.read_table(job.out / "dropped.parquet").to_pylist()
    assert [(r["query"], r["reason"]) for r in dropped] == [("panda", "too_small"), ("red panda", "low_ctr")]
    assert report.counts["rows"] == 4
    assert report.counts["kept"] == 2
    assert report.counts["dropped_too_small"] == report.counts["dropped_low_ctr"] == 1
    assert sum(n for name, n in report.counts.items() if name != "rows") == 4
    assert report.metrics["filter/dropped_low_ctr"] == 1.0
    again = run(Config(click_log=Path("log.csv"), listed_words=Path("words.txt")), job)
    assert again.counts["dropped_listed_word"] == 1


def test_errors_of_the_log_are_the_stage_s(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", [row(click=200)])
    job = make_job(tmp_path / "filter")
    with pytest.raises(StageError, match=r"log.csv: line 2: column 'click' is more than its show"):
        run(Config(click_log=Path("log.csv")), job)
    assert not list(job.out.glob("*.parquet"))
    with pytest.raises(StageError, match=r"words\.txt: no such word list"):
        run(Config(click_log=Path("log.csv"), listed_words=Path("words.txt")), job)


def test_a_filter_that_leaves_nothing_says_why(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", [row(show=3, click=1), row(query="x y", show=100, click=0)])
    with pytest.raises(StageError, match=r"no row .* is left .*dropped_few_shows 1.*dropped_low_ctr 1"):
        run(Config(click_log=Path("log.csv")), make_job(tmp_path / "filter"))


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_no_result(tmp_path: Path) -> None:
    rows = [row(query=f"query {os.urandom(30).hex()}", content=os.urandom(60).hex()) for _ in range(2000)]
    write_log(tmp_path / "log.csv", rows)
    config = json.dumps({"click_log": "log.csv"})
    done = subprocess.run(
        [sys.executable, "-m", "tests.stage_process", "filter", config, str(tmp_path / "filter")],
        env={**os.environ, "FILE_LIMIT": "50000"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "filter/out" in done.stderr
    assert not list((tmp_path / "filter" / "out").glob("*.parquet"))
