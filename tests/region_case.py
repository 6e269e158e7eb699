"""What the tests of regions share: a store of a tiny corpus, a method that reads it, and its training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools.regions.store import Layout, PictureRegions, RegionStore
from data_tools.regions.writer import RegionWriter, commit, prepare
from data_tools.shards import ShardIndex
from learning import methods

FOLDER = str(Path(__file__).parent / "region_methods")
MODEL: dict[str, Any] = {"method": "bagged"}
REGIONS, WIDTH = 4, 6


def plug_in() -> None:
    """Make the method `bagged` known in this process. A test that does so takes it back: `plug_out`."""
    if FOLDER not in methods.__path__:
        methods.__path__.append(FOLDER)


def plug_out() -> None:
    methods.__path__.remove(FOLDER)


def positions(count: int = REGIONS) -> np.ndarray:
    """Boxes side by side over the whole picture."""
    edges = np.arange(count + 1) / count
    top, bottom = np.zeros(count), np.ones(count)
    return np.stack([edges[:-1], top, edges[1:], bottom, np.diff(edges)], axis=1).astype(np.float32)


def regions_of(key: str, count: int = REGIONS, width: int = WIDTH) -> PictureRegions:
    """What a sample's regions are in these tests: drawn by its key."""
    drawn = np.random.default_rng(list(key.encode()))
    features = drawn.standard_normal((count, width)).astype(np.float16)
    return PictureRegions(features, positions(count), drawn.integers(-1, 5, count).astype(np.int32))


def write_store(out: Path, corpus: Path, without: Sequence[str] = (), dtype: str = "float16") -> RegionStore:
    """The out/ of a regions stage on a corpus; `without`: keys of samples that have none."""
    index = ShardIndex.open(corpus)
    layout = Layout(len(index), REGIONS, WIDTH, dtype)
    prepare(out, layout)
    with RegionWriter(out, layout) as writer:
        for row, key in enumerate(index.keys):
            writer.write(row, None if key in without else regions_of(key))
        writer.sync()
    samples = pa.table({"key": index.keys, "picture": index.pictures})
    missing = [{"key": key, "name": key, "reason": "absent", "detail": ""} for key in without]
    commit(out, layout, samples, missing, 5, None, {"from": "test"})
    return RegionStore.open(out)
