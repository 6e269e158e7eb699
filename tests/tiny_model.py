"""A tiny corpus, a tiny model and a finished training stage, for the tests of evaluation."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_tools.shards import ShardIndex, ShardWriter
from learning import methods, model_files
from learning.methods.base import Method
from learning.tokenizer import Tokenizer, train_wordpiece
from learning.training.augment import ImageTransform

PX = 32
MODEL: dict[str, Any] = {
    "method": "clip",
    "vision": {"name": "resnet10t", "image_px": PX, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "text": {"layers": 1, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
    "dimension": 16,
}
COLOURS = ("red", "green", "blue", "yellow", "cyan", "purple", "orange", "grey")


def picture_bytes(seed: int, file_format: str = "PNG") -> bytes:
    """A picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize((40, 40), Image.Resampling.NEAREST).save(data, file_format)
    return data.getvalue()


def record(number: int, split: str, image: bytes, **changed: Any) -> dict[str, Any]:
    """Sample `number`: three pictures a concept, all three with the concept's title."""
    concept = f"c{number // 3:03d}"
    return {
        "key": f"{split}{number:04d}",
        "title": f"{COLOURS[number // 3 % 8]} thing {number // 3}",
        "content": f"content of {number}",
        "queries": [{"text": f"query {number}", "lang": "en", "show": 9, "click": 3, "ctr": 1 / 3}],
        "captions": [f"caption {number} {i}" for i in range(5)],
        "lang": "en",
        "url": f"http://pictures.example/{number}.png",
        "sha256": hashlib.sha256(image).hexdigest(),
        "width": 40,
        "height": 40,
        "labels": {"concept": concept, "vendor": f"v{number % 3}"},
        "licence": "MIT",
        "split": split,
    } | changed


def write_corpus(directory: Path, images: int = 23, split: str = "test", **changed: Any) -> Path:
    """A shard stage's out/; `changed` fields are set in every record."""
    writer = ShardWriter(directory, shard_bytes=30_000, splits=[split], labels=["concept", "vendor"])
    for number in range(images):
        image = picture_bytes(number)
        writer.write(image, "png", record(number, split, image, **changed))
    writer.close()
    return directory


def open_corpus(directory: Path, split: str = "test") -> ShardIndex:
    return ShardIndex.open(directory, split)


def tokenizer() -> Tokenizer:
    texts = [
        f"{colour} thing {number} content of query caption" for colour in COLOURS for number in range(10)
    ]
    return train_wordpiece(texts, 200)


def transform() -> ImageTransform:
    return ImageTransform(PX, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def method(seed: int = 0) -> Method:
    """An untrained model whose batch norms have seen something, in evaluation mode."""
    torch.manual_seed(seed)
    built = methods.build(methods.parse_config(MODEL), ("ccl",), tokenizer().vocabulary_size)
    with torch.no_grad():
        for _ in range(3):
            built.embed_images(torch.randn(8, 3, PX, PX))
    return built.eval()


def write_stage(directory: Path, seed: int = 0) -> Path:
    """A finished training stage's directory."""
    model_files.save(
        directory / "out",
        method(seed),
        MODEL,
        ("ccl",),
        tokenizer(),
        transform=transform(),
        max_length=MODEL["text"]["max_length"],
    )
    (directory / "config.yaml").write_text("kind: finetune\nseed: 7\n")
    (directory / "DONE.json").write_text(json.dumps({"stage": "finetune"}))
    return directory
