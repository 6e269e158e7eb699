"""A held-out split made by the shard stage from drawn pictures and texts, for the tests of benchmarks."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages import benchmark, shard
from stages.base import Report
from tests.data_helpers import make_job, picture
from tests.test_shards import crawled, pair

HAN = "山水火木金土日月星云雨雪风花草树鸟鱼马牛羊狗猫虎龙人口手足目耳心刀车门田石米竹衣食住行红黄蓝绿白黑大小"


def words(seed: object, count: int = 12) -> str:
    """A text that no other seed's is near to."""
    return "".join(random.Random(f"words {seed}").choices(HAN, k=count))


@cache
def drawn(number: int) -> bytes:
    return picture(24, 20, color=(number % 256, number // 256, 7), format="PNG")


def log_rows(count: int) -> list[dict[str, Any]]:
    """`count` pictures with three queries each. One in ten has a title alone."""
    rows = []
    for number in range(count):
        url = f"http://site.example/a/{number}"
        content = "" if number % 10 == 0 else words(f"content {number}")
        for query in range(3):
            text = words(f"query {number} {query}", 6)
            rows.append(pair(url, text, title=words(f"title {number}", 8), content=content))
    return rows


def write_source(directory: Path, count: int, **shard_config: Any) -> Path:
    """A shard stage whose split `benchmark` has all `count` pictures."""
    rows = log_rows(count)
    pictures = {row["url"]: drawn(number // 3) for number, row in enumerate(rows)}
    return write_shards(directory, pictures, rows, **shard_config)


def write_shards(
    directory: Path, pictures: dict[str, bytes], rows: list[dict[str, Any]], **shard_config: Any
) -> Path:
    crawl = crawled(directory / "crawl", pictures, rows)
    job = make_job(directory / "shard", pictures=crawl)
    config = {"splits": [{"name": "benchmark"}], **shard_config}
    shard.run(shard.Config.model_validate(config), job)
    return job.directory


def make(directory: Path, source: Path, **config: Any) -> Report:
    """Run the stage in `directory`."""
    values = {"split": "benchmark", "sets": [config["set"]], "pairs": 200} | config
    return benchmark.run(benchmark.Config.model_validate(values), make_job(directory, corpus=source))


def pairs_of(directory: Path) -> list[dict[str, Any]]:
    return pq.read_table(directory / "out" / "pairs.parquet").to_pylist()
