"""How the memory of writing, checking and repairing shards grows with the number of samples.

`python -m benchmarks.shard_memory [--samples 25000 50000 100000]` plans and writes corpora of that many
samples of about 2 kB, checks and repairs them, each step in a process of its own, and prints the most memory
that each step held above what the process holds after its imports.
"""

import argparse
import hashlib
import multiprocessing
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_tools.shards.check import check, find_shards
from data_tools.shards.plan import Layout, ShardPlan
from data_tools.shards.repair import repair
from data_tools.shards.writer import record_bytes

PICTURE_BYTES = 1200
SHARD_BYTES = 10_000_000
HEADER = b"\xff\xd8\xff"  # of a JPEG: these pictures are copied and hashed, never decoded


def write(folder: Path, samples: int) -> None:
    """Plan and write a corpus whose pictures are slices of one file, each at its own place."""
    source, scratch, out = (folder / name for name in ("source", "scratch", "corpus"))
    for directory in (source, scratch, out):
        directory.mkdir()
    block = HEADER + hashlib.shake_256(b"picture").digest(PICTURE_BYTES - len(HEADER))
    (source / "pictures").write_bytes(block)
    sha256 = hashlib.sha256(block).hexdigest()
    plan = ShardPlan(scratch, source, "Run it again.")
    for number in range(samples):
        key = hashlib.sha256(str(number).encode()).hexdigest()[:20]
        row = {"key": key, "sha256": sha256, "width": 128, "height": 128, "licence": "MIT", "labels": {}}
        record = row | {"split": "train", "title": f"title {number}", "queries": [{"text": "q" * 40}] * 8}
        place = {"called": key, "file": "pictures", "image_offset": 0, "image_bytes": PICTURE_BYTES}
        plan.add("train", row | place | {"json": record_bytes(record)})
    plan.write(Layout(out, ["train"], [], SHARD_BYTES), 1, lambda count: None, lambda: False)
    shutil.rmtree(scratch)


def check_it(folder: Path, samples: int) -> None:
    report = check(find_shards([folder / "corpus"]), 1)
    if report.kinds or report.sound != samples:
        raise RuntimeError(f"{report.sound} of {samples} samples sound: {report.kinds}")


def repair_it(folder: Path, samples: int) -> None:
    report = repair(find_shards([folder / "corpus"]), folder / "new", 1)
    if report.rescued != samples:
        raise RuntimeError(f"{report.rescued} of {samples} samples rescued")


def _measured(
    step: Callable[[Path, int], None], folder: Path, samples: int, told: "multiprocessing.Queue[int]"
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(folder, samples)
    told.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'samples':>9}{'write, MB':>12}{'check, MB':>12}{'repair, MB':>12}")
    for samples in args.samples:
        with tempfile.TemporaryDirectory() as name:
            grown = []
            for step in (write, check_it, repair_it):
                told = context.Queue()
                child = context.Process(target=_measured, args=(step, Path(name), samples, told))
                child.start()
                child.join()
                if child.exitcode:
                    raise SystemExit(f"{step.__name__} failed with {samples:,} samples")
                grown.append(told.get() / 1024)
        print(f"{samples:>9,}" + "".join(f"{mb:>12,.0f}" for mb in grown), flush=True)


if __name__ == "__main__":
    main()
