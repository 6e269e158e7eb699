"""Masked views, labels, ids and the draw of a batch: the same whoever reads it, told where they cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.shards import ShardIndex
from learning.methods.base import Batch, MaskedPatches, MaskedTokens, Views
from learning.tokenizer import Tokenizer, train_wordpiece
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig, Failed, Loaded
from learning.training.prefetch import batches_from
from learning.training.randomness import stable_hash
from learning.training.tower_tokens import TowerTokens
from tests.training_case import write_corpus

VIEWS = Views(
    {"image": "plain", "image_m": MaskedPatches(0.25, 4), "image_r": "randaugment"},
    {"text": "plain", "text_m": MaskedTokens(0.5), "text_n": MaskedTokens(0.5)},
    labels=("match", "score"),
)


def labels(number: int) -> dict[str, str]:
    concept = "" if number == 20 else f"c{number // 3}"
    return {"concept": concept, "match": str(number % 2), "score": str(-number), "name": f"n{number}"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 21}, labels=labels)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([f"thing number {n} a content of {n} in words query" for n in range(30)], 150)


def batches(
    corpus: Path,
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    views: Views = VIEWS,
    tower: TowerTokens | None = None,
    **config: Any,
) -> Batches:
    transform = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    options = {"seed": 3, "contrastive_batch": 8, "max_length": 12, "rank": rank, "world_size": world_size}
    index = ShardIndex.open(corpus, "train")
    return Batches(index, tokenizer, transform, views, DataConfig(**config), tower=tower, **options)


def batch_of(source: Batches, step: int) -> Batch:
    made = source[step]
    assert isinstance(made, Loaded), made
    assert made.skipped == {}
    return made.batch


def number(key: str) -> int:
    return int(key.removeprefix("train"))


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Each row with all that it has, its texts without padding."""
    found = []
    for row, key in enumerate(batch.keys):
        texts = [text.ids[row][text.mask[row].bool()].tolist() for text in batch.texts.values()]
        pictures = [image[row].tolist() for image in (*batch.images.values(), *batch.tokens.values())]
        assert batch.ids is not None
        numbers = [int(values[row]) for values in batch.labels.values()]
        found.append((key, texts, pictures, int(batch.ids[row]), numbers))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_masks_labels_ids_and_draw(
    corpus: Path, tokenizer: Tokenizer, world_size: int
) -> None:
    whole = [batch_of(batches(corpus, tokenizer, positives="concept"), step) for step in range(5)]
    ranks = [batches(corpus, tokenizer, rank, world_size, positives="concept") for rank in range(world_size)]
    for step, wanted in enumerate(whole):
        parts = [batch_of(rank, step) for rank in ranks]
        assert [row for part in parts for row in rows_of(part)] == rows_of(wanted)
        assert {part.draw for part in parts} == {wanted.draw} == {stable_hash(3, "draw", step)}
    assert len({batch.draw for batch in whole}) == 5


@pytest.mark.slow
def test_worker_processes_and_a_resume_give_the_same(corpus: Path, tokenizer: Tokenizer) -> None:
    straight = list(batches_from(batches(corpus, tokenizer, positives="concept"), 0, 5))
    for workers in (0, 3, 9):
        resumed = batches_from(batches(corpus, tokenizer, positives="concept", workers=workers), 2, 5)
        for a, b in zip(straight[2:], resumed, strict=True):
            assert isinstance(a, Loaded) and isinstance(b, Loaded)
            assert rows_of(a.batch) == rows_of(b.batch)
            assert a.batch.draw == b.batch.draw


def test_masked_texts_are_as_long_as_the_plain_ones_and_specials_stay(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    source = batches(corpus, tokenizer)
    views_differ = 0
    for step in range(6):
        batch = batch_of(source, step)
        plain, special = batch.texts["text"], torch.tensor(tokenizer.special_ids)
        for name in ("text_m", "text_n"):
            masked = batch.texts[name]
            assert torch.equal(masked.mask, plain.mask)
            changed = masked.ids != plain.ids
            assert (masked.ids[changed] == tokenizer.mask_id).all()
            assert not torch.isin(plain.ids[changed], special).any()
            ordinary = torch.isin(plain.ids, special, invert=True).sum(dim=1)
            wanted = [max(1, round(0.5 * count)) for count in ordinary.tolist()]
            assert changed.sum(dim=1).tolist() == wanted
        views_differ += int((batch.texts["text_m"].ids != batch.texts["text_n"].ids).any())
    assert views_differ == 6  # each view draws for itself


def test_masks_are_drawn_anew_each_epoch(corpus: Path, tokenizer: Tokenizer) -> None:
    source = batches(corpus, tokenizer)
    seen: dict[str, set[str]] = {}
    for step in range(8):
        batch = batch_of(source, step)
        for key, image in zip(batch.keys, batch.images["image_m"], strict=True):
            seen.setdefault(key, set()).add(str((image == 0).all(dim=0).tolist()))
    assert sum(len(masks) for masks in seen.values()) > 2 * len(seen)


def test_a_masked_picture_is_the_plain_one_with_gaps(corpus: Path, tokenizer: Tokenizer) -> None:
    batch = batch_of(batches(corpus, tokenizer), 0)
    plain, masked = batch.images["image"], batch.images["image_m"]
    gone = masked != plain
    assert (masked[gone] == 0).all()
    touched = gone.any(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).any(dim=3).flatten(1).sum(dim=1)
    assert touched.tolist() == [4] * 8  # a quarter of 16 patches
    assert not torch.equal(batch.images["image_r"], plain)


def test_tokens_on_disk_stand_for_the_plain_view_alone(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tower = TowerTokens(lambda pixels: pixels.mean(dim=(2, 3))[:, None, :], 21, (1, 3), tmp_path, "tower")
    cached = batches(corpus, tokenizer, cache="tokens", tower=tower)
    assert tower.fill(cached.plain_pixels)
    made, plain = batch_of(cached, 1), batch_of(batches(corpus, tokenizer, cache="memory"), 1)
    assert set(made.images) == {"image_m", "image_r"} and set(made.tokens) == {"image"}
    for name, image in made.images.items():
        assert torch.equal(image, plain.images[name])
    assert torch.equal(made.tokens["image"], plain.images["image"].mean(dim=(2, 3))[:, None, :])


def test_labels_are_the_samples_whole_numbers(corpus: Path, tokenizer: Tokenizer) -> None:
    batch = batch_of(batches(corpus, tokenizer), 0)
    numbers = [number(key) for key in batch.keys]
    assert batch.labels["match"].dtype == batch.labels["score"].dtype == torch.int64
    assert batch.labels["match"].tolist() == [n % 2 for n in numbers]
    assert batch.labels["score"].tolist() == [-n for n in numbers]


def test_ids_are_the_samples_own_or_those_of_a_label(corpus: Path, tokenizer: Tokenizer) -> None:
    own: set[int] = set()
    shared: dict[str, set[int]] = {}
    for step in range(8):
        batch = batch_of(batches(corpus, tokenizer), step)
        assert batch.ids is not None and batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == [stable_hash(key) for key in batch.keys]
        own |= set(batch.ids.tolist())
        batch = batch_of(batches(corpus, tokenizer, positives="concept"), step)
        assert batch.ids is not None
        for key, id_ in zip(batch.keys, batch.ids.tolist(), strict=True):
            shared.setdefault(labels(number(key))["concept"], set()).add(id_)
    assert len(own) == 21
    assert all(len(ids) == 1 for ids in shared.values())  # "": sample 20, which has no concept, its own alone
    assert len(set().union(*shared.values())) == 8
    assert shared[""] == {stable_hash("train0020")}


def test_unknown_labels_are_told_at_once(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data.positives: .*no label 'conzept'; there are: concept, match"):
        batches(corpus, tokenizer, positives="conzept")
    unknown = Views({"image": "plain"}, {"text": "plain"}, labels=("mach",))
    with pytest.raises(
        ValueError, match=r"model.method reads a label: .*no label 'mach'; there are: concept"
    ):
        batches(corpus, tokenizer, views=unknown)
    with pytest.raises(ValueError, match=r"patch_px: 5 does not divide model.vision.image_px: 16"):
        batches(corpus, tokenizer, views=Views({"image": MaskedPatches(0.5, 5)}, {"text": "plain"}))


@pytest.mark.parametrize("wrong", ["", "yes", "1.0", "1_0", " 1", "１", "1" * 19])
def test_a_label_that_is_no_whole_number_is_a_bad_sample(
    tmp_path: Path, tokenizer: Tokenizer, wrong: str
) -> None:
    corpus = write_corpus(
        tmp_path, {"train": 21}, labels=lambda n: labels(n) | ({"match": wrong} if n == 4 else {})
    )
    source = batches(corpus, tokenizer, positives="concept")
    skipped: dict[str, str] = {}
    for step in range(8):
        made = source[step]
        assert isinstance(made, Loaded)
        skipped |= made.skipped
        assert "train0004" not in made.batch.keys
        numbers = [number(key) for key in made.batch.keys]  # a stand-in's are its own
        assert made.batch.labels["match"].tolist() == [n % 2 for n in numbers]
        assert made.batch.ids is not None
        wanted = [stable_hash("positives", labels(n)["concept"]) if n != 20 else None for n in numbers]
        assert all(want in (None, id_) for want, id_ in zip(wanted, made.batch.ids.tolist(), strict=True))
    assert set(skipped) == {"train0004"}
    told = skipped["train0004"]
    assert "train/train-00000.tar" in told and "label 'match'" in told and "run the shard stage again" in told
    assert ("is missing" if wrong == "" else f"is {wrong!r}, no whole number") in told


def test_a_corpus_without_one_usable_label_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_corpus(tmp_path, {"train": 21}, labels=lambda n: labels(n) | {"match": "?"})
    made = batches(corpus, tokenizer)[0]
    assert isinstance(made, Failed)
    assert "label 'match' is '?'" in made.message
