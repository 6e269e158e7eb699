"""Order, keyed randomness, skipping and caching of the training loader."""

import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import dataloader

from data_tools.shards import ShardIndex
from learning.methods.base import Views
from learning.tokenizer import Tokenizer, train_wordpiece
from learning.training import text_views
from learning.training.augment import ImageTransform
from learning.training.loader import (
    BadSamples,
    Batches,
    DataConfig,
    Failed,
    Loaded,
    steps_per_epoch,
)
from learning.training.prefetch import batches_from
from learning.training.randomness import (
    MixedShards,
    Permutation,
    keyed_generator,
    seed_step,
    stable_hash,
)
from tests.training_case import write_corpus

VIEWS = Views(
    {"image": "plain", "image_a": "augmented", "image_b": "augmented"},
    {"text": "plain", "text_a": "augmented"},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 21})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"thing number {n} a content of {n} in words query" for n in range(30)], 150)


def batches(
    corpus: Path, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1, **changed: Any
) -> Batches:
    config = DataConfig(**{"cache": "none"} | changed)
    transform = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    options = {"seed": 3, "contrastive_batch": 8, "max_length": 12, "rank": rank, "world_size": world_size}
    index = ShardIndex.open(corpus, "train")
    return Batches(index, tokenizer, transform, VIEWS, config, **options)


def loaded(source: Batches, step: int) -> Loaded:
    made = source[step]
    assert isinstance(made, Loaded), made
    return made


def assert_equal(a: Loaded, b: Loaded) -> None:
    assert a.batch.keys == b.batch.keys
    for name in a.batch.images:
        assert torch.equal(a.batch.images[name], b.batch.images[name])
    for name in a.batch.texts:
        assert torch.equal(a.batch.texts[name].ids, b.batch.texts[name].ids)


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_permutation_has_every_place_once(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(2, 10**12), place=st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_permutation_is_the_same_place_by_place(size: int, place: int) -> None:
    place %= size
    order = Permutation(size, 1, 2)
    alone = order(np.array([place]))[0]
    assert 0 <= alone < size
    assert order(np.array([0, place]))[1] == alone


def test_permutation_is_shuffled_and_differs_between_epochs_and_seeds() -> None:
    places = np.arange(2000)
    orders = [Permutation(2000, seed, epoch)(places) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert abs(np.corrcoef(places, order)[0, 1]) < 0.1
        assert (np.abs(np.diff(order)) == 1).sum() < 10
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 10


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    together=st.integers(1, 25),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_mixed_shards_have_every_sample_once_and_few_shards_at_a_time(
    sizes: list[int], together: int, seed: int
) -> None:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    mixed = MixedShards(np.array(sizes), together, seed, 4)
    order = mixed(np.arange(mixed.size))
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    place = seed % mixed.size
    assert mixed(np.array([place])) == order[place]
    runs = shard_of[order]
    start = 0
    while start < len(runs):  # group by group: its shards whole, before another group begins
        group, end = {int(runs[start])}, start
        while end < len(runs) and end - start < sum(sizes[shard] for shard in group):
            end += 1
            group |= set(runs[start:end].tolist())
        assert len(group) <= together
        start = end


def test_mixed_shards_are_shuffled_and_differ_between_epochs_and_seeds() -> None:
    sizes = np.full(100, 20)
    orders = [MixedShards(sizes, 5, seed, epoch)(np.arange(2000)) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert abs(np.corrcoef(np.arange(2000), order)[0, 1]) < 0.4  # of 20 groups, each in one place
        assert (np.abs(np.diff(order)) == 1).sum() < 80  # 38 expected, in groups of 100
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 30
    with pytest.raises(ValueError, match="shards mixed at a time: 0"):
        MixedShards(sizes, 0, 1, 1)


def test_keys_are_stable_between_processes() -> None:
    # literal values: they must not change from one version to the next, or a resume would change its data
    assert stable_hash(1, 23) != stable_hash(12, 3)
    assert stable_hash("a", 1) == 6962120981034877120
    assert torch.rand((), generator=keyed_generator(1, "k")) == torch.rand(
        (), generator=keyed_generator(1, "k")
    )


def test_a_step_draws_by_its_number_and_its_rank() -> None:
    def drawn(step: int, rank: int) -> tuple[float, float, float]:
        seed_step(5, step, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = drawn(1, 0)
    assert drawn(1, 0) == first
    others = [drawn(2, 0), drawn(1, 1)]
    assert all(a != b for other in others for a, b in zip(first, other, strict=True))


def test_every_sample_once_an_epoch_but_for_the_dropped_batch(corpus: Path, tokenizer: Tokenizer) -> None:
    source = batches(corpus, tokenizer)
    assert source.per_epoch == steps_per_epoch(21, 8) == 2
    orders = []
    for epoch in range(4):
        rows = [source.samples(epoch * 2 + step) for step in range(2)]
        assert {own for own, _ in rows} == {epoch}
        positions = np.concatenate([own for _, own in rows])
        assert len(set(positions.tolist())) == 16
        orders.append(positions.tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert len(set().union(*orders)) == 21  # what one epoch drops, another has


@given(world_size=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_number_of_ranks_reads_the_same_global_batches(
    corpus: Path, tokenizer: Tokenizer, world_size: int, step: int
) -> None:
    whole = loaded(batches(corpus, tokenizer), step).batch
    parts = [loaded(batches(corpus, tokenizer, r, world_size), step).batch for r in range(world_size)]
    assert [key for part in parts for key in part.keys] == whole.keys
    for name, image in whole.images.items():
        assert torch.equal(torch.cat([part.images[name] for part in parts]), image)
    for name, texts in whole.texts.items():
        rows = [
            row[mask.bool()]
            for p in parts
            for row, mask in zip(p.texts[name].ids, p.texts[name].mask, strict=True)
        ]
        for row, ids, mask in zip(rows, texts.ids, texts.mask, strict=True):
            assert torch.equal(row, ids[mask.bool()])


def test_mix_shards_reads_few_shards_at_a_time(corpus: Path, tokenizer: Tokenizer) -> None:
    source = batches(corpus, tokenizer, mix_shards=1)
    assert len(source.index.shards) == 3
    epochs = [[source.samples(epoch * 2 + step)[1] for step in range(2)] for epoch in range(2)]
    for rows in epochs:
        positions = np.concatenate(rows)
        assert len(set(positions.tolist())) == 16
        assert (np.diff(source.index.shard_of[positions]) != 0).sum() == len(
            set(source.index.shard_of[positions].tolist())
        ) - 1  # a shard that was left does not come back
    assert [row.tolist() for row in epochs[0]] != [row.tolist() for row in epochs[1]]
    parts = [loaded(batches(corpus, tokenizer, rank, 2, mix_shards=1), 0).batch for rank in range(2)]
    assert [key for part in parts for key in part.keys] == loaded(source, 0).batch.keys


def test_choices_hang_on_seed_epoch_and_key_alone(corpus: Path, tokenizer: Tokenizer) -> None:
    source = batches(corpus, tokenizer)
    first = loaded(source, 0)
    torch.manual_seed(99)  # the process's own state plays no part
    random.seed(99)
    assert_equal(first, loaded(batches(corpus, tokenizer), 0))
    assert not torch.equal(first.batch.images["image_a"], first.batch.images["image_b"])
    key = first.batch.keys[0]
    later = next(  # the same sample in another epoch: the plain view is the same, the augmented one is not
        (made.batch, made.batch.keys.index(key))
        for made in (loaded(source, step) for step in range(2, 20))
        if key in made.batch.keys
    )
    assert torch.equal(first.batch.images["image"][0], later[0].images["image"][later[1]])
    assert not torch.equal(first.batch.images["image_a"][0], later[0].images["image_a"][later[1]])


def test_a_field_is_drawn_evenly_before_a_text_of_it(corpus: Path, tokenizer: Tokenizer) -> None:
    source = batches(corpus, tokenizer)
    key = source.index.keys[0]
    drawn = Counter(source._text(epoch, 0, key).split()[0] for epoch in range(900))
    # three queries weigh as much as the one title; "thing …" is the title, "a …" the content
    assert set(drawn) == {"thing", "a", "query"}
    assert all(240 < count < 360 for count in drawn.values()), drawn


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_prefetch_gives_the_same_from_any_start(corpus: Path, tokenizer: Tokenizer, cache: str) -> None:
    straight = list(batches_from(batches(corpus, tokenizer, cache=cache), 0, 6))
    resumed = list(batches_from(batches(corpus, tokenizer, cache=cache), 4, 6))
    assert len(straight) == 6
    for a, b in zip(straight[4:], resumed, strict=True):
        assert isinstance(a, Loaded) and isinstance(b, Loaded)
        assert_equal(a, b)


def test_a_full_cache_changes_nothing(corpus: Path, tokenizer: Tokenizer) -> None:
    roomy = batches(corpus, tokenizer, cache="memory")
    full = batches(corpus, tokenizer, cache="memory")
    full._cache_left = 4000  # three pictures of 20 × 24 px
    for step in range(4):
        assert_equal(loaded(roomy, step), loaded(full, step))
    assert len(full._pictures) < 5 < len(roomy._pictures)
    kept = next(iter(roomy._pictures.values()))
    assert kept.dtype == torch.uint8
    assert min(kept.shape[1:]) == 20  # 1.25 × 16, from 40


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3, 11])  # 8 rows a batch: parts of several sizes, some without any
def test_worker_processes_give_the_same(corpus: Path, tokenizer: Tokenizer, workers: int) -> None:
    for a, b in zip(
        batches_from(batches(corpus, tokenizer, workers=workers), 1, 6),
        batches_from(batches(corpus, tokenizer), 1, 6),
        strict=True,
    ):
        assert isinstance(a, Loaded) and isinstance(b, Loaded)
        assert_equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_batches_for_a_gpu_are_in_pinned_memory(corpus: Path, tokenizer: Tokenizer) -> None:
    (made,) = batches_from(batches(corpus, tokenizer), 0, 1)
    assert isinstance(made, Loaded)
    assert all(image.is_pinned() for image in made.batch.images.values())
    assert all(text.ids.is_pinned() and text.mask.is_pinned() for text in made.batch.texts.values())


@pytest.mark.slow
def test_every_worker_process_makes_rows_of_each_batch(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Batches._text

    def text_and_process(self: Batches, epoch: int, position: int, key: str) -> str:
        return made(self, epoch, position, key) + f" {os.getpid()}"

    monkeypatch.setattr(Batches, "_text", text_and_process)
    monkeypatch.setattr(
        Tokenizer, "encode_each", lambda self, texts, _: [torch.tensor([int(t.split()[-1])]) for t in texts]
    )
    monkeypatch.setattr(text_views, "augment_tokens", lambda ids, *_: ids)
    seen = []
    for loaded in batches_from(batches(corpus, tokenizer, workers=2), 0, 3):
        assert isinstance(loaded, Loaded)
        seen.append(loaded.batch.texts["text"].ids[:, 0].tolist())
    first, second = seen[0][0], seen[0][-1]
    assert os.getpid() not in (first, second) and first != second
    assert seen == [[first] * 4 + [second] * 4] * 3


@pytest.mark.slow
def test_a_worker_process_that_dies_is_told_as_a_value(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, made = os.getpid(), Batches._text

    def text_or_death(self: Batches, epoch: int, position: int, key: str) -> str:
        if epoch == 3 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(self, epoch, position, key)

    monkeypatch.setattr(Batches, "_text", text_or_death)
    told = list(batches_from(batches(corpus, tokenizer, workers=2), 0, 8))
    assert len(told) == 8 and isinstance(told[0], Loaded)
    failed = [each for each in told if isinstance(each, Failed)]
    assert isinstance(told[6], Failed)  # or one before it: what the process had ready went with it
    assert told[-len(failed) :] == failed
    assert "a process of data.workers ended" in failed[0].message


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")]
)
def test_a_worker_process_that_dies_while_it_hands_over_is_told_too(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its tensors' memory is asked for by a socket that ends with it."""

    def gone(self: object) -> object:
        raise error

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_get_data", gone)
    told = list(batches_from(batches(corpus, tokenizer, workers=2), 0, 3))
    assert len(told) == 3
    for each in told:
        assert isinstance(each, Failed) and "step 0: a process of data.workers ended" in each.message


def test_a_bad_picture_is_replaced_and_no_other_row_changes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = write_corpus(tmp_path / "good", {"train": 21})
    bad = write_corpus(
        tmp_path / "bad", {"train": 21}, {4: b"<html>gone</html>", 9: b"\x89PNG\r\n\x1a\nshort"}
    )
    seen: set[str] = set()
    for step in range(10):
        expected = loaded(batches(good, tokenizer), step)
        whole = loaded(batches(bad, tokenizer), step)
        parts = [loaded(batches(bad, tokenizer, r, 2), step) for r in range(2)]
        assert [key for part in parts for key in part.batch.keys] == whole.batch.keys
        for row, key in enumerate(expected.batch.keys):
            if key in ("train0004", "train0009"):
                assert whole.batch.keys[row] not in ("train0004", "train0009")
            else:
                assert whole.batch.keys[row] == key
                assert torch.equal(whole.batch.images["image_a"][row], expected.batch.images["image_a"][row])
        seen |= set(whole.skipped)
    assert seen == {"train0004", "train0009"}


def test_too_many_bad_samples_are_named_with_their_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_corpus(tmp_path, {"train": 21}, dict.fromkeys(range(21), b"no picture"))
    made = batches(corpus, tokenizer)[0]
    assert isinstance(made, Failed)
    assert "train/train-00000.tar" in made.message
    assert "in a row" in made.message
    bad = BadSamples(limit=1, why={"k1": "shard 1: k1"})
    assert bad.too_many() is None
    assert bad.new({"k1": "again", "k2": "shard 2: k2"}) == {"k2": "shard 2: k2"}
    bad.why["k2"] = "shard 2: k2"
    message = bad.too_many()
    assert message is not None
    assert "2 bad samples" in message and "shard 2: k2" in message and "max_bad_share" in message


def test_a_shard_that_vanishes_or_shrinks_stops_with_its_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_corpus(tmp_path, {"train": 21})
    source = batches(corpus, tokenizer)
    shard = corpus / "train/train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    told = [source[step] for step in range(4)]
    failed = [made for made in told if isinstance(made, Failed)]
    assert failed
    assert "train-00000.tar" in failed[0].message
    shard.unlink()
    made = batches_after_unlink(source)
    assert "train-00000.tar" in made.message


def batches_after_unlink(source: Batches) -> Failed:
    source.index.close()
    failed = [made for made in (source[step] for step in range(4)) if isinstance(made, Failed)]
    return failed[0]


def test_wrong_sizes_are_refused(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="contrastive_batch: 8 does not divide by 3 ranks"):
        batches(corpus, tokenizer, 0, 3)
    with pytest.raises(ValueError, match="the split has 5 samples"):
        steps_per_epoch(5, 8)
    with pytest.raises(ValueError, match=r"data.workers: 0"):
        DataConfig(cache="memory", workers=2)
