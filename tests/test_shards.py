"""Shards: the same records give the same bytes, any sample is found by its offset, damage is named."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.class_table import ClassTable
from data_tools.records import Languages
from data_tools.shards import ShardIndex, ShardWriter
from data_tools.shards import files as shard_files
from data_tools.shards.files import CorpusError
from data_tools.web.crawl import SCHEMA
from stages.base import StageError, Stopped
from stages.shard import Config, run
from tests.data_helpers import make_job, picture

LABELS = r"^http://site\.example/(?P<vendor>[^/]+)/(?P<concept>\d+)"
SPLITS: Any = [
    {"name": "held", "by": "vendor", "values": ["b"]},
    {"name": "val", "share": 0.3},
    {"name": "train"},
]
CONFIG: dict[str, Any] = {
    "labels": LABELS,
    "splits": SPLITS,
    "licence": {"by": "vendor", "values": {"a": "MIT"}, "otherwise": "unknown"},
}


def crawled(directory: Path, pictures: dict[str, bytes], pairs: list[dict[str, Any]]) -> Path:
    """The out/ of a crawl stage: url → bytes, "ok" all of them, and the pairs."""
    (directory / "out" / "tars").mkdir(parents=True)
    rows, offset = [], 0
    with (directory / "out" / "tars" / "00000.tar").open("wb") as file:
        for url, data in pictures.items():
            file.write(data)
            row = {
                "url": url,
                "status": "ok",
                "sha256": hashlib.sha256(data).hexdigest(),
                "width": 128,
                "height": 128,
            }
            rows.append(row | {"tar": "tars/00000.tar", "offset": offset, "bytes": len(data)})
            offset += len(data)
    rows.append({"url": "http://site.example/a/999", "status": "not_found"})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), directory / "out" / "pictures.parquet")
    columns = {"query": pa.string(), "url": pa.string(), "title": pa.string(), "content": pa.string()}
    numbers = {"show": pa.int64(), "click": pa.int64(), "ctr": pa.float64()}
    pq.write_table(
        pa.Table.from_pylist(pairs, pa.schema(columns | numbers)), directory / "out" / "pairs.parquet"
    )
    return directory


def pair(url: str, query: str | None, **changes: Any) -> dict[str, Any]:
    found = {
        "query": query,
        "url": url,
        "title": f"title of {url}",
        "content": "内容",
        "show": 100,
        "click": 20,
    }
    return found | changes | {"ctr": 0.2}


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    urls = [f"http://site.example/{vendor}/{i}" for vendor in "ab" for i in range(12)]
    formats = ("WEBP", "PNG", "JPEG")
    pictures = {url: picture(100 + n, 100, format=formats[n % 3]) for n, url in enumerate(urls)}
    rows = [pair(url, query) for url in urls for query in ("红色 熊猫", "a red panda")]
    return crawled(tmp_path_factory.mktemp("data") / "crawl", pictures, rows)


@pytest.fixture(scope="module")
def corpus(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = make_job(tmp_path_factory.mktemp("corpus") / "shard", pictures=crawl)
    report = run(Config(**CONFIG), job)
    assert report.counts["kept"] == 24
    assert not (job.directory / "out.unfinished").exists()
    return job.out


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "out"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def test_twice_the_same_bytes(crawl: Path, corpus: Path, tmp_path: Path) -> None:
    again = make_job(tmp_path / "elsewhere", pictures=crawl)
    run(Config(**CONFIG), again)
    first = contents(again.out)
    assert first == contents(corpus)
    (again.out / "left over").write_text("from an attempt that was killed")
    run(Config(**CONFIG), again)
    assert contents(again.out) == first


def test_any_sample_by_offset_equals_the_tar_and_the_crawl(crawl: Path, corpus: Path) -> None:
    index = ShardIndex.open(corpus)
    fetched = {row["url"]: row for row in pq.read_table(crawl / "out" / "pictures.parquet").to_pylist()}
    by_tar: dict[str, bytes] = {}
    for path in sorted(corpus.rglob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert [Path(name).suffix for name in names[1::2]] == [".json"] * (len(names) // 2)
            by_tar |= {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert len(by_tar) == 48
    data = (crawl / "out" / "tars" / "00000.tar").read_bytes()
    for i in range(len(index)):
        record = index.record(i)
        source = fetched[record["url"]]
        assert index.image_bytes(i) == data[source["offset"] : source["offset"] + source["bytes"]]
        assert json.loads(by_tar[f"{index.keys[i]}.json"]) == record
        assert index.image_bytes(i) in (by_tar.get(f"{index.keys[i]}.{e}") for e in ("webp", "png", "jpg"))
    index.verify()


def test_webdataset_reads_them(corpus: Path) -> None:
    import webdataset

    urls = [str(path) for path in sorted(corpus.rglob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    samples = {sample["__key__"]: sample["json"] for sample in dataset}
    index = ShardIndex.open(corpus)
    assert samples == {key: index.record(i) for i, key in enumerate(index.keys)}


def test_records_and_splits(corpus: Path) -> None:
    counts = ShardIndex.splits(corpus)
    assert list(counts) == ["held", "val", "train"]
    assert counts["held"] == 12
    assert sum(counts.values()) == 24 == len(ShardIndex.open(corpus))
    held = ShardIndex.open(corpus, "held")
    assert held.labels("vendor") == ["b"] * 12
    assert sorted(map(int, held.labels("concept"))) == list(range(12))
    record = held.record(0)
    assert record["split"] == "held"
    assert record["licence"] == "unknown"
    assert record["labels"]["vendor"] == "b"
    assert record["captions"] == []
    assert (record["show"], record["click"], record["ctr"]) == (200, 40, 0.2)
    assert [(q["text"], q["lang"], q["ctr"]) for q in record["queries"]] == [
        ("a red panda", "en", 0.2),
        ("红色 熊猫", "zh", 0.2),
    ]
    assert json.loads((corpus / "manifest.json").read_text())["licences"] == {"MIT": 12, "unknown": 12}


def test_classes_come_from_the_rows_of_a_table_that_have_the_label(crawl: Path, tmp_path: Path) -> None:
    rows = [
        "id\tgroup\tgroup_zh\tother",
        "1\tcat| red\tcat|猫\tx",
        "2\t\t\tx",
        '1\tred|"big"\t\tx',
        "A\tb\t\tx",
    ]
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked: Any = {"table": "t.tsv", "by": "concept", "key": "id", "columns": ["group", "group_zh"]}
    job = make_job(tmp_path / "shard", pictures=crawl)
    report = run(Config(**CONFIG, classes_from=asked), job)
    index = ShardIndex.open(job.out)
    for i in range(len(index)):
        record = index.record(i)
        wanted = ["cat", "red", "猫", '"big"'] if record["labels"]["concept"] == "1" else []
        assert record["classes"] == wanted
    assert report.counts["without_classes"] == 22
    assert Config(**CONFIG, classes_from=asked).files() == {"classes_from.table": Path("t.tsv")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"by": "colour"}, r"classes_from\.by: no label 'colour'; labels: concept, vendor"),
        ({"key": "code"}, r"t\.csv: no column 'code'; there are: id, group"),
        ({"columns": ["x"]}, r"t\.csv: no column 'x'; there are: id, group"),
        ({"table": "none.csv"}, r"none\.csv: cannot be read: .*No such file"),
        ({"table": "t.txt"}, r"t\.txt: '\.txt'; allowed: \.tsv, \.csv, \.parquet"),
        ({"table": "short.csv"}, r"short\.csv: line 3: another number of columns"),
        ({"table": "empty.csv"}, r"empty\.csv: no row has a id"),
        ({"table": "bad.parquet"}, r"bad\.parquet: cannot be read"),
    ],
)
def test_a_table_of_classes_that_cannot_be_read_is_named(
    crawl: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    texts = {
        "t.csv": 'id,group\n1,"a,b|c"\n',
        "short.csv": "id,group\n1,a\n2\n",
        "empty.csv": "id,group\n,a\n",
    }
    for name, text in (texts | {"bad.parquet": "no parquet", "t.txt": ""}).items():
        (tmp_path / name).write_text(text)
    asked: Any = {"table": "t.csv", "by": "concept", "key": "id", "columns": ["group"]} | change
    with pytest.raises(StageError, match=says):
        run(Config(**CONFIG, classes_from=asked), make_job(tmp_path / "shard", pictures=crawl))


def test_classes_by_csv_and_parquet_whatever_the_case(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('ID,group\n1F-a,"a,b|c"\n', encoding="utf-8")
    assert ClassTable(tmp_path / "t.csv", "ID", ["group"]).of("1f-A") == ["a,b", "c"]
    table = pa.table({"ID": [7, None], "group": [["x", "y"], ["z"]], "more": ["y|w", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    made = ClassTable(tmp_path / "t.parquet", "ID", ["group", "more"])
    assert made.of("7") == ["x", "y", "w"] and made.of("8") == []


def test_small_shards_are_many(crawl: Path, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", 20_000, ["train"], [])
    (tmp_path / "out").mkdir()
    record = {"split": "train", "sha256": "", "width": 1, "height": 1, "labels": {}, "licence": "x"}
    for i in range(20):
        writer.write(bytes([i]) * 4000, "png", record | {"key": f"{i:04d}"})
    manifest = writer.close()
    assert [shard["samples"] for shard in manifest["shards"]] == [4] * 5
    index = ShardIndex.open(tmp_path / "out")
    assert [index.image_bytes(i)[:1] for i in range(20)] == [bytes([i]) for i in range(20)]
    assert all(shard["bytes"] % 10_240 == 0 for shard in manifest["shards"])  # as tar itself pads


def test_equal_pictures_become_one_record_with_the_queries_of_all(tmp_path: Path) -> None:
    same, other = picture(), picture(101)
    a, b, c, d = (f"http://site.example/a/{i}" for i in range(4))
    rows = [
        pair(b, "only b", show=7, click=1),
        pair(b, "both", show=10, click=1, title="b's"),
        pair(a, "both", show=30, click=9, title="seen less"),
        pair(a, "only a", show=40, click=4, title="seen most"),
        pair(d, None, title="no query left"),
    ]
    source = crawled(tmp_path / "crawl", {b: same, c: same, a: same, d: other}, rows)
    job = make_job(tmp_path / "shard", pictures=source)
    report = run(Config(labels=LABELS), job)
    assert (report.counts["pictures"], report.counts["kept"], report.counts["dropped_duplicate"]) == (4, 2, 2)
    index = ShardIndex.open(job.out)
    records = {index.record(i)["url"]: index.record(i) for i in range(2)}
    assert set(records) == {a, d}
    assert [(q["text"], q["show"], q["click"]) for q in records[a]["queries"]] == [
        ("both", 40, 10),
        ("only a", 40, 4),
        ("only b", 7, 1),
    ]
    assert (records[a]["title"], records[a]["other_titles"]) == ("seen most", ["seen less"])
    assert (records[a]["content"], records[a]["other_contents"]) == ("内容", [])
    assert (records[a]["show"], records[a]["click"]) == (87, 15)
    assert records[d]["queries"] == []
    assert records[d]["title"] == "no query left"
    assert records[d]["ctr"] is None
    dropped = pq.read_table(job.out / "dropped.parquet").to_pylist()
    assert [(row["url"], row["kept_url"], row["reason"]) for row in dropped] == [
        (u, a, "duplicate") for u in (b, c)
    ]


def test_texts_of_a_held_out_concept_do_not_reach_training_through_an_equal_picture(tmp_path: Path) -> None:
    seen, seen_too, held = (f"http://site.example/{place}" for place in ("a/1", "a/2", "b/3"))
    rows = [
        pair(seen, "of seen"),
        pair(seen_too, "of seen too"),
        pair(held, "of held"),
        pair(held, "of seen"),
    ]
    source = crawled(tmp_path / "crawl", dict.fromkeys((seen, seen_too, held), picture()), rows)
    splits: Any = [{"name": "held", "by": "concept", "values": ["3"]}, {"name": "train"}]
    job = make_job(tmp_path / "shard", pictures=source)
    report = run(Config(labels=LABELS, splits=splits), job)
    record = ShardIndex.open(job.out, "train").record(0)
    assert [(q["text"], q["show"]) for q in record["queries"]] == [("of seen", 100), ("of seen too", 100)]
    assert report.counts["queries_of_other_splits"] == 2
    assert report.counts["dropped_duplicate"] == 2


def test_safe_across_fork_threads_and_pickle(corpus: Path) -> None:
    index = ShardIndex.open(corpus)
    expected = [index.image_bytes(i) for i in range(len(index))]
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(i for _ in range(20) for i in range(len(index)) if index.image_bytes(i) != expected[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    child = os.fork()
    if child == 0:
        read()
        os._exit(len(wrong))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert not wrong
    other = pickle.loads(pickle.dumps(index))
    index.close()
    assert [other.image_bytes(i) for i in range(len(other))] == expected
    assert index.image_bytes(0) == expected[0]  # opened again


def test_few_files_are_open_at_a_time_and_one_that_is_read_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path, 1, ["train"], [])
    record = {"split": "train", "sha256": "", "width": 1, "height": 1, "labels": {}, "licence": "x"}
    for i in range(12):
        writer.write(bytes([i]) * 4000, "png", record | {"key": f"{i:04d}"})
    writer.close()
    monkeypatch.setattr(shard_files, "OPEN_FILES", 3)
    index = ShardIndex.open(tmp_path)

    def wrong(_: int) -> list[int]:
        return [i for _ in range(200) for i in range(12) if index.image_bytes(i) != bytes([i]) * 4000]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(wrong, range(4))) == [[]] * 4

    def opened() -> set[str]:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return {link.name for link in links if link.is_relative_to(tmp_path)}

    for i in (5, 6, 7, 5, 8):
        index.image_bytes(i)
    assert opened() == {f"train-{i:05d}.tar" for i in (7, 5, 8)}
    index.close()
    assert not opened()


def test_unknown_split_and_label_list_what_there_is(corpus: Path) -> None:
    with pytest.raises(CorpusError, match="no split 'test'; there are: held, val, train"):
        ShardIndex.open(corpus, "test")
    with pytest.raises(CorpusError, match="no label 'colour'; there are: concept, vendor"):
        ShardIndex.open(corpus).labels("colour")


def test_an_empty_split_and_an_empty_corpus(crawl: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "shard", pictures=crawl)
    splits: Any = [{"name": "none", "by": "vendor", "values": ["z"]}, {"name": "train"}]
    run(Config(labels=LABELS, splits=splits), job)
    with pytest.raises(CorpusError, match=r"the split 'none' is empty \(none 0, train 24\)"):
        ShardIndex.open(job.out, "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no manifest"):
        ShardIndex.open(tmp_path / "empty")


def spoil_size(out: Path) -> None:
    path = next(out.rglob("train-*.tar"))
    path.write_bytes(path.read_bytes()[:-512])


def spoil_missing(out: Path) -> None:
    next(out.rglob("train-*.tar")).unlink()


def spoil_index(out: Path) -> None:
    data = bytearray((out / "index.parquet").read_bytes())
    data[-20:] = bytes(20)
    (out / "index.parquet").write_bytes(data)


def spoil_manifest(out: Path) -> None:
    path = out / "manifest.json"
    path.write_text(path.read_text()[:-30])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_size, "train-00000.tar: the shard has"),
        (spoil_missing, "train-00000.tar: the shard is missing"),
        (spoil_index, "index.parquet: the index cannot be read"),
        (spoil_manifest, "manifest.json: cannot be read"),
    ],
)
def test_damage_is_named_when_the_corpus_is_opened(copy: Path, spoil: Any, says: str) -> None:
    spoil(copy)
    with pytest.raises(CorpusError, match=says) as caught:
        ShardIndex.open(copy)
    assert "Run the shard stage again" in str(caught.value)


def test_damage_within_a_shard_of_the_right_size_is_named(copy: Path) -> None:
    path = next(copy.rglob("train-*.tar"))
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    index = ShardIndex.open(copy, "train")
    with pytest.raises(CorpusError, match=f"train-00000.tar: sample {index.keys[0]}: the record is damaged"):
        index.record(0)
    with pytest.raises(CorpusError, match="the checksum is not the manifest's"):
        index.verify()
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="cut short"):
        index.image_bytes(0)


@pytest.mark.slow
def test_a_full_disk_leaves_the_crawl_and_the_corpus_before(crawl: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "shard", pictures=crawl)
    run(Config(**CONFIG), job)
    before = contents(job.out)
    command = [sys.executable, "-m", "tests.stage_process", "shard", json.dumps(CONFIG), str(job.directory)]
    done = subprocess.run(
        [*command, f"pictures={crawl}"],
        env={**os.environ, "FILE_LIMIT": "9000"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert str(job.directory) in done.stderr
    assert contents(job.out) == before


def test_bad_inputs_are_named(crawl: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"pictures.parquet: missing. Run the crawl stage again"):
        run(Config(), make_job(tmp_path / "shard", pictures=tmp_path / "none"))
    with pytest.raises(StageError, match=r"licence.by: no label 'colour'; labels: concept, vendor"):
        run(Config(labels=LABELS, licence={"by": "colour"}), make_job(tmp_path / "shard", pictures=crawl))  # type: ignore[arg-type]
    broken = Path(shutil.copytree(crawl, tmp_path / "crawl"))
    (broken / "out" / "tars" / "00000.tar").write_bytes(b"short")
    with pytest.raises(StageError, match=r"00000.tar: cut short at http://.*Run the crawl stage again"):
        run(Config(), make_job(tmp_path / "shard", pictures=broken))
    with pytest.raises(ValueError, match="no named group"):
        Config(labels="(x)")
    with pytest.raises(Stopped):
        run(Config(), make_job(tmp_path / "stopped", should_stop=lambda: True, pictures=crawl))
    assert not (tmp_path / "stopped" / "out").exists()


def test_languages_by_script() -> None:
    languages = Languages("zh", "en")
    assert [languages.of(text) for text in ("a red panda", "红色 panda", "", "𠮷", "émoji")] == [
        "en",
        "zh",
        "en",
        "zh",
        "en",
    ]
