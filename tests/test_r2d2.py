"""R2D2 as a whole: losses and gradients against the plain reference, Table 3's switches, leaks."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from learning import methods
from learning.methods.base import Batch, RanksPairs, Texts
from learning.training.footprint import footprint
from tests import r2d2_case, r2d2_reference, reference
from tests.r2d2_case import CNN, EQ_8, HEADS, MASK, MODEL, Plain, build, momentum, wear

FROZEN = {"vision": MODEL["vision"] | {"trainable": False}}
FROZEN_CNN = CNN | {
    "vision": CNN["vision"] | {"trainable": False},
    "image_mask": {"at": "tokens", "share": 0.3},
}
# Exact in float32, in which an engine's objective multiplies by them
WEIGHTS = {"gcpr": 0.875, "gcpr_tgd": 1.125, "fgr": 0.75, "mlm": 1.25, "fgd": 0.625, "match": 0.5}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "Eq. 8": (EQ_8, {}),
    "Eq. 8, frozen CNN, masked tokens": (EQ_8, FROZEN_CNN),
    "Eq. 8, frozen ViT": (EQ_8, FROZEN),
    "w/o ET": (EQ_8, {"enhanced_training": False}),
    "w/o TwD": (("gcpr", "fgr", "mlm"), {}),
    "w/o TgD": (("gcpr", "fgr", "mlm", "fgd"), {}),
    "w/o FgD": (("gcpr_tgd", "fgr", "mlm"), CNN),
    "R2D2-CLIP": (("gcpr",), {"cross_layers": 0}),
    "retrieval fine-tuning": (("gcpr", "fgr"), CNN),
    "matching fine-tuning": (("match",), {}),
    "mlm alone": (("mlm",), {}),
    "fgd alone": (("fgd",), {}),
}


def weighed(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


def gradients(model: Any, total: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_paper(case: str) -> None:
    """Every loss, and the gradient of every parameter, with momentum that has gone some way."""
    losses, changed = CASES[case]
    model = build(losses, **changed)
    if hasattr(model, "teacher"):
        wear(model)
    batch = r2d2_case.batch(model)
    terms = model(batch)
    told = Plain(model, batch, momentum(model)).told()
    assert list(told.losses) == list(losses)
    assert set(terms.losses) == set(losses)
    for name, loss in terms.losses.items():
        torch.testing.assert_close(
            loss, told.losses[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours, theirs = gradients(model, weighed(terms.losses)), gradients(model, weighed(told.losses))
    for name, parameter in model.named_parameters():
        one, other = ours[name], theirs[name]
        assert (one is not None) == parameter.requires_grad, name
        if one is not None:
            expected = torch.zeros_like(one) if other is None else other
            torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(4))
def test_hard_negatives_are_those_of_the_reference(seed: int) -> None:
    """Other batches, other draws: fgr alone says whether another pair was judged."""
    model = build(("fgr",), seed=seed)
    batch = r2d2_case.batch(
        model, 4, seed, ids=[[1, 2, 3, 4], [1, 1, 1, 2], [5, 5, 5, 5], [1, 2, 1, 2]][seed]
    )
    told = Plain(model, batch, momentum(model)).told()
    torch.testing.assert_close(model(batch).losses["fgr"], told.losses["fgr"], rtol=1e-9, atol=1e-11)
    if seed == 2:
        assert told.negatives == [-1] * 8
        model(batch).losses["fgr"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    else:
        assert all(batch.ids[i % 4] != batch.ids[j] for i, j in enumerate(told.negatives))  # type: ignore[index]


def test_without_ids_every_sample_is_its_own() -> None:
    model = build(("gcpr", "fgr"))
    batch = r2d2_case.batch(model)
    own = replace(batch, ids=torch.arange(4))
    assert_equal(model(replace(batch, ids=None)).losses, model(own).losses)
    assert not torch.allclose(model(batch).losses["gcpr"], model(own).losses["gcpr"])


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------- switches, parts


def recipes() -> list[tuple[str, ...]]:
    """All sets of losses that a recipe may name."""
    sets = []
    for number in range(1, len(methods.module("r2d2").METHOD.available_losses) + 1):
        sets += itertools.combinations(methods.module("r2d2").METHOD.available_losses, number)
    return [names for names in sets if not {"gcpr", "gcpr_tgd"} <= set(names)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "enhanced"), [({}, False), (FROZEN_CNN, True)], ids=["trained, w/o ET", "frozen"]
)
def test_every_trainable_parameter_gets_a_gradient_whatever_the_losses(
    changed: dict[str, Any], enhanced: bool
) -> None:
    """And what is frozen as unused is unused: ZeRO waits for each gradient; no weight may be forgotten."""
    assert len(recipes()) == 47
    for losses in recipes():
        model = build(losses, enhanced_training=enhanced, **changed)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable or not name.startswith(("vision.", "text.")))
        terms = model(r2d2_case.batch(model))
        assert set(terms.losses) == set(losses)
        assert all(loss.ndim == 0 and loss.isfinite() for loss in terms.losses.values())
        assert not any(value.requires_grad for value in terms.report.values())
        given = gradients(model, weighed(terms.losses))
        without = [name for name in trainable if given[name] is None]
        assert not without, (losses, without)
        forgotten = [n for n, g in given.items() if n not in trainable and g is not None and g.any()]
        assert not forgotten, (losses, forgotten)
        model.after_step()


def test_a_frozen_tower_has_no_gradient_and_no_teacher() -> None:
    model = build(**FROZEN)
    model(r2d2_case.batch(model)).losses["fgd"].backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert not hasattr(model.teacher, "vision")
    assert hasattr(build().teacher, "vision")
    text = build(text=MODEL["text"] | {"trainable": False})
    weighed(text(r2d2_case.batch(text)).losses).backward()
    assert all(p.grad is None for p in text.text.parameters())


def test_a_teacher_is_state_that_no_optimizer_sees() -> None:
    model = build()
    assert model.training_only
    kept = {name for name in model.state_dict() if name.startswith(model.training_only)}
    assert {name.split(".")[0] for name in kept} == {"teacher", "queues", "centres"}
    assert not any(name.startswith(model.training_only) for name, _ in model.named_parameters())
    assert not any(value.requires_grad for value in model.buffers())
    assert set(model.parts()) == {
        "vision",
        "text",
        "image_projection",
        "text_projection",
        "ranking",
        "mlm_head",
        "temperature",
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weighed(model(r2d2_case.batch(model)).losses).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.after_step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {n for n in kept if not n.startswith("teacher.")}  # the student has not moved yet
    again = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_step()  # of no step
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_only_distillation_reads_the_teacher() -> None:
    model, other = build(), build()
    wear(other)
    batch = r2d2_case.batch(model)
    one, two = model(batch).losses, other(batch).losses
    for name in EQ_8:
        assert torch.equal(one[name], two[name]) == (name in ("fgr", "mlm")), name


def test_enhanced_training_spares_a_forward() -> None:
    """ET: each pair once, the masked positives among them; without: those once more, for MLM (Sec. 3.2)."""
    pairs: dict[bool, list[int]] = {}
    for enhanced in (True, False):
        model = build(enhanced_training=enhanced)
        seen = pairs.setdefault(enhanced, [])
        model.ranking.text_image.register_forward_hook(lambda m, i, o, seen=seen: seen.append(len(o)))
        model(r2d2_case.batch(model))
    assert sorted(pairs[True]) == [4, 8]
    assert sorted(pairs[False]) == [4, 12]


def test_tokens_of_a_frozen_tower_serve_for_its_images() -> None:
    """data.cache: masked tokens then need no tower at all; masked pixels still do."""
    model = build(**FROZEN_CNN)
    batch = r2d2_case.batch(model)
    assert model.frozen_image_tower() is model.vision
    tokens = model.vision(batch.images["image"]).float()
    expected = model(batch).losses
    model.vision.forward = None
    assert_equal(model(replace(batch, images={}, tokens={"image": tokens.double()})).losses, expected, 1e-6)


# -------------------------------------------------------------------------------------------------- leaks


def seen_pairs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What the judge makes of the positive pairs, and what the MLM head reads and is asked for."""
    seen: dict[str, Tensor] = {}
    count = len(batch)

    def judged(module: Any, inputs: Any, told: Any) -> None:
        seen.update(by_image=told.by_image[:count], by_text=told.by_text[:count])

    def asked(module: Any, inputs: Any, logits: Tensor) -> None:
        seen.update(hidden=inputs[0])

    hooks = [model.ranking.register_forward_hook(judged), model.mlm_head.register_forward_hook(asked)]
    seen |= model(batch).losses
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("enhanced", [True, False])
def test_what_is_masked_is_not_seen(enhanced: bool) -> None:
    """Another token under the mask: only the targets, GCPR, and FGR where it reads the plain text, differ."""
    model = build(enhanced_training=enhanced)
    batch = r2d2_case.batch(model)
    plain, masked = batch.texts["text"], batch.texts["text_masked"]
    ids = torch.where(masked.ids == MASK, (plain.ids - 5 + 7) % (r2d2_case.VOCABULARY - 5) + 5, plain.ids)
    assert (ids != plain.ids).any(dim=1).all()
    other = replace(batch, texts={"text": Texts(ids, plain.mask), "text_masked": masked})
    one, two = seen_pairs(model, batch), seen_pairs(model, other)
    same = {name for name in one if torch.allclose(one[name], two[name], rtol=1e-12, atol=1e-12)}
    # fgr's value: GCPR's features decide which negatives are drawn, the same ones or others
    assert same - {"fgr"} == ({"hidden", "by_image", "by_text"} if enhanced else {"hidden"})
    model.losses = ("fgd",)
    assert not torch.equal(model(other).losses["fgd"], model(batch).losses["fgd"])  # the teacher sees it all


def test_padding_is_not_seen() -> None:
    model = build()
    wear(model)
    batch = r2d2_case.batch(model)
    longer = {
        name: Texts(torch.nn.functional.pad(t.ids, (0, 2), value=9), torch.nn.functional.pad(t.mask, (0, 2)))
        for name, t in batch.texts.items()
    }
    assert_equal(model(replace(batch, texts=longer)).losses, model(batch).losses, 1e-10)


# ---------------------------------------------------------------------------------------- using the model


@pytest.mark.parametrize("changed", [{}, CNN], ids=["vit", "cnn"])
def test_pairs_are_scored_and_attended_to_as_the_reference_does(changed: dict[str, Any]) -> None:
    model = build(("gcpr", "fgr"), **changed).eval()
    assert isinstance(model, RanksPairs)
    batch = r2d2_case.batch(model)
    plain, text = Plain(model, batch, momentum(model)), batch.texts["text"]
    image_tokens, text_tokens = model.image_tokens(batch.images["image"]), model.text_tokens(text)
    scores = model.score_pairs(image_tokens, text_tokens, text.mask)
    state = dict(model.named_parameters())
    for i, (image, words) in enumerate(zip(plain.clean.images, plain.clean.texts, strict=True)):
        logits = plain.judged(image, words)[:2]
        probabilities = [r2d2_reference.soft_max(list(each))[1] for each in logits]
        torch.testing.assert_close(scores[i], (probabilities[0] + probabilities[1]) / 2)
        x = torch.stack([reference.linear(row, state, "image_projection") for row in plain.with_cls(image)])
        y = torch.stack([reference.linear(row, state, "text_projection") for row in words])
        told = r2d2_reference.cross_encoder(y, x, state, "ranking.text_image", 2, HEADS)[1]
        for layer, expected in enumerate(told, start=1):
            found = model.attention(image_tokens, text_tokens, text.mask, layer)[i, :, : len(words)]
            torch.testing.assert_close(found, expected[:, :, 1:])
    units = model.embed_texts(text), model.embed_images(batch.images["image"])
    for found, features in zip(
        units,
        (
            [plain.text_feature(tokens) for tokens in plain.clean.texts],
            [plain.image_feature(tokens) for tokens in plain.clean.images],
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, torch.stack(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_gives_losses_in_fp32_and_keeps_momentum_wide(dtype: torch.dtype) -> None:
    model = build().float().to(dtype)
    wide = build()
    batch = r2d2_case.batch(model)
    images = {name: image.to(dtype) for name, image in batch.images.items()}
    for _ in range(3):
        terms, expected = model(replace(batch, images=images)), wide(batch)
        assert {loss.dtype for loss in terms.losses.values()} == {torch.float32}
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
        for name in ("gcpr_tgd", "mlm", "fgd"):  # fgr may have drawn another negative
            torch.testing.assert_close(
                terms.losses[name].double(), expected.losses[name], rtol=tolerance, atol=tolerance
            )
        weighed(terms.losses).backward()
        model.after_step()
        wide.after_step()
    kept = [v for n, v in model.state_dict().items() if n.startswith(model.training_only)]
    assert {value.dtype for value in kept} == {torch.float32, torch.int64}
    features = model.queues["text"].content().keys_md[:12]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(12))
    assert dtype == torch.float32 or not torch.equal(features, features.bfloat16().float())


@pytest.mark.parametrize(
    ("losses", "changed", "message"),
    [
        (("gcpr", "gcpr_tgd"), {}, "gcpr_tgd is gcpr with soft targets; give one of the two"),
        (("gcpr", "fgr"), {"cross_layers": 0}, "fgr needs cross encoders; set model.cross_layers above 0"),
        (("ccl",), {}, "'ccl' is not a loss of R2D2; allowed: gcpr, gcpr_tgd, fgr, mlm, fgd, match"),
        (EQ_8, {"image_mask": {"at": "tokens"}}, "tokens changes nothing where"),
        (EQ_8, {"match_weights": [0, 1]}, "match_weights: (0.0, 1.0); both must be above 0"),
        (EQ_8, {"teacher": {"alpha": 1.5}}, "alpha"),
        (EQ_8, {"cross_heads": 3}, "cross_heads: 3 does not divide"),
    ],
)
def test_mistakes_in_the_recipe_are_named(
    losses: tuple[str, ...], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, ValidationError)) as raised:
        build(losses, **changed)
    assert message in str(raised.value)


def test_the_defaults_are_the_papers() -> None:
    config: Any = methods.parse_config(
        {"method": "r2d2", "vision": {"name": "vit_large_patch14_clip_224"}, "text": {"name": "bert_base"}}
    )
    teacher = config.teacher
    assert (config.dimension, config.cross_layers, config.mask_share) == (768, 6, 0.15)
    assert (config.temperature.initial, config.temperature.learnable) == (0.07, True)
    assert (teacher.momentum, teacher.queue, teacher.queue_decay, teacher.alpha) == (0.995, 65_536, 0.99, 0.4)
    assert (teacher.student_temperature, teacher.teacher_temperature) == (0.1, 0.04)
    assert config.enhanced_training


def test_its_footprint_is_counted_without_computing() -> None:
    """No step of the method waits for a number: a plan counts it on tensors without content."""
    made = footprint(MODEL | FROZEN, EQ_8, 4, torch.bfloat16, r2d2_case.VOCABULARY)
    assert made.forward_flops > 0
    assert made.activation_bytes > 0
