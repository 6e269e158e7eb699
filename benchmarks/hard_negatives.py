"""Bytes that ranks exchange for hard negatives: the rows drawn, against gathering all token sequences.

python -m benchmarks.hard_negatives                            (64 ranks × 32 pairs; 30 s, 4 GB)
python -m benchmarks.hard_negatives --ranks 8

Real gloo processes draw negatives by random similarities of all ranks' pairs (unit features, temperature
0.07) and fetch the rows drawn (learning/training/exchange.py): frozen image tokens, text tokens with
gradient, masks; then they gather all rows (learning/training/distributed.py), as a method without the
exchange would. Rows and gradients of both ways must be the same. The bytes of every collective to and from
other ranks are counted; for all-gather and all-reduce what their best algorithms move: (W - 1)/W of the
result, and twice that. Token sequences are short and narrow here; the table multiplies their bytes up to the
paper's size: images of 257 × 1024, texts of 64 × 768, in bf16. The gather sums gradients in fp32.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learning.training.distributed import gather
from learning.training.exchange import Exchange
from learning.training.hard_negatives import draw_negatives, uniform_numbers

IMAGE, TEXT, MASK = (3, 8), (2, 8), (2,)  # of a row here
FEATURES, TEMPERATURE, TIMEOUT_S = 64, 0.07, 300
PAPER = {  # elements of a row at the paper's size, by those here; the places asked for stay as they are
    "places": 1.0,
    "image tokens": 257 * 1024 / math.prod(IMAGE),
    "text tokens": 64 * 768 / math.prod(TEXT),
    "text gradients": 64 * 768 / math.prod(TEXT),
    "text masks": 64 / math.prod(MASK),
}
Traffic = Counter[tuple[str, str, str]]  # bytes by way, content and direction


class Meter:
    """Counts the bytes of collectives under the way and the content that are set."""

    def __init__(self) -> None:
        self.traffic: Traffic = Counter()
        self.way = self.content = ""

    def add(self, sent: float, received: float) -> None:
        self.traffic[self.way, self.content, "sent"] += round(sent)
        self.traffic[self.way, self.content, "received"] += round(received)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """torch's collectives do what they do, and are counted."""
        names = ("all_to_all_single", "all_gather_into_tensor", "all_reduce")
        plain = {name: getattr(dist, name) for name in names}
        here, ranks = dist.get_rank(), dist.get_world_size()

        def all_to_all(output: Tensor, given: Tensor, arriving: Any = None, leaving: Any = None) -> None:
            moved = []
            for tensor, split in ((given, leaving), (output, arriving)):
                own = len(tensor) // ranks if split is None else split[here]
                moved.append((len(tensor) - own) * math.prod(tensor.shape[1:]) * tensor.element_size())
            self.add(*moved)
            plain["all_to_all_single"](output, given, arriving, leaving)

        def all_gather(output: Tensor, given: Tensor) -> None:
            self.add((ranks - 1) * given.nbytes, output.nbytes - given.nbytes)
            plain["all_gather_into_tensor"](output, given)

        def all_reduce(tensor: Tensor) -> None:
            moved = 2 * (ranks - 1) / ranks * tensor.nbytes
            self.add(moved, moved)
            plain["all_reduce"](tensor)

        for name, counting in zip(names, (all_to_all, all_gather, all_reduce), strict=True):
            setattr(dist, name, counting)
        try:
            yield
        finally:
            for name in names:
                setattr(dist, name, plain[name])


def draws(rows: int) -> tuple[Tensor, Tensor]:
    """Of this rank's images the texts, of its texts the images: places in the global batch."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, ranks * rows, FEATURES, generator=generator)
    image, text = torch.nn.functional.normalize(drawn, dim=2)
    own = slice(here * rows, (here + 1) * rows)
    uniform = uniform_numbers(2, ranks * rows, 2, image.device)[:, own]
    ids = torch.arange(ranks * rows)
    same = ids[own, None] == ids
    texts, images = (
        draw_negatives(queries[own] @ keys.T / TEMPERATURE, same, numbers)
        for queries, keys, numbers in ((image, text, uniform[0]), (text, image, uniform[1]))
    )
    return texts, images


def measure(rows: int) -> Traffic:
    """What this rank moves by both ways."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(100 + here)
    image = torch.randn(rows, *IMAGE, generator=generator).bfloat16()
    text = torch.randn(rows, *TEXT, generator=generator).bfloat16()
    mask = torch.randint(0, 2, (rows, *MASK), generator=generator)
    weight = torch.randint(-4, 5, (rows, *TEXT), generator=generator).bfloat16()  # sums exact in any order
    wanted_texts, wanted_images = draws(rows)
    rows_by_rank = [rows] * ranks
    meter, found = Meter(), []
    with meter.watching():
        for meter.way in ("drawn", "all"):
            leaf = text.clone().requires_grad_()
            asked = {}
            if meter.way == "drawn":
                meter.content = "places"
                of_images, of_texts = (Exchange(w, rows_by_rank) for w in (wanted_images, wanted_texts))
            for meter.content, tensor in (
                ("image tokens", image),
                ("text tokens", leaf),
                ("text masks", mask),
            ):
                images = meter.content == "image tokens"
                if meter.way == "drawn":
                    asked[meter.content] = (of_images if images else of_texts).fetch(tensor)
                else:
                    asked[meter.content] = gather(tensor)[wanted_images if images else wanted_texts]
            meter.content = "text gradients"
            (asked["text tokens"] * weight).sum().backward()
            found.append([*asked.values(), leaf.grad])
    for drawn, every in zip(*found, strict=True):
        assert torch.equal(drawn, every), "the two ways differ"
    return meter.traffic


def run_rank(rank: int, ranks: int, rows: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        results.put(dict(measure(rows)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure_all(ranks: int, rows: int) -> list[Traffic]:
    """Of every rank. The processes are forks of this one: torch is imported once."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_rank, args=(rank, ranks, rows, folder, results), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found = [Counter(results.get(timeout=TIMEOUT_S)) for _ in processes]
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=64, help="processes")
    parser.add_argument("--rows", type=int, default=32, help="pairs of a rank")
    options = parser.parse_args()
    found = measure_all(options.ranks, options.rows)
    print(f"{options.ranks} ranks × {options.rows} pairs: rows and gradients of both ways are the same")
    print("received by a rank           bytes here (mean)             MB at the paper's size (mean)")
    print(f"{'':16} {'drawn':>12} {'all':>14} {'drawn':>16} {'all':>12}   ratio")
    sums = dict.fromkeys(("drawn", "all"), 0.0)
    for content, factor in PAPER.items():
        mean = {
            way: statistics.fmean(traffic[way, content, "received"] for traffic in found)
            for way in ("drawn", "all")
        }
        scaled = {way: factor * mean[way] / 1e6 for way in mean}
        ratio = f"{scaled['drawn'] / scaled['all']:8.4f}" if scaled["all"] else ""
        print(
            f"{content:16} {mean['drawn']:12,.0f} {mean['all']:14,.0f} {scaled['drawn']:16,.2f} "
            f"{scaled['all']:12,.2f} {ratio}"
        )
        for way in mean:
            sums[way] += scaled[way]
    print(
        f"{'sum':16} {'':27} {sums['drawn']:16,.2f} {sums['all']:12,.2f} {sums['drawn'] / sums['all']:8.4f}"
        f"  = 1 : {sums['all'] / sums['drawn']:.1f}"
    )
    for direction in ("sent", "received"):
        most = max(
            sum(factor * traffic["drawn", content, direction] for content, factor in PAPER.items()) / 1e6
            for traffic in found
        )
        print(f"most {direction} by one rank: {most:,.2f} MB, {most / sums['all']:.4f} of gathering all")


if __name__ == "__main__":
    main()
