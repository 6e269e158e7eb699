"""Tandem's loop beside a bare PyTorch loop: the same model and ready batch, one process, blocks in turns.

python -m benchmarks.bare_loop [--tower resnet10t --batch 16 --steps 5 --blocks 8]
"""

import argparse
import copy
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.photos import write_photos
from benchmarks.small_towers import Clock, build, make_batches, now, since, train
from learning.training import distributed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", default="resnet10t", help="a timm model")
    parser.add_argument("--image-px", type=int, default=112)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--blocks", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_photos(Path(folder) / "corpus", 2 * options.batch, None, short_side=160, shards=2)
        method = build(options.tower, options.image_px)
        bare = copy.deepcopy(method).train()
        optimizer = torch.optim.AdamW(bare.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2)
        batches = make_batches(corpus, method, options.image_px, options.batch, ready=True)
        batch = batches.load(0).batch
        times: list[tuple[float, float]] = []

        def bare_block() -> None:
            start = now()
            for _ in range(options.steps):
                optimizer.zero_grad()
                bare(batch).losses["ccl"].backward()
                optimizer.step()
            times.append(since(start))

        clock = Clock(options.blocks + 1, bare_block)
        train(method, batches, clock, options.steps, Path(folder))
    distributed.shutdown()
    for what, place in (("wall", 0), ("CPU", 1)):
        tandem = [block[place] / options.steps for block in clock.blocks[1:]]  # the first is the warm-up
        plain = [block[place] / options.steps for block in times[1:]]
        ratios = [ours / theirs for ours, theirs in zip(tandem, plain, strict=True)]
        print(
            f"{what:4s} ms a step: Tandem {1e3 * statistics.median(tandem):.1f}, bare "
            f"{1e3 * statistics.median(plain):.1f}; {statistics.median(ratios):.3f} x "
            f"({min(ratios):.3f} … {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
