"""What importers give with a picture: sources meet in one record, and no caption leaves its split."""

import base64
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.corpora.tables import PAIRS
from data_tools.errors import DataError
from data_tools.shards import ShardIndex
from data_tools.splits import SplitRule, check_rules, split_of
from data_tools.web.local_site import LocalSite
from stages.shard import Config, run
from tests.data_helpers import make_job, picture
from tests.test_shards import crawled

URL = "http://pictures.example/{}.jpg"
SPLITS: Any = [
    {"name": "test", "given": ["test"]},
    {"name": "val", "given": ["val", "dev"]},
    {"name": "train"},
]


def entry(name: str, *captions: str, lang: str = "en", **changes: Any) -> dict[str, Any]:
    rest = {"query": "", "title": "", "content": "", "show": 0, "click": 0, "ctr": None, "split": None}
    said = {"classes": [], "licence": "ours", "source": "one"}
    texts = [{"text": text, "lang": lang} for text in captions]
    return rest | said | {"url": URL.format(name), "captions": texts} | changes


def records(tmp_path: Path, pictures: dict[str, bytes], rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """By the picture's name: the record that the shard stage makes; and the stage's counts."""
    crawl = crawled(tmp_path / "crawl", {URL.format(name): data for name, data in pictures.items()}, [])
    pq.write_table(pa.Table.from_pylist(rows, PAIRS), crawl / "out" / "pairs.parquet")
    job = make_job(tmp_path / "shard", pictures=crawl)
    report = run(Config(splits=SPLITS), job)
    index = ShardIndex.open(job.out)
    found = {}
    for place in range(len(index)):
        record = index.record(place)
        found[record["url"].rpartition("/")[2].removesuffix(".jpg")] = record
    return found, report.counts


def texts(record: dict[str, Any]) -> list[str]:
    return [caption["text"] for caption in record["captions"]]


def test_sources_on_one_picture_meet_in_the_order_of_their_rows(tmp_path: Path) -> None:
    rows = [
        entry("a", "z first", "a second", split="train", source="karpathy"),
        entry("a", "第一", "z first", lang="zh", source="cn", licence="theirs"),
        entry("a", classes=["dog", "cat"], source="instances"),
        entry("a", "what? this", classes=["cat", "sky"], split="train2014", source="vqa2"),
        entry("b", query="红 熊猫", title="标题", source="zero"),
    ]
    found, counts = records(tmp_path, {"a": picture(color=(1, 1, 1)), "b": picture()}, rows)
    assert found["a"]["captions"] == [
        {"text": "z first", "lang": "en"},
        {"text": "a second", "lang": "en"},
        {"text": "第一", "lang": "zh"},
        {"text": "what? this", "lang": "en"},
    ]
    assert found["a"]["classes"] == ["dog", "cat", "sky"]
    assert found["a"]["sources"] == ["karpathy", "cn", "instances", "vqa2"]
    assert found["a"]["licence"] == "ours; theirs"
    assert (found["a"]["split"], found["a"]["lang"], found["a"]["ctr"]) == ("train", "en", None)
    assert [query["text"] for query in found["b"]["queries"]] == ["红 熊猫"]
    assert (found["b"]["lang"], found["b"]["captions"]) == ("zh", [])
    assert counts["captions_of_other_splits"] == 0


def test_a_picture_that_one_source_holds_out_is_held_out(tmp_path: Path) -> None:
    rows = [
        entry("a", "of training", split="train", source="one"),
        entry("a", "held out", split="test", source="two"),
        entry("a", "follows", source="three"),
        entry("a", query="a query", split="train", source="one"),
        entry("b", "of dev", split="dev"),
        entry("c", "rest", split="restval"),
    ]
    found, counts = records(tmp_path, {n: picture(color=(ord(n), 0, 0)) for n in "abc"}, rows)
    assert {name: record["split"] for name, record in found.items()} == {
        "a": "test",
        "b": "val",
        "c": "train",
    }
    assert texts(found["a"]) == ["held out", "follows"]
    assert found["a"]["queries"] == []
    assert found["a"]["sources"] == ["two", "three"]
    assert (counts["captions_of_other_splits"], counts["queries_of_other_splits"]) == (1, 1)


def test_equal_pictures_of_two_sets_are_one_held_out_record(tmp_path: Path) -> None:
    same = picture(color=(9, 9, 9))
    rows = [
        entry("coco", "in training", split="train", classes=["dog"]),
        entry("flickr", "in the test", split="test", licence="theirs"),
    ]
    rows.append(entry("web", "of the web"))  # no split: no text of the test set
    found, counts = records(tmp_path, {"coco": same, "flickr": same, "web": same}, rows)
    assert list(found) == ["coco"]
    assert found["coco"]["split"] == "test"
    assert texts(found["coco"]) == ["in the test"]
    assert (found["coco"]["classes"], found["coco"]["licence"]) == (["dog"], "theirs")
    assert (counts["dropped_duplicate"], counts["captions_of_other_splits"]) == (2, 2)


def test_given_splits_stand_beside_labels_and_shares() -> None:
    rules = [SplitRule("test", given=("test", "dev")), SplitRule("val", share=0.5), SplitRule("train")]
    check_rules(rules, ())
    found = {split_of(f"k{n}", {}, rules, 1, {"restval", "dev"}) for n in range(50)}
    assert found == {"test"}
    assert {split_of(f"k{n}", {}, rules, 1, {"train"}) for n in range(50)} == {"val", "train"}
    for wrong in (SplitRule("test", given=()), SplitRule("test", given=("a",), share=0.5)):
        with pytest.raises(DataError, match=r"splits\[0\] 'test': given: name at least one split"):
            check_rules([wrong, SplitRule("train")], ())


def fetched(site: LocalSite, path: str) -> bytes | None:
    try:
        with urllib.request.urlopen("http://{}:{}/{}".format(*site.address, path)) as response:
            return bytes(response.read())
    except urllib.error.HTTPError:
        return None


def test_one_site_serves_folders_and_a_file_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    (tmp_path / "coco" / "val2014" / "1.jpg").write_bytes(b"one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_bytes(b"other")
    odd = bytes(range(256))
    rows = [
        b"1000002\t" + base64.b64encode(b"two") + b"\r\n",
        b"43\t" + base64.urlsafe_b64encode(odd) + b"\n",
        b"44\t%%%\n",
    ]
    (tmp_path / "imgs.tsv").write_bytes(b"".join(rows))
    with LocalSite({"coco": tmp_path / "coco", "muge": tmp_path / "imgs.tsv"}) as site:
        assert fetched(site, "coco/val2014/1.jpg") == b"one"
        assert fetched(site, "muge/1000002.jpg") == b"two"
        assert fetched(site, "muge/43.jpg") == odd
        for path in ("val2014/1.jpg", "muge/44.jpg", "muge/9.jpg", "coco/..%2fother/secret", "coco", ""):
            assert fetched(site, path) is None
    (tmp_path / "imgs.tsv").write_bytes(rows[0] + rows[1] + b"no tab\n")
    with pytest.raises(DataError, match=r"imgs\.tsv: line 3: not an id, a tab"):
        LocalSite({"muge": tmp_path / "imgs.tsv"})
    (tmp_path / "imgs.tsv").write_bytes(rows[0] + rows[0])
    with pytest.raises(DataError, match=r"imgs\.tsv: line 2: the id '1000002' stands twice"):
        LocalSite(tmp_path / "imgs.tsv")
