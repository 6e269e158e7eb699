"""The benchmark stage on corpora of two sizes: pairs, memory, time.

    python -m benchmarks.log_benchmarks [--pictures 20000 80000] [--directory DIR]

A corpus has records as long as Zero's (a title, a content of 40 characters, five queries) and no real
pictures: each stands in for one by 2 kB that begin like a JPEG. Each set is made of the whole corpus, in a
process of its own with DuckDB held to 150 MB. Printed: the pairs by split and label, a check of every
negative against all texts of its picture, the peak memory (and what it was with the index open), and the
processor time as a ratio to that of the smaller corpus.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.benchmark.texts import SETS, near, own_texts
from data_tools.shards import ShardIndex, ShardWriter
from data_tools.text_forms import same_form
from stages.benchmark import Config, run
from tests.data_helpers import make_job

FIRST, LAST = 0x4E00, 0x9FA5  # the Han characters that texts are drawn from


def words(draw: random.Random, length: int) -> str:
    return "".join(chr(draw.randint(FIRST, LAST)) for _ in range(length))


def write_corpus(directory: Path, pictures: int) -> None:
    writer = ShardWriter(directory / "out", 100_000_000, ["benchmark"], [])
    for number in range(pictures):
        draw = random.Random(number)
        image = b"\xff\xd8\xff" + draw.randbytes(2000)
        queries = [
            {"text": words(draw, 6), "lang": "zh", "show": 100, "click": 20, "ctr": 0.2} for _ in range(5)
        ]
        record = {
            "key": hashlib.sha256(str(number).encode()).hexdigest()[:20],
            "title": words(draw, 8),
            "content": words(draw, 40),
            "queries": queries,
            "captions": [],
            "lang": "zh",
            "show": 500,
            "click": 100,
            "ctr": 0.2,
            "url": f"http://pictures.example/{number}.jpg",
            "sha256": hashlib.sha256(image).hexdigest(),
            "width": 300,
            "height": 200,
            "labels": {},
            "licence": "none",
            "split": "benchmark",
        }
        writer.write(image, "jpg", record)
    writer.close()


def one(corpus: Path, name: str, directory: Path) -> None:
    """In a process of its own: make a set, print its counts and the peak memory before and in it, in MB."""
    index = ShardIndex.open(corpus / "out")
    before = peak_mb()
    start = time.process_time()
    config = Config.model_validate(
        {"set": name, "sets": [name], "split": "benchmark", "memory_limit": "150MB"}
    )
    report = run(config, make_job(directory, corpus=corpus))
    took = time.process_time() - start
    index.close()
    said = {"counts": report.counts, "before_mb": before, "peak_mb": peak_mb(), "seconds": took}
    print(json.dumps(said))


def peak_mb() -> float:
    """Of this process since it began; ru_maxrss would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def true_negatives(corpus: Path, directory: Path) -> tuple[int, int]:
    """Of all negatives: how many, and how many say what a text of their picture says."""
    index = ShardIndex.open(corpus / "out")
    place = {key: number for number, key in enumerate(index.keys)}
    pairs = pq.read_table(directory / "out" / "pairs.parquet").to_pylist()
    negatives = [pair for pair in pairs if pair["label"] == 0]
    wrong = sum(
        any(near(same_form(pair["text"]), own) for own in own_texts(index.record(place[pair["key"]])))
        for pair in negatives
    )
    return len(negatives), wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--directory", type=Path, help="for the corpora; default: a temporary one")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        corpus, name, directory = arguments.one
        one(Path(corpus), name, Path(directory))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        compare(Path(folder), arguments.pictures)


def compare(folder: Path, sizes: list[int]) -> None:
    first: dict[str, float] = {}
    print("pictures  set    pairs  train val test (of each label)  true negatives  peak MB (at start)  time")
    for size in sizes:
        corpus = folder / str(size)
        write_corpus(corpus, size)
        for name in SETS:
            made = folder / f"{name}-{size}"
            command = [
                sys.executable,
                "-m",
                "benchmarks.log_benchmarks",
                "--one",
                str(corpus),
                name,
                str(made),
            ]
            found: dict[str, Any] = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            counts = Counter(found["counts"])
            splits = " ".join(str(counts[f"{split}_positive"]) for split in ("train", "val", "test"))
            negatives, wrong = true_negatives(corpus, made)
            ratio = found["seconds"] / first.setdefault(name, found["seconds"])
            print(
                f"{size:8}  {name}  {counts['pairs']:7}  {splits:30}  {wrong} of {negatives:<9}  "
                f"{found['peak_mb']:.0f} ({found['before_mb']:.0f})  {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
