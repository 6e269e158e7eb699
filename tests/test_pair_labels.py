"""ICM's layout to a corpus whose samples are labelled match or no match: ingest, crawl, shard."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.shards import ShardIndex
from stages import crawl, ingest, shard
from stages.base import StageError
from tests.corpora_case import write
from tests.data_helpers import make_job, picture

SITE = "http://pictures.example/"
LABELS = r"\?match=(?P<match>[01])$"
# text, picture, label; the pictures b and copy_of_b are equal byte for byte
PAIRS = [
    ("the first", "a.jpg", 1),
    ("not the first", "a.jpg", 0),
    ("the second", "b.jpg", 1),
    ("not the second", "copy_of_b.jpg", 0),
    ("the third", "c.jpg", 0),
]


@pytest.fixture(scope="module")
def crawled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icm")
    second = picture(120, 100, (0, 200, 0), "JPEG")
    lines = [json.dumps({"text": t, "image_path": f"any/{p}", "label": label}) for t, p, label in PAIRS]
    write(
        folder,
        {
            "train.json": "\n".join(lines),
            "images/a.jpg": picture(120, 100, (200, 0, 0), "JPEG"),
            "images/b.jpg": second,
            "images/copy_of_b.jpg": second,
            "images/c.jpg": picture(120, 100, (0, 0, 200), "JPEG"),
        },
    )
    source: Any = {"format": "zero_pairs", "files": {"train": "train.json"}, "images": f"{SITE}zero/"}
    first = make_job(folder / "ingest")
    first.recipe_directory = folder
    ingest.run(ingest.Config(sources=(source,)), first)
    site: Any = {"url_prefix": SITE, "folder": {"zero": "images"}}
    second_job = make_job(folder / "crawl", pairs=first.directory)
    second_job.recipe_directory = folder
    crawl.run(crawl.Config(local_site=site, processes=1, threads=2), second_job)
    return second_job.directory


def judged(out: Path) -> list[tuple[list[str], str]]:
    index = ShardIndex.open(out, "train")
    texts = [[caption["text"] for caption in index.record(i)["captions"]] for i in range(len(index))]
    return sorted(zip(texts, index.labels("match"), strict=True))


def test_no_text_stands_under_the_label_of_another_pair(crawled: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "shard", pictures=crawled)
    report = shard.run(shard.Config(labels=LABELS, pair_labels=("match",)), job)
    found = judged(job.out)
    told = {text: str(label) for text, _, label in PAIRS}
    assert all(told[text] == label for texts, label in found for text in texts)
    # one picture is one sample: of equal ones the pair whose URL comes first
    assert found == [(["not the first"], "0"), (["the second"], "1"), (["the third"], "0")]
    assert report.counts["captions_of_other_splits"] == 2


def test_a_label_that_is_none_is_named(crawled: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="pair_labels: no label 'mtach'; labels: match"):
        shard.run(
            shard.Config(labels=LABELS, pair_labels=("mtach",)),
            make_job(tmp_path / "shard", pictures=crawled),
        )
