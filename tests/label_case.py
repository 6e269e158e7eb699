"""A corpus whose pictures have several labels, or none, and now and then one text: for label-wise tests."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.shards import ShardWriter
from tests import tiny_model

CLASSES = [["dog"], ["dog", "frisbee"], ["cat"], [], ["cat", "dog"], ["ship"], ["frisbee", "dog"], ["cat"]]
TAGS = ["a|b", "b", "", "c| a", "c", "", "b", "z"]
SAME_TEXT = (1, 2)  # they have one caption in common


def write_corpus(directory: Path, splits: Sequence[str] = ("test",), samples: int = 24) -> Path:
    """Sample i of a split has CLASSES[i % 8] as its classes and TAGS[i % 8] as its label `tags`."""
    writer = ShardWriter(directory, shard_bytes=30_000, splits=list(splits), labels=["concept", "tags"])
    for split, number in itertools.product(splits, range(samples)):
        image = tiny_model.picture_bytes(number)
        record = tiny_model.record(number, split, image)
        record |= {"captions": captions(number), "classes": CLASSES[number % 8]}
        record["labels"] = {"concept": f"c{number // 3}", "tags": TAGS[number % 8]}
        writer.write(image, "png", record)
    writer.close()
    return directory


def captions(number: int) -> list[dict[str, str]]:
    own = f"red thing {number}"
    return [{"text": text, "lang": "en"} for text in [own, *(["two of them"] if number in SAME_TEXT else [])]]


def labels_of(number: int) -> set[str]:
    return set(CLASSES[number % 8])


def gallery(name: str = "by_labels", split: str = "test", **changed: Any) -> dict[str, Any]:
    """A label-wise gallery of the evaluate stage, or what `validate` says of one without its name."""
    return {"name": name, "split": split, "task": "labels", "texts": ["captions"]} | changed
