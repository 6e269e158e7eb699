"""ConLIP in one process: its losses against the reference, what a masked position sees, its refusals."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from learning import methods
from learning.methods.base import AttendsToCls, Batch, MaskedTokens, RanksPairs, Texts
from learning.methods.conlip import Config
from learning.training.estimate import estimate
from learning.training.footprint import footprint
from learning.training.masking import drawn_patches
from learning.training.randomness import stable_hash
from tests.conlip_case import (
    EQ_4,
    MODEL,
    PATCH,
    PROJECTED,
    PX,
    UNIT,
    VOCABULARY,
    Plain,
    batch,
    build,
    momentum,
    wear,
)

CNN = {"name": "test_resnet", "image_px": 64}


def own_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize(
    ("losses", "changed"),
    [
        (EQ_4, {}),
        (EQ_4, {"conditioned": False}),
        (("info_nce", "mlm"), PROJECTED),
        (("dcl", "mim"), {"head_layers": 2, "head_shared": True, "image_mask_share": 0.3}),
        (("dcl",), {"positive": "online"}),
        (("info_nce",), {"positive": "online"}),
        (("mim",), {"head_layers": 2}),
        (("mlm",), {"text_mask_share": 0.6}),
    ],
    ids=str,
)
def test_every_loss_is_the_papers_value_and_gradient(
    losses: tuple[str, ...], changed: dict[str, Any]
) -> None:
    model = build(losses, **changed)
    if hasattr(model, "teacher"):
        wear(model)
    given = batch(model)
    kept = momentum(model)
    terms, told = model(given), Plain(model, given, kept).told()
    assert set(terms.losses) == set(losses)
    for name in losses:
        torch.testing.assert_close(terms.losses[name], told.losses[name], rtol=1e-9, atol=1e-11)
        ours, theirs = (own_gradients(model, found.losses[name]) for found in (terms, told))
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_one_sample_alone_has_no_instance_loss_and_one_with_another_has() -> None:
    """At the first step the queues hold the batch's own momentum features, and nothing of the own sample."""
    model = build(("dcl",))
    alone, two = (model(batch(model, count, ids=ids)) for count, ids in ((2, [5, 5]), (2, [5, 6])))
    assert float(alone.losses["dcl"].detach()) == 0
    assert float(two.losses["dcl"].detach()) != 0


@contextmanager
def blind(model: Any, side: str) -> Iterator[None]:
    """Inside, the [CLS] of the complete inputs of a side is lost: the other tokens are as they are."""

    def without_cls(tower: Any, inputs: tuple[Any, ...], tokens: Tensor) -> Tensor:
        clean = tokens.clone()
        if side == "image" and len(inputs) == 1:
            clean[:, 0] = 0
        if side == "text":  # the complete texts come first, the masked ones behind them
            clean[: len(tokens) // 2, 0] = 0
        return clean

    hook = (model.vision if side == "image" else model.text).register_forward_hook(without_cls)
    try:
        yield
    finally:
        hook.remove()


def predictions(model: Any, given: Batch) -> dict[str, Tensor]:
    """What the heads predict at the masked places."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.heads[name].register_forward_hook(lambda _m, _i, out, n=name: found.update({n: out}))
        for name in ("mlm", "mim")
    ]
    with torch.no_grad():
        model(given)
    for hook in hooks:
        hook.remove()
    return found


def with_other_pixels(given: Batch, masked: bool) -> Batch:
    """Other pixels in one masked patch of each image, or in one that is not masked."""
    side = PX // PATCH
    places = drawn_patches(
        stable_hash(given.draw, "patches"), len(given), side, UNIT // PATCH, 0.5, torch.device("cpu")
    )
    images = given.images["image"].clone()
    for row, own in enumerate(places.tolist()):
        place = own[1] if masked else next(p for p in range(side**2) if p not in own)
        top, left = PATCH * (place // side), PATCH * (place % side)
        images[row, :, top : top + PATCH, left : left + PATCH] += 1.0
    return replace(given, images={"image": images})


def with_other_words(given: Batch, masked: bool) -> Batch:
    """Another word at the masked places of each text, or at one that is not masked, in both views."""
    plain, hidden = given.texts["text"], given.texts["text_masked"]
    where = plain.ids != hidden.ids
    if not masked:
        where = torch.zeros_like(where)
        for row, length in enumerate(plain.mask.sum(1).tolist()):
            where[row, next(p for p in range(1, length) if plain.ids[row, p] == hidden.ids[row, p])] = True
    other = 5 + (plain.ids - 5 + 7) % (VOCABULARY - 5)
    texts = {
        "text": Texts(torch.where(where, other, plain.ids), plain.mask),
        "text_masked": hidden if masked else Texts(torch.where(where, other, hidden.ids), hidden.mask),
    }
    return replace(given, texts=texts)


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_what_is_masked_is_seen_through_the_clean_cls_alone(side: str, conditioned: bool) -> None:
    """Fig. 3, and Fig. 1c where it is not so. Equal means to the last bit."""
    model = build(EQ_4, conditioned=conditioned).eval()
    given = batch(model)
    own, other = ("mim", "mlm") if side == "image" else ("mlm", "mim")
    change = with_other_pixels if side == "image" else with_other_words
    before, after = predictions(model, given), predictions(model, change(given, masked=True))
    assert torch.equal(before[own], after[own])  # no loss sees what it is to predict
    assert not torch.equal(before[other], after[other])
    with blind(model, side):
        before, after = predictions(model, given), predictions(model, change(given, masked=True))
        assert torch.equal(before[other], after[other]) == conditioned
        shown = predictions(model, change(given, masked=False))
        assert not torch.equal(before[other], shown[other])  # what is not masked is seen by tokens
        assert not torch.equal(before[own], shown[own])


def test_the_clean_cls_gets_a_gradient_from_both_heads() -> None:
    """The aim of conditioning: the complete input is learned from by its [CLS]."""
    model = build(("mlm", "mim"))
    told: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], tokens: Tensor) -> None:
            if name == "text" or len(inputs) == 1:
                tokens.retain_grad()
                told[name] = tokens

        return hook

    model.vision.register_forward_hook(keep("image"))
    model.text.register_forward_hook(keep("text"))
    terms = model(batch(model))
    for loss, side in (("mlm", "image"), ("mim", "text")):
        told[side].grad = None
        terms.losses[loss].backward(retain_graph=True)
        gradient = told[side].grad
        assert gradient is not None
        clean = gradient[:4]
        assert (clean[:, 0].norm(dim=1) > 0).all()
        assert (clean[:, 1:] == 0).all()


def test_views_and_heads_are_those_that_the_losses_read() -> None:
    cases: list[tuple[tuple[str, ...], bool, bool, set[str]]] = [
        (("dcl",), True, False, set()),
        (("dcl", "mlm"), True, True, {"mlm", "mask_token"}),
        (("dcl", "mlm"), False, True, {"mlm"}),
        (("dcl", "mim"), True, True, {"mim", "mask_token"}),
        (("dcl", "mim"), False, False, {"mim", "mask_token"}),
        (EQ_4, True, True, {"mlm", "mim", "mask_token"}),
    ]
    for losses, conditioned, masks_texts, heads in cases:
        model = build(losses, conditioned=conditioned)
        assert model.views().images == {"image": "plain"}
        masked = {"text_masked": MaskedTokens(0.15)} if masks_texts else {}
        assert model.views().texts == {"text": "plain"} | masked
        assert (set(model.heads) if hasattr(model, "heads") else set()) == heads
        model(batch(model)).losses[losses[-1]].backward()
    assert not isinstance(model, RanksPairs)
    assert isinstance(model, AttendsToCls)


def test_every_parameter_learns_and_has_a_part() -> None:
    model = build(EQ_4)
    assert set(model.parts()) == {"vision", "text", "temperature", "heads"}
    terms = model(batch(model))
    torch.stack(list(terms.losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_layers_that_are_shared_are_one() -> None:
    counts = []
    for layers, shared in ((1, False), (2, True), (2, False), (3, False)):  # Table 4
        model = build(("mlm",), head_layers=layers, head_shared=shared)
        counts.append(sum(p.numel() for p in model.heads["mlm"].encoder.parameters()))
    assert counts[1] == counts[0]
    assert counts[2:] == [2 * counts[0], 3 * counts[0]]


def test_a_frozen_image_tower_runs_once_for_the_losses_that_need_no_more() -> None:
    frozen = {"vision": MODEL["vision"] | {"trainable": False}, "conditioned": False}
    model = build(("dcl", "mlm"), **frozen)
    assert not any(name.startswith("vision.") for name, _ in model.teacher.named_buffers())
    given = batch(model)
    cached = replace(given, images={}, tokens={"image": model.vision(given.images["image"])})
    for name, loss in model(given).losses.items():
        assert torch.equal(loss, model(cached).losses[name])
    kept = momentum(model)
    told = Plain(model, given, kept).told()
    for name, loss in model(given).losses.items():
        torch.testing.assert_close(loss, told.losses[name], rtol=1e-9, atol=1e-11)


def test_registers_are_no_patches() -> None:
    vision = MODEL["vision"] | {"name": "vit_small_patch14_reg4_dinov2"}
    model = build(EQ_4, vision=vision)
    assert model.vision.patch_grid() == (5, True, PX // PATCH, PATCH)
    tokens = model.vision(torch.randn(1, 3, PX, PX, dtype=torch.float64))
    kept = model.image_side(tokens)
    assert torch.equal(kept, torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1))
    model(batch(model)).losses["mim"].backward()


@pytest.mark.parametrize(
    ("losses", "changed", "message"),
    [
        (("dcl", "info_nce"), {}, "give one of the two"),
        (("dcl", "gcpr"), {}, "'gcpr' is not a loss of ConLIP; allowed: dcl, info_nce, mlm, mim"),
        (("dcl",), {"vision": CNN}, "test_resnet keeps no token for each of its patches; choose a ViT"),
        (
            ("dcl",),
            {"text": MODEL["text"] | {"width": 12}},
            "tower is 8 wide and the text tower 12; set model.dim",
        ),
        (("mlm",), {"head_heads": 3}, "head_heads: 3 does not divide 8"),
        (("mim",), {"image_mask_px": 6}, "image_mask_px: 6 must be a multiple of a patch's 4 px"),
        (("mlm",), {"image_mask_px": 12}, "12 must .* divide model.vision.image_px: 16"),
        (("mim",), {"vision": MODEL["vision"] | {"trainable": False}}, "losses: mim masks patches within"),
        (
            ("mlm",),
            {"vision": MODEL["vision"] | {"trainable": False}},
            "losses: mlm with model.conditioned: true masks patches",
        ),
        (
            ("dcl",),
            {"vision": MODEL["vision"] | {"name": "vit_medium_patch16_gap_256"}},
            r"its first token is no \[CLS\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(losses: tuple[str, ...], changed: dict[str, Any], message: str) -> None:
    config = methods.parse_config(MODEL | changed)
    with pytest.raises(ValueError, match=message):
        methods.build(config, losses, VOCABULARY)


def test_a_mask_that_no_loss_draws_need_not_fit() -> None:
    """336 px in fine-tuning: 32 px do not divide it."""
    build(("dcl",), image_mask_px=5)
    build(("dcl", "mlm"), image_mask_px=5, conditioned=False)


def test_the_defaults_are_the_papers() -> None:
    config: Any = methods.parse_config({name: MODEL[name] for name in ("method", "vision", "text")})
    assert isinstance(config, Config)
    assert (config.temperature.initial, config.temperature.learnable, config.momentum) == (0.05, False, 0.99)
    assert (config.queue, config.dropout, config.conditioned, config.dimension) == (12_288, 0.1, True, None)
    assert (config.text_mask_share, config.image_mask_share, config.image_mask_px) == (0.15, 0.5, 32)
    assert (config.head_layers, config.head_shared) == (1, False)


def test_plans_count_the_heads() -> None:
    heads = sum(p.numel() for p in build(EQ_4).heads.parameters())
    assert estimate(MODEL, EQ_4, 1, VOCABULARY).parts["heads"] == heads
    assert footprint(MODEL, EQ_4, 4, torch.float32, VOCABULARY).forward_flops > 0
