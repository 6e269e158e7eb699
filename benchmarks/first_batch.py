"""Time to the first batch at the beginning and at 90 % of an epoch of a million samples.

python -m benchmarks.first_batch [--samples 1000000]

The index has a million rows; ten small shards stand for all, as each of their samples has many rows. Beside
it webdataset, which reads and throws away what came before: measured for a shorter way, as its time grows
with it.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from benchmarks.photos import captions, write_photos
from data_tools.shards import ShardIndex
from data_tools.shards.files import DirectoryFiles
from learning.methods.base import Views
from learning.tokenizer import Tokenizer, train_wordpiece
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig, Loaded
from learning.training.prefetch import batches_from

HALF = (0.5, 0.5, 0.5)


def long_index(corpus: Path, samples: int) -> ShardIndex:
    """The corpus's rows again and again; shard by shard, as an index stands."""
    table = pq.read_table(corpus / "index.parquet")
    repeated = pa.concat_tables([table] * -(-samples // table.num_rows)).slice(0, samples)
    return ShardIndex(DirectoryFiles(corpus), repeated.sort_by([("shard", "ascending")]))


def first_batch_s(index: ShardIndex, tokenizer: Tokenizer, batch: int, place: float) -> tuple[float, float]:
    """Wall and CPU seconds from an open index to the batch at `place` of the first epoch."""
    began, cpu = time.perf_counter(), time.process_time()
    batches = Batches(
        index,
        tokenizer,
        ImageTransform(32, HALF, HALF),
        Views({"image": "plain"}, {"text": "plain"}),
        DataConfig(texts=("title",)),
        seed=1,
        contrastive_batch=batch,
        max_length=32,
        rank=0,
        world_size=1,
    )
    start = int(place * batches.per_epoch)
    made = next(batches_from(batches, start, start + 1))
    assert isinstance(made, Loaded) and len(made.batch.keys) == batch
    return time.perf_counter() - began, time.process_time() - cpu


def webdataset_s(corpus: Path, skipped: int, batch: int) -> float:
    """Seconds to the first batch after `skipped` samples, nothing decoded on the way."""
    tars = [str(path) for path in sorted(corpus.rglob("*.tar"))] * (skipped // 1000 + 1)  # 2,000 samples each
    began = time.perf_counter()
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    taken = list(itertools.islice(samples, skipped, skipped + batch))
    assert len(taken) == batch
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skipped", type=int, default=20_000, help="samples that webdataset skips")
    options = parser.parse_args()
    tokenizer = train_wordpiece(captions(), 400)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_photos(Path(folder) / "corpus", 2000, None, short_side=48, shards=10)
        began = time.perf_counter()
        index = long_index(corpus, options.samples)
        print(f"{len(index):,} rows; opening the index {time.perf_counter() - began:.1f} s, at any place")
        first_batch_s(index, tokenizer, options.batch, 0.5)  # warm
        times: dict[float, list[tuple[float, float]]] = {0.0: [], 0.9: []}
        for _ in range(options.rounds):
            for place, found in times.items():
                found.append(first_batch_s(index, tokenizer, options.batch, place))
        for column, what in enumerate(("seconds", "CPU seconds")):
            first, late = (statistics.median(row[column] for row in found) for found in times.values())
            print(f"Tandem: first batch at 0 % {first:.3f}, at 90 % {late:.3f} {what}: {late / first:.2f} x")
        near, far = (webdataset_s(corpus, skipped, options.batch) for skipped in (0, options.skipped))
        whole = near + (far - near) * 0.9 * options.samples / options.skipped
        print(f"webdataset: first batch {near:.3f} s, after {options.skipped:,} samples {far:.2f} s;")
        print(
            f"        after 90 % of {options.samples:,}, at that speed, {whole:.0f} s: {whole / near:.0f} x"
        )


if __name__ == "__main__":
    main()
