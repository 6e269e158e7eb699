"""Batches of regions and of sets of labels: what is in them, and what is told when it cannot be."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.regions import store as store_format
from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.methods import base
from learning.methods.base import LabelSet, Views
from learning.tokenizer import Tokenizer, train_wordpiece
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig, Failed
from learning.training.prefetch import batches_from
from learning.training.split_regions import SplitRegions
from tests.region_case import regions_of, write_store
from tests.training_case import write_corpus

SETS = {
    "topic": LabelSet(("classes", "colours"), ("red", "green", "blue")),
    "vendor": LabelSet(("vendor",), ("a", "b")),
}
VIEWS = Views({}, {"text": "plain"}, label_sets=SETS, regions=True)


def labels(number: int) -> dict[str, str]:
    return {"colours": ["red|blue", "green", "mauve", ""][number % 4], "vendor": "ab"[number % 2]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of its training split are no pictures: whoever decodes one notices."""
    bad = {number: b"not a picture %d" % number for number in range(21)}
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 21, "test": 5}, bad, labels)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"thing number {n} a content of {n} in words query" for n in range(30)], 150)


def made(
    corpus: Path, tokenizer: Tokenizer, store: Path | None, views: Views = VIEWS, rank: int = 0, **config: Any
) -> Batches:
    index = ShardIndex.open(corpus, "train")
    regions = None if store is None else SplitRegions(RegionStore.open(store), index)
    ranks = config.pop("world_size", 1)
    return Batches(
        index,
        tokenizer,
        ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        views,
        DataConfig(**config),
        seed=3,
        contrastive_batch=8,
        max_length=12,
        rank=rank,
        world_size=ranks,
        regions=regions,
    )


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("regions")
    write_store(out, corpus)
    return out


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_batch_has_the_regions_and_labels_of_its_samples(
    corpus: Path, store: Path, tokenizer: Tokenizer, cache: str
) -> None:
    batches = made(corpus, tokenizer, store, cache=cache)
    for step in range(4):
        batch = batches.load(step).batch
        regions = batch.regions
        assert regions is not None and not batch.images
        assert regions.features.dtype == regions.positions.dtype == torch.float32
        assert regions.classes.dtype == torch.int64
        for row, key in enumerate(batch.keys):
            wanted = regions_of(key)
            assert np.array_equal(regions.features[row].numpy(), wanted.features)
            assert np.array_equal(regions.positions[row].numpy(), wanted.positions)
            assert np.array_equal(regions.classes[row].numpy(), wanted.classes)
            number = int(key.removeprefix("train"))
            topic = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]][number % 4]
            assert batch.label_sets["topic"][row].tolist() == topic
            assert batch.label_sets["vendor"][row].tolist() == [[1, 0], [0, 1]][number % 2]


def test_ranks_workers_and_parts_have_the_same_rows(corpus: Path, store: Path, tokenizer: Tokenizer) -> None:
    plain = made(corpus, tokenizer, store)
    halves = [made(corpus, tokenizer, store, rank=rank, world_size=2) for rank in range(2)]
    by_workers = list(batches_from(made(corpus, tokenizer, store, workers=2), 1, 3))
    for place, step in enumerate((1, 2)):
        wanted, found = plain.load(step).batch, by_workers[place]
        assert not isinstance(found, Failed)
        joined = [half.load(step).batch for half in halves]
        for name in ("features", "positions", "classes"):
            rows = getattr(wanted.regions, name)
            assert torch.equal(getattr(found.batch.regions, name), rows)
            assert torch.equal(torch.cat([getattr(half.regions, name) for half in joined]), rows)
        assert torch.equal(found.batch.label_sets["topic"], wanted.label_sets["topic"])
        part = wanted.rows(slice(2, 5))
        assert part.regions is not None and wanted.regions is not None
        assert torch.equal(part.regions.features, wanted.regions.features[2:5])
        assert torch.equal(part.label_sets["topic"], wanted.label_sets["topic"][2:5])


def test_it_crosses_to_a_process_that_starts_anew(corpus: Path, store: Path, tokenizer: Tokenizer) -> None:
    batches = made(corpus, tokenizer, store)
    wanted = batches.load(0).batch  # files are open now
    again = pickle.loads(pickle.dumps(batches)).load(0).batch
    assert again.keys == wanted.keys and torch.equal(again.regions.features, wanted.regions.features)


def test_a_sample_without_regions_is_a_bad_sample(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_store(tmp_path, corpus, without=["train0003"])
    with pytest.raises(ValueError, match=r"inputs.regions: .* no regions of 1 of 21 samples \(0 may"):
        made(corpus, tokenizer, tmp_path)
    batches = made(corpus, tokenizer, tmp_path, max_bad_share=0.05)
    full = made(corpus, tokenizer, write_store(tmp_path / "full", corpus).directory)
    met = 0
    for step in range(6):
        loaded, wanted = batches.load(step), full.load(step).batch
        for row, key in enumerate(wanted.keys):
            if key == "train0003":
                met += 1
                assert "no regions of it" in loaded.skipped[key] and loaded.batch.keys[row] != key
            else:
                assert loaded.batch.keys[row] == key
    assert met


def test_a_damaged_row_is_named(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_store(tmp_path, corpus)
    data = bytearray((tmp_path / "features.npy").read_bytes())
    data[-5] ^= 1  # of the last row, train0020
    (tmp_path / "features.npy").write_bytes(data)
    batches = made(corpus, tokenizer, tmp_path, max_bad_share=0.1)
    skipped = {key: why for step in range(4) for key, why in batches.load(step).skipped.items()}
    assert list(skipped) == [batches.index.keys[-1]]
    assert "checksum is not the one in sums.npy" in skipped[batches.index.keys[-1]]


def test_what_does_not_go_together_is_refused(
    corpus: Path, store: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"inputs\.regions: missing"):
        made(corpus, tokenizer, None)
    unknown = Views({}, {"text": "plain"}, label_sets={"topic": LabelSet(("hue",), ("red",))})
    with pytest.raises(ValueError, match=r"field 'hue'.*there are: colours, vendor"):
        made(corpus, tokenizer, None, unknown)
    other = write_corpus(tmp_path / "other", {"train": 21}, {4: b"another picture"}, labels)
    with pytest.raises(ValueError, match="sample train0000: the regions are of another picture"):
        made(other, tokenizer, store)
    nothing = Views({}, {"text": "plain"}, label_sets={"topic": LabelSet(("classes",), ("red",))})
    made(corpus, tokenizer, None, nothing)
    assert "label set 'topic': none of the first 21 samples has one of its 1 names" in caplog.text


def test_an_unknown_class_has_one_number_on_disk_and_in_a_batch() -> None:
    assert store_format.NO_CLASS == base.NO_CLASS


def test_no_regions_are_read_by_a_method_that_asks_for_none(
    corpus: Path, store: Path, tokenizer: Tokenizer
) -> None:
    batch = made(corpus, tokenizer, store, Views({}, {"text": "plain"})).load(0).batch
    assert batch.regions is None and batch.label_sets == {}
