"""The loader alone beside open_clip's: 640-px photos to 224-px crops, images a second of one core.

python -m benchmarks.peer_loader --peer-python PEER/bin/python [--photos FOLDER_OF_TARS]

Both sides read the same tar shards in one process and one thread, in turns; CPU seconds count, so that what
else the machine does matters little. open_clip's side is its own training pipeline (webdataset, random crop
of 0.9-1 of the area, bicubic, tokenizer). Tandem's plain view is the whole picture, bilinear; its augmented
one COOKIE's: random crop of 0.6-1 a side, flip, noise, colour jitter, grey: more work than open_clip does.
The third line is its crop and flip alone: what open_clip does, of crops that may be smaller.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torchvision.transforms.v2 import functional as v2

from benchmarks.photos import captions, write_photos
from data_tools.shards import ShardIndex
from learning.methods.base import ImageView, Views
from learning.tokenizer import train_wordpiece
from learning.training import augment
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig
from learning.training.prefetch import batches_from

HALF = (0.5, 0.5, 0.5)


def shard_list(corpus: Path) -> str:
    """The corpus's tars as webdataset names several."""
    return "::".join(str(path) for path in sorted(corpus.rglob("*.tar")))


def tandem(corpus: Path, batch: int, view: ImageView) -> float:
    """CPU seconds an image, over an epoch."""
    tokenizer = train_wordpiece(captions(), 400)
    batches = Batches(
        ShardIndex.open(corpus, "train"),
        tokenizer,
        ImageTransform(224, HALF, HALF),
        Views({"image": view}, {"text": "plain"}),
        DataConfig(texts=("title",)),
        seed=0,
        contrastive_batch=batch,
        max_length=32,
        rank=0,
        world_size=1,
    )
    batches.load(0)  # imports and caches are warm
    cpu = time.process_time()
    images = sum(len(made.batch.keys) for made in batches_from(batches, 0, batches.per_epoch))  # type: ignore[union-attr]
    return (time.process_time() - cpu) / images


def open_clip(python: Path, corpus: Path, samples: int, batch: int) -> float:
    """CPU seconds an image, over an epoch."""
    command = [
        python,
        Path(__file__).with_name("open_clip_side.py"),
        "loader",
        "--shards",
        shard_list(corpus),
    ]
    done = subprocess.run(
        [*map(str, command), "--samples", str(samples), "--batch", str(batch)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["cpu_s"] / found["images"])


def jitter_ms() -> tuple[float, float]:
    """Milliseconds of the colour operations on 224 x 224 px: Tandem's matrix, and torchvision's v2."""
    pixels = torch.rand(3, 224, 224)

    def own() -> None:
        matrix, offset = augment._colours(pixels.mean(dim=(1, 2)), [0.0, 0.7, 0.7, 0.7, 0.7, 0.9])
        torch.addmm(offset[:, None], matrix, pixels.flatten(1)).clamp_(0, 1)

    def theirs() -> None:
        made = v2.adjust_saturation(v2.adjust_contrast(v2.adjust_brightness(pixels, 1.2), 1.2), 1.2)
        v2.adjust_hue(made, 0.04)

    found = []
    for operation in (own, theirs):
        times = []
        for _ in range(30):
            began = time.process_time()
            operation()
            times.append(time.process_time() - began)
        found.append(1e3 * statistics.median(times))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, required=True, help="a Python that has open_clip_torch")
    parser.add_argument("--photos", type=Path, help="a folder of tars of pictures; else textures")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"open_clip": [], "plain": [], "augmented": [], "crop": []}
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_photos(Path(folder) / "corpus", options.samples, options.photos)
        for _ in range(options.rounds):
            times["open_clip"].append(open_clip(options.peer_python, corpus, options.samples, options.batch))
            times["plain"].append(tandem(corpus, options.batch, "plain"))
            times["augmented"].append(tandem(corpus, options.batch, "augmented"))
            with patch.multiple(augment, NOISE=0.0, JITTER=0.0, GREY=0.0):
                times["crop"].append(tandem(corpus, options.batch, "augmented"))
    print(f"{options.samples} photos, {options.rounds} rounds; images a second of one core (median)")
    peer = statistics.median(times["open_clip"])
    print(f"open_clip, its training pipeline   {1 / peer:8.0f}")
    for view in ("plain", "augmented", "crop"):
        ratios = [theirs / ours for theirs, ours in zip(times["open_clip"], times[view], strict=True)]
        print(
            f"Tandem, the {view:9s} view        {1 / statistics.median(times[view]):8.0f}   "
            f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} … {max(ratios):.2f})"
        )
    own, theirs = jitter_ms()
    print(f"colour jitter of 224 x 224 px: {own:.2f} ms by one matrix, {theirs:.2f} ms by transforms.v2")


if __name__ == "__main__":
    main()
