"""Planned shards: equal in size, shuffled by their keys, the same bytes from any number of processes."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import is_disk_full
from data_tools.shards import ShardIndex
from data_tools.shards import check as shard_check
from data_tools.shards import plan as shard_plan
from data_tools.shards.files import CorpusError
from data_tools.shards.plan import Layout, ShardPlan, equal_cuts
from data_tools.shards.side_by_side import WorkerLost
from data_tools.shards.writer import record_bytes
from stages import shard
from stages.base import StageError, Stopped
from stages.shard import Config, run
from tests.data_helpers import make_job, never, picture
from tests.shard_case import change, files, image, record
from tests.test_shards import crawled, pair

LIMIT = 30_000


@pytest.fixture(autouse=True)
def workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_plan, "PROCESS_WORTH_BYTES", 1)


def planned(folder: Path, samples: int = 60) -> ShardPlan:
    """A plan of pictures of many sizes, in two splits, whose bytes lie in one file."""
    scratch, source = folder / "scratch", folder / "source"
    scratch.mkdir(parents=True)
    source.mkdir()
    plan, data, sizes = ShardPlan(scratch, source, "Run it again."), b"", random.Random(1)
    for number in range(samples):
        one = image(number) + bytes(sizes.randrange(4000))
        row = {
            name: record(number)[name] for name in ("key", "sha256", "width", "height", "licence", "labels")
        }
        row |= {"called": f"http://site/{number}", "file": "pictures", "image_offset": len(data)}
        row |= {"image_bytes": len(one), "json": record_bytes(record(number))}
        plan.add("val" if number % 6 == 0 else "train", row)
        data += one
    (source / "pictures").write_bytes(data)
    return plan


def write(plan: ShardPlan, out: Path, processes: int, **changes: Any) -> dict[str, Any] | None:
    out.mkdir(parents=True)
    layout = Layout(out, ["train", "val"], ["colour"], LIMIT)
    return plan.write(layout, processes, changes.get("on_progress", print), changes.get("should_stop", never))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200), st.integers(1, 50_000))
def test_slices_are_equal_but_for_one_sample(sizes: list[int], shard_bytes: int) -> None:
    cuts = equal_cuts(sizes, shard_bytes)
    assert [number for start, stop in cuts for number in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in cuts)
    needed = min(len(sizes), -(-(sum(sizes) + 1024) // shard_bytes))
    assert len(cuts) <= needed
    if len(cuts) == needed:  # fewer where single samples are larger than a share
        share = sum(sizes) / len(cuts)
        assert all(abs(sum(sizes[a:b]) - share) <= max(sizes) for a, b in cuts)


def test_shards_of_a_split_are_of_equal_size(tmp_path: Path) -> None:
    manifest = write(planned(tmp_path, 200), tmp_path / "out", 1)
    assert manifest is not None
    sizes = [shard["bytes"] for shard in manifest["shards"] if shard["split"] == "train"]
    assert len(sizes) > 10
    largest_sample, tar_record = 8000, 10_240
    assert max(sizes) - min(sizes) <= largest_sample + tar_record
    assert abs(max(sizes) - LIMIT) <= largest_sample + tar_record
    total, per_shard = sum(sizes), [shard["licences"] for shard in manifest["shards"]]
    assert manifest["bytes"] == total + sum(s["bytes"] for s in manifest["shards"] if s["split"] == "val")
    assert manifest["licences"] == {n: sum(c.get(n, 0) for c in per_shard) for n in ("CC-BY-4.0", "MIT")}


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        done: list[int] = []
        plan = planned(tmp_path / f"{processes}")
        manifest = write(plan, tmp_path / f"{processes}" / "out", processes, on_progress=done.append)
        assert manifest is not None
        assert sum(done) == 60
    expected = files(tmp_path / "1" / "out")
    assert len(expected) > 6
    assert files(tmp_path / "2" / "out") == expected == files(tmp_path / "3" / "out")


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from data_tools.shards import plan as shard_plan
from tests.test_shard_plan import planned, write

if __name__ == "__main__":
    shard_plan.PROCESS_WORTH_BYTES = 1
    folder = Path(sys.argv[1])

    def kill(count):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    write(planned(folder), folder / "out", 2, on_progress=kill)
"""


@pytest.mark.slow
def test_after_a_kill_no_process_is_left_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    place = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, str(script), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
    assert list((tmp_path / "killed" / "out").rglob("*.tar"))
    assert not (tmp_path / "killed" / "out" / "manifest.json").exists()
    assert write(planned(tmp_path / "again"), tmp_path / "again" / "out", 2) is not None
    assert write(planned(tmp_path / "alone"), tmp_path / "alone" / "out", 1) is not None
    assert files(tmp_path / "again" / "out") == files(tmp_path / "alone" / "out")


def test_the_order_by_key_is_a_shuffle_of_the_urls(tmp_path: Path) -> None:
    urls = [f"http://site.example/a/{number}" for number in range(400)]
    source = crawled(
        tmp_path / "crawl",
        {url: picture(100, 100, color=(n % 256, n // 256, 0), format="PNG") for n, url in enumerate(urls)},
        [pair(url, "a query") for url in urls],
    )
    job = make_job(tmp_path / "shard", pictures=source)
    run(Config(), job)
    index = ShardIndex.open(job.out)
    place = {index.record(i)["url"]: i for i in range(len(index))}
    apart = np.abs(np.diff([place[url] for url in urls]))
    # two places drawn from n are n/3 apart in the mean; of neighbours that stay together, 1
    assert 400 / 4 < apart.mean() < 400 / 2.4
    assert (apart == 1).mean() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_of_workers_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    plan = planned(tmp_path)
    source = tmp_path / "source" / "pictures"
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(CorpusError, match=r"pictures: cut short at http://site/59. Run it again."):
        write(plan, tmp_path / "out", processes)
    plan = planned(tmp_path / "more")
    (tmp_path / "more" / "source" / "pictures").unlink()
    with pytest.raises(CorpusError, match=r"pictures: cannot be opened: No such file.*Run it again."):
        write(plan, tmp_path / "again", processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_told_by_workers_too(tmp_path: Path, processes: int) -> None:
    plan = planned(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write(plan, tmp_path / "out", processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_disk_full(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_is_killed_is_told_unless_it_was_a_stop(tmp_path: Path, stopped: bool) -> None:
    killed: list[int] = []

    def kill(count: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            killed.append(count)

    def should_stop() -> bool:  # asked after each shard too, before the loss is noticed
        return stopped and bool(killed) and sys.exc_info()[0] is WorkerLost

    plan = planned(tmp_path, 300)
    if stopped:
        assert write(plan, tmp_path / "out", 2, on_progress=kill, should_stop=should_stop) is None
    else:
        with pytest.raises(WorkerLost, match="one of 2 worker processes was ended from outside"):
            write(plan, tmp_path / "out", 2, on_progress=kill)
    assert killed
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_stop_ends_it_between_shards(tmp_path: Path) -> None:
    done: list[int] = []
    assert (
        write(planned(tmp_path), tmp_path / "out", 1, on_progress=done.append, should_stop=lambda: True)
        is None
    )
    assert len(done) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_stage_stops_while_it_writes(tmp_path: Path) -> None:
    urls = [f"http://site.example/{vendor}/{n}" for vendor in "abc" for n in range(4)]
    pictures = {url: picture(100 + n, 100) for n, url in enumerate(urls)}
    source = crawled(tmp_path / "crawl", pictures, [pair(url, "a query") for url in urls])
    asked: list[int] = []
    job = make_job(
        tmp_path / "shard", should_stop=lambda: bool(asked.append(1)) or len(asked) > 1, pictures=source
    )
    job.processes = 1
    splits: Any = [{"name": "half", "share": 0.5}, {"name": "train"}]
    with pytest.raises(Stopped):
        run(Config(splits=splits), job)
    assert not job.out.exists()
    assert not (job.directory / "plan.tmp").exists()


def test_the_stage_reads_back_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"http://site.example/a/{n}" for n in range(4)]
    pictures = {url: picture(100 + n, 100) for n, url in enumerate(urls)}
    source = crawled(tmp_path / "crawl", pictures, [pair(url, "a query") for url in urls])
    run(Config(check=True), make_job(tmp_path / "shard", pictures=source))
    assert Config.cosmetic == {"check"}

    def damaged(places: list[Path]) -> shard_check.Corpus:
        change(places[0] / "train" / "train-00000.tar", 540, b"??")
        return shard_check.find_shards(places)

    monkeypatch.setattr(shard, "find_shards", damaged)
    run(Config(), make_job(tmp_path / "unread", pictures=source))
    job = make_job(tmp_path / "damaged", pictures=source)
    with pytest.raises(StageError, match=r"1 times; the first is in train/train-00000.tar, byte 512: data:"):
        run(Config(check=True), job)
    assert not job.out.exists()


def test_an_index_without_the_records_checksums_is_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(planned(tmp_path), out, 1)
    before = [(key, ShardIndex.open(out).record(i)) for i, key in enumerate(ShardIndex.open(out).keys)]
    table = pq.read_table(out / "index.parquet")
    assert table["json_crc32"].null_count == 0
    pq.write_table(table.drop_columns(["json_crc32"]), out / "index.parquet")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["index"]["bytes"] = (out / "index.parquet").stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    index = ShardIndex.open(out)
    assert [(key, index.record(i)) for i, key in enumerate(index.keys)] == before
