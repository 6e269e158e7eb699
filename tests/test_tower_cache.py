"""data.cache: tokens: a frozen image tower runs once a picture, and nothing that is learned changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_tools.shards import ShardIndex
from learning import methods
from learning.methods.base import Batch, Views
from learning.tokenizer import train_wordpiece
from learning.training.augment import ImageTransform
from learning.training.loader import Batches, DataConfig
from learning.training.tower_tokens import TowerTokens, identity
from tests import cookie_case
from tests.training_case import write_corpus


@pytest.mark.parametrize("losses", [("ccl",), ("ccl", "vcl", "tcl"), ("hinge",)])
def test_losses_and_gradients_are_those_of_the_plain_path(losses: tuple[str, ...]) -> None:
    model = cookie_case.build(losses, vision__trainable=False)
    batch = cookie_case.batch(model)
    tower = model.frozen_image_tower()
    assert tower is not None
    images = dict(batch.images)
    raw = images.pop("image")
    tokens = torch.cat([tower(one[None]) for one in raw])  # one picture at a time, as the loader does
    assert_same_step(model, batch, Batch(images, batch.texts, batch.keys, {"image": tokens}))


def test_clip_reads_tokens_too() -> None:
    values = {name: cookie_case.MODEL[name] for name in ("text", "dimension")}
    vision = cookie_case.MODEL["vision"] | {"trainable": False}
    config = methods.parse_config(values | {"method": "clip", "vision": vision})
    torch.manual_seed(1)
    model = methods.build(config, ("ccl", "hinge"), cookie_case.VOCABULARY).double().train()
    batch = cookie_case.batch(model)
    tower = model.frozen_image_tower()
    assert tower is not None
    tokens = tower(batch.images["image"])
    assert_same_step(model, batch, Batch({}, batch.texts, batch.keys, {"image": tokens}))


def assert_same_step(model: torch.nn.Module, plain: Batch, cached: Batch) -> None:
    def step(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        losses = model(batch).losses
        sum(losses.values()).backward()  # type: ignore[union-attr]
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (losses, gradients), (cached_losses, cached_gradients) = step(plain), step(cached)
    assert gradients
    torch.testing.assert_close(cached_losses, losses)
    torch.testing.assert_close(cached_gradients, gradients)


def test_a_tower_that_learns_has_no_tokens_to_keep() -> None:
    assert cookie_case.build(("ccl",)).frozen_image_tower() is None


class CountingTower:
    """Says how often each picture was asked for; its tokens are the pixels' mean, so they can be checked."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[0] == 1
        self.calls.append(float(pixels.double().sum()))
        return pixels.mean(dim=(2, 3))[:, None, :]

    def kept_in(self, directory: Path, rows: int = 21) -> TowerTokens:
        return TowerTokens(self, rows, (1, 3), directory, "tower")


def made(corpus: Path, tower: TowerTokens | None, **config: object) -> Batches:
    tokenizer = train_wordpiece([f"thing number {n} a content of {n} in words query" for n in range(30)], 150)
    return Batches(
        ShardIndex.open(corpus, "train"),
        tokenizer,
        ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Views({"image": "plain", "image_a": "augmented"}, {"text": "plain"}),
        DataConfig.model_validate({"cache": "tokens"} | config),
        seed=3,
        contrastive_batch=8,
        max_length=12,
        rank=0,
        world_size=1,
        tower=tower,
    )


def test_the_tower_runs_once_a_picture_and_augmented_views_stay_pixels(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 21})
    tower = CountingTower()
    tokens = tower.kept_in(tmp_path)
    cached, plain = made(corpus, tokens), made(corpus, None, cache="memory")
    advanced: list[int] = []
    assert tokens.fill(cached.plain_pixels, advance=advanced.append)
    assert len(tower.calls) == len(set(tower.calls)) == sum(advanced) == 21
    for step in range(6):  # three epochs
        batch, wanted = cached.load(step).batch, plain.load(step).batch
        assert batch.keys == wanted.keys
        assert set(batch.images) == {"image_a"}
        assert torch.equal(batch.images["image_a"], wanted.images["image_a"])
        assert torch.equal(batch.tokens["image"], wanted.images["image"].mean(dim=(2, 3))[:, None, :])
    assert len(tower.calls) == 21


def test_rows_not_on_disk_come_from_the_tower_and_are_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 21})
    kept, unfilled = (made(corpus, CountingTower().kept_in(tmp_path / name)) for name in ("a", "b"))
    assert kept.tower is not None
    kept.tower.fill(kept.plain_pixels)
    for step in (0, 2, 4):
        assert torch.equal(kept.load(step).batch.tokens["image"], unfilled.load(step).batch.tokens["image"])


def test_stopped_or_damaged_rows_are_computed_again_and_no_others(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 21})
    asked = iter([False] * 5 + [True])
    first = CountingTower()
    tokens = first.kept_in(tmp_path)
    assert not tokens.fill(made(corpus, tokens).plain_pixels, should_stop=lambda: next(asked))
    assert len(first.calls) == 5
    with tokens.path.open("r+b") as file:  # a power cut: the sum was on the disk before the row was
        file.seek(2 * 12)
        file.write(bytes(12))
    second = CountingTower()
    tokens = second.kept_in(tmp_path)
    assert tokens.fill(made(corpus, tokens).plain_pixels)
    assert len(second.calls) == 21 - 5 + 1
    assert first.calls[2] in second.calls


def test_a_later_stage_takes_an_earlier_ones_rows_over(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 21})
    first, second = CountingTower(), CountingTower()
    early = first.kept_in(tmp_path / "early")
    early.fill(made(corpus, early).plain_pixels)
    late = second.kept_in(tmp_path / "late")
    batches = made(corpus, late)
    assert late.fill(batches.plain_pixels, earlier=[tmp_path / "nothing", tmp_path / "early"])
    assert second.calls == []
    assert late.path.samefile(early.path)
    assert torch.equal(
        batches.load(0).batch.tokens["image"], made(corpus, early).load(0).batch.tokens["image"]
    )


def test_a_bad_picture_has_no_row_and_is_skipped_as_ever(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 21}, bad={4: b"<html>"})
    tokens = CountingTower().kept_in(tmp_path)
    batches = made(corpus, tokens, max_bad_share=0.5)
    assert tokens.fill(batches.plain_pixels)
    skipped = {key for step in range(6) for key in batches.load(step).skipped}
    assert skipped == {"train0004"}


def test_no_room_is_told_with_the_remedy(tmp_path: Path) -> None:
    tokens = TowerTokens(CountingTower(), 10**9, (10**4, 10**4), tmp_path, "tower")
    with pytest.raises(ValueError, match=r"MiB are free.*need.*data\.cache: memory"):
        tokens.fill(lambda row: None)


def test_the_identity_changes_with_weights_preparation_and_corpus(tmp_path: Path) -> None:
    tower = torch.nn.Linear(2, 2)
    names = [identity(tower, 128, "corpus"), identity(tower, 192, "corpus"), identity(tower, 128, "other")]
    with torch.no_grad():
        tower.weight[0, 0] += 1
    names.append(identity(tower, 128, "corpus"))
    assert len(set(names)) == 4


def test_a_learning_tower_or_workers_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"train": 21})
    with pytest.raises(ValueError, match=r"data\.cache: tokens needs .* model\.vision\.trainable: false"):
        made(corpus, None)
    with pytest.raises(ValueError, match=r"data\.cache: tokens is kept by one process"):
        DataConfig(cache="tokens", workers=2)
