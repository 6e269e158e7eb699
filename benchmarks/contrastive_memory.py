"""Memory and time of the contrastive loss of one rank, forward and backward: plain against blockwise.

python -m benchmarks.contrastive_memory                        (512 queries, 4,096 to 32,768 keys, 512 wide)
python -m benchmarks.contrastive_memory --keys 4096 --rounds 3

Memory: each size and each way in a process of its own, whose peak resident size (the kernel's count) is taken
less its size when the features are there and less the bytes of their gradients. That sees every buffer,
torch's or not, and what the allocator wastes. A small run before it loads the libraries.
Time: both ways in one process, turn by turn after a warm-up; the median of the pairs' ratios.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from learning.losses.blockwise import info_nce_rows_blockwise
from learning.losses.contrastive import Rows, info_nce_rows
from learning.training.contrast import ContrastConfig

Loss = Callable[[Tensor, Tensor, Tensor], Rows]
WARM_UP_KEYS = 2048


def ways(block: int) -> dict[str, Loss]:
    return {
        "local": info_nce_rows,
        "blockwise": lambda q, k, tau: info_nce_rows_blockwise(q, k, tau, block=block),
    }


def features(queries: int, keys: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of unit length, and a temperature, that all want a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows in (queries, keys):
        drawn = torch.randn(rows, dimension, generator=generator)
        made.append(drawn.div_(drawn.norm(dim=1, keepdim=True)).requires_grad_())
    return made[0], made[1], torch.tensor(0.07, requires_grad=True)


def run(loss: Loss, leaves: tuple[Tensor, Tensor, Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves).losses_b.mean().backward()


def peak_resident_bytes() -> int:
    """Of this program. getrusage would count what the process was before exec: a copy of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak_bytes(way: str, queries: int, keys: int, dimension: int, block: int) -> int:
    """Above the features and their gradients, in this process."""
    loss = ways(block)[way]
    run(loss, features(queries, WARM_UP_KEYS, dimension))
    leaves = features(queries, keys, dimension)
    before = psutil.Process().memory_info().rss
    run(loss, leaves)
    peak = peak_resident_bytes()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return peak - before - gradients


def peak_bytes_apart(way: str, options: argparse.Namespace, keys: int) -> int:
    """`peak_bytes` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.contrastive_memory", "--peak-of", way, "--keys", str(keys)]
    for name in ("queries", "dimension", "block"):
        command += [f"--{name}", str(getattr(options, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_ratios(options: argparse.Namespace, keys: int) -> tuple[list[float], list[float]]:
    """Seconds of the plain way, and blockwise's share of them, a pair of runs at a time."""
    both = ways(options.block)
    leaves = features(options.queries, keys, options.dimension)
    seconds: dict[str, list[float]] = {way: [] for way in both}
    for turn in range(options.rounds + 1):
        for way in sorted(both, reverse=bool(turn % 2)):
            begun = time.perf_counter()
            run(both[way], leaves)
            if turn:
                seconds[way].append(time.perf_counter() - begun)
    pairs = zip(seconds["blockwise"], seconds["local"], strict=True)
    return seconds["local"], [streamed / plain for streamed, plain in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=512, help="rows of this rank")
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="of all")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--block", type=int, default=ContrastConfig().block)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timed runs")
    parser.add_argument("--peak-of", choices=list(ways(1)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        sizes = options.queries, options.keys[0], options.dimension, options.block
        print(peak_bytes(options.peak_of, *sizes))
        return
    print(
        f"{options.queries} queries, {options.dimension} dimensions, fp32, blocks of {options.block} keys, "
        "one thread"
    )
    print("   keys   local MiB   blockwise MiB   1/…   local s   blockwise/local (quartiles)")
    for keys in options.keys:
        plain, streamed = (peak_bytes_apart(way, options, keys) / 2**20 for way in ways(1))
        seconds, ratios = time_ratios(options, keys)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{keys:7,} {plain:11.1f} {streamed:15.1f} {plain / streamed:5.1f} "
            f"{statistics.median(seconds):9.2f}   {middle:.2f} ({low:.2f}-{high:.2f})"
        )


if __name__ == "__main__":
    main()
