"""From the files of five sets to a corpus that training reads: ingest, crawl from folders, shard, loader."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_tools.shards import ShardIndex
from learning.evaluation.gallery import gallery_of
from learning.methods.base import Views
from learning.tokenizer import train_wordpiece
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig
from stages import crawl, ingest, shard
from tests.corpora_case import write
from tests.data_helpers import make_job, picture

SITE = "http://pictures.example/"
SPLITS: Any = [
    {"name": "test", "given": ["test"]},
    {"name": "val", "given": ["val"]},
    {"name": "train"},
]


def coco_name(number: int, split: str) -> str:
    folder = "train2014" if split == "train" else "val2014"
    return f"{folder}/COCO_{folder}_{number:012d}.jpg"


def coco_image(number: int, split: str) -> dict[str, Any]:
    folder, _, name = coco_name(number, split).partition("/")
    texts = [f"a thing numbered {number}", f"the number {number}"]
    return {
        "filepath": folder,
        "filename": name,
        "cocoid": number,
        "split": split,
        "sentences": [{"raw": text, "sentid": n} for n, text in enumerate(texts)],
    }


PLACES = dict(enumerate(["train", "train", "train", "restval", "val", "test", "test"]))
COCO = {number: coco_name(number, split) for number, split in PLACES.items()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the sets, and the folders with their pictures, as a user has them."""
    folder = tmp_path_factory.mktemp("sets")
    pictures = {
        f"coco/{name}": picture(120, 110, (30 * number, 90, 7), "JPEG") for number, name in COCO.items()
    }
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    instances = {
        "images": [{"id": n, "file_name": name.partition("/")[2]} for n, name in COCO.items()],
        "annotations": [{"image_id": n, "category_id": c} for n in COCO for c in (18, 1) if n or c == 1],
        "categories": categories,
    }
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": n, "question": "What is it?", "question_id": n} for n in (3, 5)],
    }
    answers = {
        "annotations": [{"question_id": n, "multiple_choice_answer": "red"} for n in (3, 5)],
    }
    shop = picture(130, 100, (1, 200, 3), "JPEG")
    write(
        folder,
        pictures
        | {
            "dataset_coco.json": {"images": [coco_image(*one) for one in PLACES.items()], "dataset": "coco"},
            "instances.json": instances,
            "questions.json": questions,
            "answers.json": answers,
            "coco_cn.txt": "COCO_train2014_000000000001#0\t一个编号为一的东西\n",
            "cc3m.tsv": f"from the web\t{SITE}web/1.jpg\nnot there\t{SITE}web/2.jpg\n"
            f"a copy of a test picture\t{SITE}web/copy.jpg\n",
            "web/1.jpg": picture(100, 100, (0, 0, 250), "JPEG"),
            "web/copy.jpg": pictures[f"coco/{COCO[6]}"],
            "MR_train_queries.jsonl": json.dumps(
                {"query_id": 1, "query_text": "绿色 的 东西", "item_ids": [1000002]}
            ),
            "MR_train_imgs.tsv": b"1000002\t" + base64.urlsafe_b64encode(shop) + b"\n",
        },
    )
    return folder


@pytest.fixture(scope="module")
def corpus(sets: Path) -> tuple[Path, dict[str, int]]:
    coco = f"{SITE}coco/"
    sources: Any = [
        {
            "format": "karpathy",
            "name": "coco",
            "files": {"annotations": "dataset_coco.json"},
            "images": coco,
            "licence": "CC-BY-4.0 annotations",
        },
        {"format": "cc3m", "files": {"pairs": "cc3m.tsv"}},
        {"format": "coco_instances", "files": {"instances": "instances.json"}, "images": coco},
        {
            "format": "vqa2",
            "files": {"questions": "questions.json", "annotations": "answers.json"},
            "images": coco,
        },
        {"format": "coco_cn", "files": {"captions": "coco_cn.txt"}, "images": coco},
        {"format": "muge", "files": {"queries": "MR_train_queries.jsonl"}, "images": f"{SITE}muge/"},
    ]
    first = make_job(sets / "ingest")
    ingest.run(ingest.Config(sources=sources), first)
    site: Any = {
        "url_prefix": SITE,
        "folder": {"coco": "coco", "web": "web", "muge": "MR_train_imgs.tsv"},
    }
    second = make_job(sets / "crawl", pairs=first.directory)
    fetched = crawl.run(crawl.Config(local_site=site, processes=1, threads=4), second)
    assert (fetched.counts["kept"], fetched.counts["dropped_not_found"]) == (10, 1)
    third = make_job(sets / "shard", pictures=second.directory)
    report = shard.run(shard.Config(splits=SPLITS), third)
    return third.out, report.counts


@pytest.mark.slow
def test_the_splits_captions_and_classes_of_the_sources_are_in_the_shards(
    corpus: tuple[Path, dict[str, int]],
) -> None:
    out, counts = corpus
    assert ShardIndex.splits(out) == {"test": 2, "val": 1, "train": 6}
    index = ShardIndex.open(out)
    index.verify()
    found = {index.record(n)["url"].removeprefix(SITE): index.record(n) for n in range(len(index))}
    copied = f"coco/{COCO[6]}"
    assert set(found) == {f"coco/{name}" for name in COCO.values()} | {"web/1.jpg", "muge/1000002.jpg"}
    one = found[f"coco/{COCO[1]}"]
    assert [(text["text"], text["lang"]) for text in one["captions"]] == [
        ("a thing numbered 1", "en"),
        ("the number 1", "en"),
        ("一个编号为一的东西", "zh"),
    ]
    assert (one["split"], one["classes"], one["sources"]) == (
        "train",
        ["dog", "person"],
        ["coco", "coco_instances", "coco_cn"],
    )
    assert one["licence"].startswith("CC-BY-4.0 annotations; CC-BY-4.0 (COCO's annotations)")
    restval, test = found[f"coco/{COCO[3]}"], found[f"coco/{COCO[5]}"]
    assert [text["text"] for text in restval["captions"]][-1] == "What is it? red"
    assert [text["text"] for text in test["captions"]] == ["a thing numbered 5", "the number 5"]
    assert [text["text"] for text in found[copied]["captions"]] == [
        "a thing numbered 6",
        "the number 6",
    ]
    assert found["muge/1000002.jpg"]["queries"][0] == {
        "text": "绿色 的 东西",
        "lang": "zh",
        "show": 0,
        "click": 0,
        "ctr": None,
    }
    assert (counts["dropped_duplicate"], counts["captions_of_other_splits"]) == (1, 2)
    reasons = pq.read_table(out / "dropped.parquet").to_pylist()
    assert [(row["url"], row["kept_url"]) for row in reasons] == [(f"{SITE}web/copy.jpg", SITE + copied)]


@pytest.mark.slow
def test_training_and_evaluation_read_the_captions(corpus: tuple[Path, dict[str, int]]) -> None:
    out, _ = corpus
    index = ShardIndex.open(out, "train")
    texts = {index.keys[n]: index.record(n) for n in range(len(index))}
    tokenizer = train_wordpiece([text["text"] for r in texts.values() for text in r["captions"]] * 3, 300)
    batches = Batches(
        index,
        tokenizer,
        ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Views({"image": "plain"}, {"text": "plain"}),
        DataConfig(texts=("captions", "queries")),
        seed=3,
        contrastive_batch=6,
        max_length=16,
        rank=0,
        world_size=1,
    )
    drawn: dict[str, set[tuple[int, ...]]] = {}
    for step in range(30):
        loaded = batches.load(step)
        assert loaded.skipped == {}
        for key, ids, length in zip(
            loaded.batch.keys,
            loaded.batch.texts["text"].ids.tolist(),
            loaded.batch.texts["text"].mask.sum(1).tolist(),
            strict=True,
        ):
            drawn.setdefault(key, set()).add(tuple(ids[: int(length)]))
    for key, record in texts.items():
        own = [text["text"] for text in record["captions"] or record["queries"]]
        assert drawn[key] == {tuple(ids.tolist()) for ids in tokenizer.encode_each(own, 16)}
    held = gallery_of(ShardIndex.open(out, "test"), ["captions"])
    assert len(held.images) == 2
    assert sorted(held.texts) == [
        "a thing numbered 5",
        "a thing numbered 6",
        "the number 5",
        "the number 6",
    ]
