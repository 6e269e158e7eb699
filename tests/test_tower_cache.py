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


def made(corpus: Path, tower: CountingTower | None, **config: object) -> Batches:
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
    corpus = write_corpus(tmp_path, {"train": 21})
    tower = CountingTower()
    cached, plain = made(corpus, tower), made(corpus, None, cache="memory")
    for step in range(6):  # three epochs
        batch, wanted = cached.load(step).batch, plain.load(step).batch
        assert batch.keys == wanted.keys
        assert set(batch.images) == {"image_a"}
        assert torch.equal(batch.images["image_a"], wanted.images["image_a"])
        expected = wanted.images["image"].mean(dim=(2, 3))[:, None, :]
        torch.testing.assert_close(batch.tokens["image"], expected)
    assert len(tower.calls) == len(set(tower.calls)) <= 21


def test_a_full_cache_asks_the_tower_again_and_gives_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"train": 21})
    kept, lost = made(corpus, CountingTower()), made(corpus, CountingTower())
    lost._cache_left = 0
    for step in (0, 2, 4):
        assert torch.equal(kept.load(step).batch.tokens["image"], lost.load(step).batch.tokens["image"])


def test_a_learning_tower_or_workers_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, {"train": 21})
    with pytest.raises(ValueError, match=r"data\.cache: tokens needs .* model\.vision\.trainable: false"):
        made(corpus, None)
    with pytest.raises(ValueError, match=r"data\.cache: tokens is kept by one process"):
        DataConfig(cache="tokens", workers=2)
