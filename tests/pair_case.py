"""A method that judges pairs, a matching corpus, and a finished training stage of it, for re-ranking's tests."""

import json
from pathlib import Path
from typing import Any

import torch

from data_tools.shards import ShardWriter
from learning import methods, model_files
from learning.methods.base import Method
from tests import tiny_model

FOLDER = str(Path(__file__).parent / "pair_methods")
MODEL: dict[str, Any] = tiny_model.MODEL | {"method": "paired"}


def plug_in() -> None:
    """Make the method `paired` known in this process. A test that does so takes it back: see `plugged`."""
    if FOLDER not in methods.__path__:
        methods.__path__.append(FOLDER)


def plug_out() -> None:
    methods.__path__.remove(FOLDER)


def method(seed: int = 0) -> Method:
    """An untrained model that judges pairs, in evaluation mode."""
    torch.manual_seed(seed)
    built = methods.build(methods.parse_config(MODEL), ("ccl",), tiny_model.tokenizer().vocabulary_size)
    with torch.no_grad():
        for _ in range(3):
            built.embed_images(torch.randn(8, 3, tiny_model.PX, tiny_model.PX))
    return built.eval()


def write_stage(directory: Path) -> Path:
    """A finished training stage's directory."""
    model_files.save(
        directory / "out",
        method(),
        MODEL,
        ("ccl",),
        tiny_model.tokenizer(),
        transform=tiny_model.transform(),
        max_length=MODEL["text"]["max_length"],
    )
    (directory / "config.yaml").write_text("kind: finetune\nseed: 7\n")
    (directory / "DONE.json").write_text(json.dumps({"stage": "finetune"}))
    return directory


def write_matching_corpus(directory: Path, match: list[str], splits: tuple[str, ...] = ("test",)) -> Path:
    """A benchmark stage's out/ of a matching set: one caption a picture, and its label `match`."""
    writer = ShardWriter(directory, shard_bytes=30_000, splits=list(splits), labels=["concept", "match"])
    for split in splits:
        for number, value in enumerate(match):
            image = tiny_model.picture_bytes(number)
            record = tiny_model.record(number, split, image, title="", content="", queries=[])
            record["captions"] = [f"red thing {number}", "never read"]
            record["labels"] = {"concept": "c", "match": value}
            writer.write(image, "png", record)
    writer.close()
    return directory
