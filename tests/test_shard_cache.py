"""A corpus at an address: fetched once a node, checked, bounded on disk, retried; every failure named."""

import errno
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_tools import remote
from data_tools.errors import DiskFullError
from data_tools.remote import Patience
from data_tools.shards import ShardIndex
from data_tools.shards import cache as shard_cache
from data_tools.shards.cache import ShardCache
from data_tools.shards.files import CorpusError
from tests.range_server import RangeServer, serving
from tests.training_case import write_corpus

GB = 2**30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("site") / "corpus", {"train": 40, "val": 5})


@pytest.fixture
def server(corpus: Path) -> Iterator[RangeServer]:
    with serving(corpus.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(tries=4, first_wait_s=0.01, longest_wait_s=0.02))


def opened(server: RangeServer, cache: Path, limit: int = GB, split: str | None = "train") -> ShardIndex:
    return ShardIndex.open(f"{server.address}/corpus/", split, ShardCache(cache, limit))


def cached(directory: Path) -> int:
    """Bytes of content in the cache."""
    return sum(p.stat().st_size for p in directory.iterdir() if p.suffix != ".lock")


def all_bytes(index: ShardIndex) -> list[Any]:
    return [(index.image_bytes(i), index.record(i)) for i in range(len(index))]


def test_an_address_gives_what_the_directory_gives_and_each_file_is_fetched_once(
    corpus: Path, server: RangeServer, tmp_path: Path
) -> None:
    local = ShardIndex.open(corpus, "train")
    index = opened(server, tmp_path / "cache")
    assert server.asked(".tar") == 0  # shards are fetched when they are read
    assert all_bytes(index) == all_bytes(local)
    assert (index.keys, index.labels("concept")) == (local.keys, local.labels("concept"))
    index.verify()
    again = pickle.loads(pickle.dumps(opened(server, tmp_path / "cache", split=None)))
    assert len(all_bytes(again)) == 45
    assert len(local.shards) > 3
    for shard in [*again.shards, "index.parquet"]:
        assert server.asked(shard) == 1, shard
    assert f"{server.address}/corpus/train/train-00000.tar: sample train0000" == index.where(0)


@pytest.mark.parametrize("ranges", [True, False])
def test_large_files_come_in_blocks_where_the_server_knows_ranges(
    corpus: Path, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(shard_cache, "BLOCK_BYTES", 5000)
    server.ranges = ranges
    index = opened(server, tmp_path / "cache")
    assert index.image_bytes(0) == ShardIndex.open(corpus, "train").image_bytes(0)
    size = (corpus / "train/train-00000.tar").stat().st_size
    assert server.asked("train-00000.tar") == (-(-size // 5000) if ranges else 1)


def test_any_protocol_of_fsspec_will_do(corpus: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/bucket/corpus", recursive=True)
    try:
        index = ShardIndex.open("memory://bucket/corpus", "train", ShardCache(tmp_path, GB))
        assert all_bytes(index) == all_bytes(ShardIndex.open(corpus, "train"))
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_read_that_fails_is_tried_again(server: RangeServer, tmp_path: Path) -> None:
    server.fault = lambda path, times: 503 if path.endswith("train-00000.tar") and times < 4 else None
    assert opened(server, tmp_path).image_bytes(0)
    assert server.asked("train-00000.tar") == 4


def test_tries_are_bounded_in_number_and_time(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(server, tmp_path)
    server.fault = lambda path, times: 503
    with pytest.raises(CorpusError, match=rf"{server.address}/corpus/train/train-00000.tar: .*4 tries in"):
        index.image_bytes(0)
    assert server.asked("train-00000.tar") == 4
    monkeypatch.setattr(remote, "PATIENCE", Patience(tries=1000, first_wait_s=0.1, total_s=0.5))
    begun = time.monotonic()
    with pytest.raises(CorpusError, match=r"\d tries in"):
        index.image_bytes(0)
    assert time.monotonic() - begun < 5
    assert not list(tmp_path.glob("*.part"))


def test_a_server_that_hangs_or_is_not_there_is_named(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 0.2)
    index = opened(server, tmp_path)
    server.fault = lambda path, times: time.sleep(1.0)  # type: ignore[func-returns-value]
    with pytest.raises(CorpusError, match=r"train-00000.tar: cannot be read, 4 tries .*Timeout"):
        index.image_bytes(0)
    with pytest.raises(
        CorpusError, match=r"http://127.0.0.1:9/corpus/manifest.json: cannot be read, 4 tries"
    ):
        ShardIndex.open("http://127.0.0.1:9/corpus", "train", ShardCache(tmp_path, GB))


def test_what_no_try_can_mend_is_told_at_once(server: RangeServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, GB)
    with pytest.raises(CorpusError, match=f"{server.address}/elsewhere/manifest.json: not found"):
        ShardIndex.open(f"{server.address}/elsewhere", "train", cache)
    assert server.asked("manifest.json") == 1
    server.fault = lambda path, times: 403
    with pytest.raises(CorpusError, match=r"manifest.json: may not be read .*403"):
        ShardIndex.open(f"{server.address}/corpus", "train", cache)
    assert server.asked("manifest.json") == 2
    with pytest.raises(
        CorpusError, match=r"carrier://pigeon/manifest.json: .*not known.*Protocols here: .*http"
    ):
        ShardIndex.open("carrier://pigeon", "train", cache)
    server.fault = lambda path, times: None
    with pytest.raises(CorpusError, match=r"give data\.cache_dir"):
        ShardIndex.open(f"{server.address}/corpus", "train")


def test_damage_on_the_way_is_fetched_again_and_a_changed_shard_refused(
    corpus: Path, server: RangeServer, tmp_path: Path
) -> None:
    good = (corpus / "train/train-00000.tar").read_bytes()
    bad = good[:700] + b"x" + good[701:]
    server.fault = lambda path, times: bad if path.endswith("train-00000.tar") and times == 1 else None
    index = opened(server, tmp_path)
    assert index.image_bytes(0) == ShardIndex.open(corpus, "train").image_bytes(0)
    for data, says in ((bad, "the checksum is not the manifest's"), (good[:-512], "bytes instead of")):
        server.fault = lambda path, times, data=data: data if path.endswith("train-00001.tar") else None  # type: ignore[misc]
        other = index.shard_of.tolist().index(1)
        with pytest.raises(CorpusError, match=rf"{server.address}/corpus/train/train-00001.tar: .*{says}"):
            index.image_bytes(other)
    assert not list(tmp_path.glob("*.part"))


def test_a_small_cache_keeps_what_was_read_last(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    sizes = {shard: size for shard, (size, _) in index._files._known.items()}  # type: ignore[attr-defined]
    limit = 2 * max(sizes.values()) + cached(tmp_path)  # the index is there too
    index = opened(server, tmp_path, limit)
    first = [index.shard_of.tolist().index(shard) for shard in range(4)]
    for shard in (0, 1, 0, 2, 0, 3, 0):
        index.image_bytes(first[shard])
        assert cached(tmp_path) <= limit
        time.sleep(0.02)  # the clock of the file system is coarse
    assert [server.asked(index.shards[shard]) for shard in range(4)] == [1, 1, 1, 1]
    index.image_bytes(first[1])  # made room for 3 long ago
    assert server.asked(index.shards[1]) == 2


def test_a_reader_goes_on_with_a_file_that_was_dropped(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    files: Any = index._files
    with files._opened(index.shards[0], *files._known[index.shards[0]]) as file:
        files._cache.limit_bytes = files._known[index.shards[1]][0]
        index.image_bytes(index.shard_of.tolist().index(1))
        assert cached(tmp_path) <= files._cache.limit_bytes
        assert len(file.read()) == files._known[index.shards[0]][0]


def test_a_file_larger_than_the_cache_is_refused(server: RangeServer, tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"index.parquet: has [\d,]+ bytes, .* takes 100: raise data.cache_gb"
    ):
        opened(server, tmp_path, 100)


def test_a_cache_that_would_fetch_over_and_over_is_refused(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    sizes = sorted((size for size, _ in index._files._known.values()), reverse=True)  # type: ignore[attr-defined]
    for together, needed in ((None, sum(sizes)), (1, sum(sizes[:2]))):
        opened(server, tmp_path, needed).reads(together)
        with pytest.raises(CorpusError, match=r"read at a time, the cache .* takes .*data.mix_shards"):
            opened(server, tmp_path, needed - 1).reads(together)


def test_other_files_and_left_over_parts(server: RangeServer, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_bytes(bytes(10**6))
    index = opened(server, tmp_path)
    part = tmp_path / ("0" * 64 + ".part")  # of a process that was killed
    part.write_bytes(bytes(10**6))
    index.image_bytes(0)
    assert mine.is_file()
    assert not part.exists()


def test_a_full_disk_is_named_and_leaves_no_part(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(server, tmp_path)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_cache.os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=f"{tmp_path}: no space left"):
        index.image_bytes(0)
    assert not list(tmp_path.glob("*.part"))


def test_when_other_fetches_fill_the_cache_it_waits_and_then_says_so(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(server, tmp_path)
    cache: Any = index._files._cache  # type: ignore[attr-defined]
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.2)
    monkeypatch.setattr(cache, "_make_room", lambda size, own: False)
    with pytest.raises(CorpusError, match=r"other fetches filled the cache .* raise data.cache_gb"):
        index.image_bytes(0)


def test_threads_share_a_fetch(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: index.image_bytes(i % len(index)), range(200)))
    assert read[: len(index)] == [index.image_bytes(i) for i in range(len(index))]
    assert all(server.asked(shard) == 1 for shard in index.shards)


def test_fetch_ahead_has_the_shard_before_it_is_read(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    index.fetch_ahead([0, len(index) - 1])
    wanted = [index.shards[0], index.shards[-1]]
    deadline = time.monotonic() + 20
    expected = sum(index._files._known[shard][0] for shard in wanted)  # type: ignore[attr-defined]
    while not all(server.asked(shard) for shard in wanted) or cached(tmp_path) < expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = len(server.requests)
    assert index.image_bytes(0) and index.image_bytes(len(index) - 1)
    assert len(server.requests) == asked
    assert [server.asked(shard) for shard in wanted] == [1, 1]


def _read_all(address: str, cache: Path, limit: int, told: Any) -> None:
    index = ShardIndex.open(address, "train", ShardCache(cache, limit))
    order = [(i * 7 + os.getpid()) % len(index) for i in range(3 * len(index))]
    told.put(sum(len(index.image_bytes(i)) for i in order))


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_processes_of_a_node_share_the_cache(
    corpus: Path, server: RangeServer, tmp_path: Path, small: bool
) -> None:
    """Also when it holds two shards at a time, and each process drops what the others fetched."""
    local = ShardIndex.open(corpus, "train")
    largest = max((corpus / shard).stat().st_size for shard in local.shards)
    limit = 4 * largest if small else GB
    context = multiprocessing.get_context("fork")
    told: Any = context.Queue()
    arguments = (f"{server.address}/corpus", tmp_path, limit, told)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    expected = 3 * sum(len(local.image_bytes(i)) for i in range(len(local)))
    assert [told.get(timeout=120) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert cached(tmp_path) <= limit
    if not small:
        assert all(server.asked(shard) == 1 for shard in local.shards)


def test_a_child_of_a_fork_reads_on(server: RangeServer, tmp_path: Path) -> None:
    index = opened(server, tmp_path)
    index.fetch_ahead([0])
    assert index.image_bytes(0)
    child = os.fork()
    if child == 0:
        index.fetch_ahead([len(index) - 1])
        os._exit(0 if index.image_bytes(len(index) - 1) else 1)
    assert os.waitpid(child, 0)[1] == 0
