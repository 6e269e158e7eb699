"""A stage as an array of tasks, in real processes: joined it equals one run; only what is missing runs."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_tools.web import statistics as crawl_statistics
from data_tools.web.crawl import SCHEMA, CrawlOptions
from data_tools.web.reuse import Terms
from data_tools.web.shares import ShareError, join, share_of
from pipeline import array_tasks, logs
from stages import crawl
from stages.base import SpoiltTasks, StageError, stage_module, task_directory
from tests.data_helpers import make_job, picture, row, write_log
from tests.pipeline_harness import (
    environment,
    inline,
    inline_json,
    tandem,
    wait_for,
    write_recipe,
)

SQUARES = """
name: tiny
tracking: {uri: "off"}
stages:
  squares: {kind: tests.tiny.squares}
"""

CORPUS = """
name: corpus
launch: {processes: 1}
tracking: {uri: "off"}
stages:
  filter: {kind: filter, click_log: log.csv, min_words: 1}
  crawl:
    kind: crawl
    inputs: {pairs: filter}
    local_site: {url_prefix: "http://site.example/", folder: site}
    urls_per_piece: 5
    threads: 2
  shard:
    kind: shard
    inputs: {pictures: crawl}
    labels: '^http://site\\.example/(?P<vendor>[^/]+)/'
    splits: [{name: val, share: 0.2}, {name: train}]
"""


def worker(cwd: Path, stage: str, *arguments: object, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "pipeline.worker", "tiny.yaml", "--stage", stage]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}"
    return out


def run_tasks(cwd: Path, stage: str, indices: Iterable[int], tasks: int, *arguments: object) -> None:
    for index in indices:
        ended(worker(cwd, stage, "--task", index, "--tasks", tasks, *arguments))


def directory(cwd: Path, stage: str, *arguments: object) -> Path:
    plan = inline_json("plan", "tiny.yaml", *map(str, arguments), cwd=cwd)
    return next(Path(found["directory"]) for found in plan["stages"] if found["stage"] == stage)


def done(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "DONE.json").read_text())
    return content


def made(cwd: Path) -> list[int]:
    return [int(line.split()[0]) for line in (cwd / "made.log").read_text().splitlines()]


@pytest.mark.slow
def test_only_the_tasks_that_failed_run_again_and_finish_names_them(tmp_path: Path) -> None:
    write_recipe(tmp_path, SQUARES)
    (tmp_path / "fail_1").write_text("user")
    (tmp_path / "fail_2").write_text("crash")
    started = [worker(tmp_path, "squares", "--task", i, "--tasks", 5) for i in range(5)]  # side by side
    outputs = [ended(process, code) for process, code in zip(started, (0, 2, 1, 0, 0), strict=True)]
    assert "error: ValueError: " in outputs[2]
    path = directory(tmp_path, "squares")
    assert array_tasks.missing(path, 5) == [1, 2]
    assert array_tasks.progress(path) == (3, 5)
    records = {record.task: record for record in logs.read_errors(path)}
    assert records.keys() == {1, 2}
    assert (records[1].code, records[2].code) == (2, 1)
    assert records[1].message.endswith("cannot be squared")
    shown = inline("status", "tiny.yaml", cwd=tmp_path).stdout
    assert shown.startswith("squares failed: task ")
    message = ended(worker(tmp_path, "squares", "--finish", "--tasks", 5), 2)
    assert "of 5 tasks these are not done: 1-2. Run them again" in message
    assert not (path / "DONE.json").exists()
    before = len(made(tmp_path))
    for i in (1, 2):
        (tmp_path / f"fail_{i}").unlink()
    again = [worker(tmp_path, "squares", "--task", i, "--tasks", 5) for i in range(5)]
    worked = ["works" in ended(process) for process in again]
    assert worked == [False, True, True, False, False]
    assert sorted(made(tmp_path)) == list(range(20))
    assert 0 < before < 20
    ended(worker(tmp_path, "squares", "--finish", "--tasks", 5))
    assert done(path)["counts"] == {"squares": 20}
    assert not logs.read_errors(path)
    assert "works" not in ended(worker(tmp_path, "squares", "--task", 1, "--tasks", 5))
    assert yaml.safe_load((path / "config.yaml").read_text())["config"] == {"count": 20}
    whole = tmp_path / "whole"
    tandem("run", "tiny.yaml", "--root", whole, cwd=tmp_path)
    other = done(directory(tmp_path, "squares", "--root", whole))
    assert (other["counts"], other["metrics"]) == (done(path)["counts"], done(path)["metrics"])


def test_a_task_killed_or_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    write_recipe(tmp_path, SQUARES)
    slow = ("--task", 0, "--tasks", 2, "--set", "stages.squares.step_s=0.2")
    log = tmp_path / "made.log"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        before = len(made(tmp_path)) if log.exists() else 0
        first = worker(tmp_path, "squares", *slow)
        wait_for(lambda before=before: log.exists() and len(made(tmp_path)) > before + 1)
        first.send_signal(number)
        ended(first, code)
    path = directory(tmp_path, "squares")
    assert array_tasks.missing(path, 2) == [0, 1]
    assert not logs.read_errors(path)  # neither is a failure that it could tell of
    run_tasks(tmp_path, "squares", [0, 1], 2)
    starts = (path / "tasks" / "0" / "log" / "starts.log").read_text().splitlines()
    assert len(starts) == 3
    assert set(made(tmp_path)) == set(range(20))
    assert len(made(tmp_path)) <= 21  # the kill lost the one at hand at most


def test_the_number_of_tasks_is_fixed_by_the_first_start(tmp_path: Path) -> None:
    write_recipe(tmp_path, SQUARES)
    assert "none of its 3 tasks has begun" in ended(worker(tmp_path, "squares", "--finish", "--tasks", 3), 2)
    racing = [worker(tmp_path, "squares", "--task", 0, "--tasks", tasks) for tasks in (3, 4, 3, 4)]
    codes = [(process.communicate(timeout=60)[0], process.returncode)[1] for process in racing]
    path = directory(tmp_path, "squares")
    fixed = array_tasks.count(path)
    assert [tasks for tasks, code in zip((3, 4, 3, 4), codes, strict=True) if code == 0] == [fixed, fixed]
    other = 7 - (fixed or 0)
    for arguments in (("--task", 1), ("--finish",)):
        said = ended(worker(tmp_path, "squares", *arguments, "--tasks", other), 2)
        assert f"began as {fixed} tasks, not {other}; go on with {fixed}, or remove {path / 'tasks'}" in said
    assert [record.task for record in logs.read_errors(path)] == [None]  # of --finish: no task has failed
    (path / "tasks" / "count.json").write_text("{")
    with pytest.raises(StageError, match=r"count.json: cannot be read .* remove"):
        array_tasks.count(path)


def test_one_task_is_worked_on_once_at_a_time(tmp_path: Path) -> None:
    write_recipe(tmp_path, SQUARES)
    arguments = ("--task", 0, "--tasks", 2, "--set", "stages.squares.step_s=0.1")
    both = [worker(tmp_path, "squares", *arguments) for _ in range(2)]
    assert sum("works" in ended(process) for process in both) == 1  # the other waited, and found it done
    assert len(set(made(tmp_path))) == len(made(tmp_path)) > 0


@pytest.mark.slow
def test_finish_takes_back_tasks_whose_files_are_gone_or_spoilt(tmp_path: Path) -> None:
    write_recipe(tmp_path, SQUARES)
    run_tasks(tmp_path, "squares", [2, 0, 1], 3)
    path = directory(tmp_path, "squares")
    outs = [path / "tasks" / str(i) / "out" for i in range(3)]
    lost = next(outs[1].glob("*.txt"))
    lost.unlink()
    next(outs[2].glob("*.txt")).write_text("123456789")
    said = ended(worker(tmp_path, "squares", "--finish", "--tasks", 3), 2)
    assert "not done: 1-2 (1-2: done before, but files are gone or cut short)" in said
    assert array_tasks.missing(path, 3) == [1, 2]
    for file in outs[2].glob("*.txt"):
        file.unlink()
    run_tasks(tmp_path, "squares", [1, 2], 3)
    assert lost.exists()
    (outs[0] / "spoilt").touch()  # what only the stage itself can see
    assert "0/out: spoilt" in ended(worker(tmp_path, "squares", "--finish", "--tasks", 3), 2)
    assert array_tasks.missing(path, 3) == [0]
    run_tasks(tmp_path, "squares", [0], 3)
    ended(worker(tmp_path, "squares", "--finish", "--tasks", 3))
    valid = (path / "DONE.json").read_bytes()
    (path / "out" / "squares.txt").unlink()  # DONE.json does not hold any more: no task removes or trusts it
    run_tasks(tmp_path, "squares", range(3), 3)
    assert (path / "DONE.json").read_bytes() == valid
    ended(worker(tmp_path, "squares", "--finish", "--tasks", 3))
    assert done(path)["files"] == json.loads(valid)["files"]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    said = ended(worker(tmp_path, "numbers", "--task", 0, "--tasks", 2), 2)
    assert "stages.numbers: a tests.tiny.numbers stage does not run as an array of tasks" in said
    for arguments, message in (
        (("--task", 2, "--tasks", 2), "--task 2: must be from 0 to 1"),
        (("--task", 0), "--tasks goes with"),
        (("--tasks", 2), "--tasks goes with"),
        (("--finish", "--tasks", 0), "--tasks 0: must be 1 or more"),
    ):
        assert message in ended(worker(tmp_path, "numbers", *arguments), 2)


def test_a_stage_of_your_own_must_have_what_an_array_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "half.py").write_text(
        "from tests.tiny.squares import Config as Squares\n"
        "class Config(Squares): kind: str = 'mine.half'\n"
        "def run(config, job): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StageError, match=r"'mine.half' has `Config.array`, but no `run_task"):
        stage_module("mine.half")


@given(st.sets(st.integers(0, 300)))
def test_ranges_say_every_index_once(indices: set[int]) -> None:
    said = array_tasks.ranges(indices)
    ends = [list(map(int, part.split("-"))) for part in said.split(",") if part]
    assert [i for part in ends for i in range(part[0], part[-1] + 1)] == sorted(indices)
    assert all(later[0] > earlier[-1] + 1 for earlier, later in pairwise(ends))


def test_ranges_are_slurms() -> None:
    assert array_tasks.ranges([11, 0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-11"
    assert array_tasks.ranges([]) == ""


@given(st.sets(st.integers(0, 200)), st.integers(1, 60))
def test_chunks_hold_every_index_once_in_the_fewest_arrays(indices: set[int], most: int) -> None:
    chunks = array_tasks.chunks(sorted(indices), most)
    assert [i for _, part in chunks for i in part] == sorted(indices)
    assert all(0 <= i - offset < most for offset, part in chunks for i in part)
    # No two of the first indices fit in one array, so each needs an array of its own.
    first = [part[0] for _, part in chunks]
    assert all(later - earlier >= most for earlier, later in pairwise(first))


def test_ten_thousand_tasks_under_a_max_array_size_of_1001(tmp_path: Path) -> None:
    chunks = array_tasks.chunks(range(10_000), 1001)
    assert len(chunks) == 10
    assert sorted(i for _, part in chunks for i in part) == list(range(10_000))
    assert max(i - offset for offset, part in chunks for i in part) == 1000
    assert array_tasks.chunks([3, 17, 18, 199], 1001) == [(0, [3, 17, 18, 199])]
    array_tasks.begin(tmp_path, 10_000, lambda: None)
    for i in set(range(10_000)) - {3, 9_999}:
        (tmp_path / "tasks" / f"{i}.json").write_text("{}")
    began = time.monotonic()
    assert array_tasks.missing(tmp_path, 10_000) == [3, 9_999]
    assert array_tasks.progress(tmp_path) == (9_998, 10_000)
    assert time.monotonic() - began < 1


def test_a_url_is_in_one_share_whatever_else_there_is() -> None:
    urls = [f"http://site.example/{i}" for i in range(3000)]

    def share(of: list[str], index: int, own: bool) -> list[str]:
        return share_of(pa.chunked_array([of]), index, 7, lambda url: own).to_pylist()

    shares = [share(urls, i, True) for i in range(7)]  # of the stage's own site: each by its own hash
    assert sorted(url for each in shares for url in each) == sorted(urls)
    assert all(330 < len(each) < 530 for each in shares)
    assert share(urls[::2], 3, True) == [url for url in shares[3] if url in set(urls[::2])]
    assert sorted(len(share(urls, i, False)) for i in range(7)) == [0] * 6 + [3000]  # a host is in one share
    hosts = [f"http://site{i % 700}.example/{i}" for i in range(3000)] + ["ftp://x/1", "ftp://x/2"]
    shares = [share(hosts, i, False) for i in range(7)]
    assert sorted(url for each in shares for url in each) == sorted(hosts)
    assert all(330 < len(each) < 530 for each in shares)


def test_shares_are_joined_by_url_also_where_one_is_empty(tmp_path: Path) -> None:
    pictures = {"a": [], "b": ["http://c/", "http://a/"], "c": ["http://b/"]}
    for name, urls in pictures.items():
        (tmp_path / name / "tars").mkdir(parents=True)
        (tmp_path / name / "tars" / "00000.tar").write_text(name)
        rows = [{"url": url, "status": "ok", "tar": "tars/00000.tar", "offset": 0} for url in urls]
        rows += [{"url": f"http://dead/{name}", "status": "not_found"}] if urls else []
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, tmp_path / name / "pictures.parquet")
        pq.write_table(crawl_statistics.of_rows(table, reused=False), tmp_path / name / "statistics.parquet")
    joined = join([tmp_path / name for name in pictures], tmp_path / "out", lambda n: None)
    assert [(found["url"], found["tar"]) for found in joined.pictures.to_pylist()] == [
        ("http://a/", "tars/1/00000.tar"),
        ("http://b/", "tars/2/00000.tar"),
        ("http://c/", "tars/1/00000.tar"),
        ("http://dead/b", None),
        ("http://dead/c", None),
    ]
    counted = [(row["host"], row["status"], row["count"]) for row in joined.statistics.to_pylist()]
    assert counted == [(host, "ok", 1) for host in "abc"] + [("dead", "not_found", 2)]
    assert [(tmp_path / "out" / "tars" / str(i) / "00000.tar").read_text() for i in (1, 2)] == ["b", "c"]
    (tmp_path / "b" / "tars" / "00000.tar").unlink()
    with pytest.raises(ShareError, match=r"b/tars/00000.tar: missing") as raised:
        join([tmp_path / name for name in pictures], tmp_path / "out", lambda n: None)
    assert raised.value.share == 1


def test_finish_of_a_crawl_says_which_tasks_are_to_run_again(tmp_path: Path) -> None:
    (tmp_path / "filter" / "out").mkdir(parents=True)
    urls = pa.table({"url": [f"ftp://site.example/{i}" for i in range(20)]})  # refused: nothing is fetched
    pq.write_table(urls, tmp_path / "filter" / "out" / "pairs.parquet")
    inputs = {"pairs": tmp_path / "filter"}
    for i in range(3):
        job = make_job(task_directory(tmp_path / "crawl", i), **inputs)
        report = crawl.run_task(crawl.Config(), replace(job, task_index=i, task_count=3))
        assert report.counts["urls"] == report.counts["dropped_bad_url"] > 0
    whole = replace(make_job(tmp_path / "crawl", **inputs), task_count=3)
    with pytest.raises(SpoiltTasks, match=r"not one of 20 URLs gave a picture \(bad_url 20;") as none:
        crawl.finish(crawl.Config(), whole)
    assert list(none.value.tasks) == [0, 1, 2]
    assert not list((tmp_path / "crawl").rglob("tars"))
    (whole.task_outs[1] / "pictures.parquet").write_text("not a table")
    with pytest.raises(SpoiltTasks, match=r"pictures.parquet: cannot be read .* Run task 1 again") as spoilt:
        crawl.finish(crawl.Config(), whole)
    assert list(spoilt.value.tasks) == [1]


def test_tasks_take_over_what_an_earlier_crawl_fetched(tmp_path: Path) -> None:
    urls = [f"http://site{i}.example/x.webp" for i in range(20)]
    data = [picture(100 + i, 120, (i, 0, 0)) for i in range(20)]
    (tmp_path / "filter" / "out").mkdir(parents=True)
    pq.write_table(pa.table({"url": urls}), tmp_path / "filter" / "out" / "pairs.parquet")
    config = crawl.Config()
    first = tmp_path / "crawl" / "first" / "out"
    (first / "tars").mkdir(parents=True)
    (first / "tars" / "00000.tar").write_bytes(b"".join(data))
    rows = []
    for i, (url, found) in enumerate(zip(urls, data, strict=True)):
        row = {"url": url, "status": "ok", "sha256": hashlib.sha256(found).hexdigest(), "width": 100 + i}
        place = {"tar": "tars/00000.tar", "offset": sum(map(len, data[:i])), "bytes": len(found)}
        rows.append(row | {"height": 120} | place)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), first / "pictures.parquet")
    CrawlOptions(config.guard(None), config.limits(0)).terms(config.rules()).write(first)
    stage, inputs = tmp_path / "crawl" / "second", {"pairs": tmp_path / "filter"}
    for i in range(2):  # nothing is left to fetch: no process is started, no host of the web is asked
        job = make_job(task_directory(stage, i), **inputs)
        report = crawl.run_task(config, replace(job, task_index=i, task_count=2))
        assert report.counts["kept"] == report.metrics["crawl/reused"] > 0
    whole = replace(make_job(stage, **inputs), task_count=2)
    report = crawl.finish(config, whole)
    assert report.counts["kept"] == report.metrics["crawl/reused"] == 20
    table = pq.read_table(whole.out / "pictures.parquet").to_pylist()
    assert {row["tar"] for row in table} == {"tars/0/reused-00000.tar", "tars/1/reused-00000.tar"}
    for row in table:
        bytes_ = (whole.out / row["tar"]).read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
        assert bytes_ == data[urls.index(row["url"])]
    assert Terms.read(whole.out) == Terms.read(first)  # so that a third one takes over from it


def corpus(cwd: Path) -> None:
    """A click log and its site: pictures, equal ones under two names, ones that are too small, dead links."""
    urls = []
    for vendor in "ab":
        (cwd / "site" / vendor).mkdir(parents=True)
        for i in range(24):
            side = 90 if i % 8 == 0 else 100 + i // 2  # too small; or equal to its neighbour's
            (cwd / "site" / vendor / f"{i}.webp").write_bytes(picture(side, 100 + i // 2))
            urls.append(f"http://site.example/{vendor}/{i}.webp")
    urls += [f"http://site.example/a/gone{i}.webp" for i in range(6)]
    write_log(cwd / "log.csv", [row(query=f"panda {i}", url=url) for i, url in enumerate(urls)])
    write_recipe(cwd, CORPUS)


def tables(out: Path) -> dict[str, Any]:
    pictures = pq.read_table(out / "pictures.parquet").drop_columns(["tar", "offset"])
    names = ("pairs.parquet", "dropped.parquet")
    return {"pictures": pictures} | {name: (out / name).read_bytes() for name in names}


@pytest.mark.slow
def test_a_crawl_in_tasks_gives_the_shards_of_one_run(tmp_path: Path) -> None:
    corpus(tmp_path)
    whole = tmp_path / "whole"
    tandem("run", "tiny.yaml", "--root", whole, cwd=tmp_path)
    expected = directory(tmp_path, "crawl", "--root", whole)
    shards = done(directory(tmp_path, "shard", "--root", whole))
    assert done(expected)["counts"]["dropped_not_found"] == 6
    assert shards["counts"]["dropped_duplicate"] > 0
    split = ("--root", tmp_path / "split")
    ended(worker(tmp_path, "filter", *split))
    run_tasks(tmp_path, "crawl", [2, 0, 1], 3, *split)
    ended(worker(tmp_path, "crawl", "--finish", "--tasks", 3, *split))
    ended(worker(tmp_path, "shard", *split))
    found = directory(tmp_path, "crawl", *split)
    assert found.name == expected.name
    for name in ("counts", "metrics"):
        assert done(found)[name] == done(expected)[name]
    assert tables(found / "out") == tables(expected / "out")
    assert done(directory(tmp_path, "shard", *split))["files"] == shards["files"]


@pytest.mark.slow
def test_a_crawls_task_killed_and_stopped_keeps_its_pieces(tmp_path: Path) -> None:
    corpus(tmp_path)
    ended(worker(tmp_path, "filter"))
    path = directory(tmp_path, "crawl")
    small = ("--set", "stages.crawl.urls_per_piece=2", "--set", "stages.crawl.processes=1")
    tars = path / "tasks" / "1" / "out" / "tars"
    kept: dict[str, int] = {}
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        running = worker(tmp_path, "crawl", "--task", 1, "--tasks", 2, *small)
        wait_for(lambda: list(tars.glob(".piece-*-urls")), 60)  # a process has its first pieces, of many
        os.kill(running.pid, number)
        ended(running, code)
        times = {p.name: p.stat().st_mtime_ns for p in tars.glob("*_stats.json")}
        assert kept.items() <= times.items()
        assert times
        kept = times
    run_tasks(tmp_path, "crawl", [1, 0], 2, *small)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in tars.glob("*_stats.json")}.items()
    ended(worker(tmp_path, "crawl", "--finish", "--tasks", 2, *small))
    assert done(path)["counts"]["urls"] == 54
    joined = sorted((path / "out").rglob("*.tar"))
    assert {tar.parent.name for tar in joined} == {"0", "1"}
    for tar in joined:  # hard links: no second copy
        assert tar.samefile(path / "tasks" / tar.parent.name / "out" / "tars" / tar.name)
