"""Semantic Sharing as a whole: losses and gradients against the reference, Table 1's switches, leaks."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from learning import methods
from learning.encoders.positions import grid_boxes, sinusoids
from learning.encoders.segments import grid_side
from learning.methods.base import NO_CLASS, EmbedsRegions, LabelSet, Regions, Texts
from learning.training.footprint import footprint
from tests import r2d2_case, semantic_case, semantic_reference
from tests.semantic_case import ALL, BERT, EQ_6, GRID, MODEL, NAMES, REGIONS, Plain, build

WEIGHTS = {"labels": 0.875, "words": 1.125, "objects": 0.75, "consistency": 1.25, "triplet": 0.625}
VIT: dict[str, Any] = {"vision": {"name": "test_vit", "image_px": 64}}
GLOBAL: dict[str, Any] = {"segments": "global", "encoder": "fc"}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "Eq. 6": (EQ_6, {}),
    "all losses": (ALL, {}),
    "ST": (("labels",), {"sharing": "separate"}),
    "ST, all losses": (ALL, {"sharing": "separate"}),
    "IMC": (("consistency",), {}),
    "w/o R": (("labels",), GLOBAL),
    "w/o R + Con, grid": (("labels", "triplet"), GLOBAL | GRID),
    "w/o T": (EQ_6, {"encoder": "fc"}),
    "w/o C": (("labels",), {}),
    "w/o L": (("words", "objects"), {}),
    "Ours+Con": ((*EQ_6, "triplet"), {}),
    "grid of a CNN, BERT": (("labels", "words"), GRID | {"text": BERT}),
    "grid of a ViT": (("labels", "words", "consistency"), VIT),
    "literal Eq. 4": (("labels",), {"label_loss": "literal"}),
    "words alone": (("words",), {"sharing": "separate"}),
    "objects alone": (("objects",), {"sharing": "separate"}),
}


def weighed(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


def gradients(model: Any, total: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(ours: Tensor | None, theirs: Tensor | None, at: str, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-10, msg=lambda text: f"{at}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_paper(case: str) -> None:
    """Every loss, and the gradient of every parameter; a frozen one is one that no loss reaches."""
    losses, changed = CASES[case]
    model = build(losses, **changed)
    batch = semantic_case.batch(model)
    terms, told = model(batch), Plain(model, batch).losses()
    assert set(terms.losses) == set(losses)
    assert not any(value.requires_grad for value in terms.report.values())
    for name, loss in terms.losses.items():
        close(loss, told[name], name, 1e-9)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = gradients(model, weighed(terms.losses)), gradients(model, weighed(told))
    for name in ours:
        assert (ours[name] is not None) == (name in trained), name
        if name in trained:
            close(ours[name], theirs[name], name, 1e-6)


def test_no_set_of_losses_leaves_a_parameter_without_a_gradient_or_freezes_one_in_use() -> None:
    """ZeRO waits for each gradient; no weight may be forgotten."""
    sets = [names for n in range(1, 6) for names in itertools.combinations(ALL, n)]
    for losses, sharing in itertools.product(sets, ("shared", "separate")):
        model = build(losses, sharing=sharing)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(True)
        given = gradients(model, weighed(model(semantic_case.batch(model)).losses))
        reached = {name for name, gradient in given.items() if gradient is not None}
        assert reached == trainable, (losses, sharing, reached ^ trainable)


# -------------------------------------------------------------------------------------------------- Table 1


def shapes(part: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(p.shape) for p in part.parameters())


def test_one_encoder_and_one_classifier_serve_both_sides_or_each_side_has_its_own() -> None:
    shared, separate = build(), build(sharing="separate")
    assert list(shared.encoder) == list(shared.classifier) == ["both"]
    assert list(separate.encoder) == list(separate.classifier) == ["image", "text"]
    for side in ("image", "text"):
        assert shapes(separate.encoder[side]) == shapes(shared.encoder["both"])
        assert shapes(separate.classifier[side]) == shapes(shared.classifier["both"])
    for model, reaches in ((shared, True), (separate, False)):
        batch = semantic_case.batch(model)
        features = batch.regions.features.clone().requires_grad_()  # type: ignore[union-attr]
        z = model.encoded("image", features, batch.regions.positions)[0]  # type: ignore[union-attr]
        model.of(model.classifier, "image")(z).sum().backward()
        text_side = model.of(model.encoder, "text")
        assert all((p.grad is not None) == reaches for p in text_side.parameters())


def test_without_the_transformer_no_segment_sees_another() -> None:
    for encoder, alone in (("transformer", False), ("fc", True)):
        model = build(encoder=encoder)
        regions = semantic_case.batch(model).regions
        assert regions is not None
        before = model.encoded("image", regions.features, regions.positions)[1]
        regions.features[:, 0] += 1
        after = model.encoded("image", regions.features, regions.positions)[1]
        assert not torch.allclose(after[:, 0], before[:, 0])
        assert torch.allclose(after[:, 1:], before[:, 1:]) == alone


def test_a_global_embedding_knows_no_order_and_no_place() -> None:
    model = build(("labels",), **GLOBAL)
    assert not any("position_fc" in name for name, _ in model.named_parameters())
    regions = semantic_case.batch(model).regions
    assert regions is not None
    turned = regions.each(lambda x: x.flip(1))
    other = replace(turned, positions=turned.positions + 1)
    torch.testing.assert_close(model.embed_regions(regions), model.embed_regions(other))
    whole = build(("labels",))
    assert not torch.allclose(whole.embed_regions(turned), whole.embed_regions(other))


# ------------------------------------------------------------------------------------------------ positions


def test_cells_of_a_grid_are_boxes_and_a_cls_is_none() -> None:
    assert [grid_side(tokens) for tokens in (1, 4, 5, 36, 197, 2)] == [
        (1, 0),
        (2, 0),
        (2, 1),
        (6, 0),
        (14, 1),
        (1, 1),
    ]
    with pytest.raises(ValueError, match="its 12 tokens are no square grid, with or without a"):
        grid_side(12)
    expected = [
        semantic_reference.box(x, y, x + 20, y + 30, 60, 90) for y in (0, 30, 60) for x in (0, 20, 40)
    ]
    torch.testing.assert_close(grid_boxes(3), torch.stack(expected))
    for size in (4, 7):
        expected = [semantic_reference.place(t, size) for t in range(5)]
        torch.testing.assert_close(sinusoids(5, size), torch.stack(expected))


# ---------------------------------------------------------------------------------------------------- leaks


def test_what_is_masked_is_not_seen() -> None:
    """Other contents under the masks change what is asked, and the labels' pass, not what the heads read."""
    model = build()
    batch = semantic_case.batch(model)
    captured = read_by_heads(model, batch)
    plain, masked = batch.texts["text"], batch.texts["text_masked"]
    ids = torch.where(masked.ids == semantic_case.MASK, (plain.ids - 5 + 7) % 25 + 5, plain.ids)
    assert (ids != plain.ids).any(dim=1).all()
    regions = batch.regions
    assert regions is not None
    features, classes = regions.features.clone(), regions.classes.clone()
    hidden = Plain(model, batch).hidden()
    assert [len(own) for own in hidden] != [0] * len(hidden)
    for row, places in enumerate(hidden):
        features[row, places] += 5
        classes[row, places] = (classes[row, places] + 1) % semantic_case.CLASSES
    other = replace(
        batch,
        texts={"text": Texts(ids, plain.mask), "text_masked": masked},
        regions=Regions(features, regions.positions, classes),
    )
    for name, read in read_by_heads(model, other).items():
        close(read, captured[name], name, 1e-12)
    one, two = model(batch).losses, model(other).losses
    assert not any(torch.equal(one[name], two[name]) for name in EQ_6)
    moved = replace(batch, regions=Regions(regions.features + 5, regions.positions, regions.classes))
    assert not torch.allclose(read_by_heads(model, moved)["objects"], captured["objects"])


def read_by_heads(model: Any, batch: Any) -> dict[str, Tensor]:
    """What the heads of Eq. 5 read at the masked places."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found.update({name: inputs[0]})

    hooks = [
        head.register_forward_hook(keep(name))
        for name, head in (("words", model.word_head), ("objects", model.object_head))
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    asked = torch.tensor([[k < len(own) for k in range(2)] for own in Plain(model, batch).hidden()])
    found["objects"] = found["objects"][asked]
    return found


def test_a_region_without_a_class_is_never_asked_for() -> None:
    model = build(("objects",))
    for seed in range(5):
        batch = semantic_case.batch(model, seed=seed)
        regions = batch.regions
        assert regions is not None
        assert not any(
            int(regions.classes[row, place]) == NO_CLASS
            for row, places in enumerate(Plain(model, batch).hidden())
            for place in places
        )
        close(model(batch).losses["objects"], Plain(model, batch).losses()["objects"], "objects", 1e-9)
    none = replace(regions, classes=torch.full_like(regions.classes, NO_CLASS))
    loss = model(replace(batch, regions=none)).losses["objects"]
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_padding_is_not_seen() -> None:
    for text in (semantic_case.GRU, BERT):
        model = build(text=text)
        batch = semantic_case.batch(model)
        longer = {
            name: Texts(
                torch.nn.functional.pad(t.ids, (0, 1), value=9), torch.nn.functional.pad(t.mask, (0, 1))
            )
            for name, t in batch.texts.items()
        }
        one, two = model(batch).losses, model(replace(batch, texts=longer)).losses
        for name, loss in one.items():
            close(two[name], loss, name, 1e-10)


def test_masks_of_regions_hang_on_the_draw_alone() -> None:
    model = build(("objects",))
    batch = semantic_case.batch(model)
    assert torch.equal(model(batch).losses["objects"], model(batch).losses["objects"])
    others = [model(replace(batch, draw=draw)).losses["objects"].detach() for draw in range(4)]
    assert len({float(loss) for loss in others}) == 4


# ---------------------------------------------------------------------------------------- using the model


@pytest.mark.parametrize("retrieval", ["embeddings", "predictions"])
@pytest.mark.parametrize("vision", [{}, GRID, VIT], ids=["regions", "CNN", "ViT"])
def test_embeddings_are_the_references(vision: dict[str, Any], retrieval: str) -> None:
    model = build(("labels",), retrieval=retrieval, sharing="separate", **vision).eval()
    assert isinstance(model, EmbedsRegions)
    batch = semantic_case.batch(model)
    plain = Plain(model, batch)
    images = (
        model.embed_images(batch.images["image"])
        if batch.regions is None
        else model.embed_regions(batch.regions)
    )
    texts = model.embed_texts(batch.texts["text"])
    for i in range(len(batch.keys)):
        close(images[i], plain.embedding("image", plain.image(i)), f"image {i}", 1e-9)
        close(texts[i], plain.embedding("text", plain.text(i, "text")), f"text {i}", 1e-9)
    assert images.shape[1] == (len(NAMES) if retrieval == "predictions" else 8)


def test_views_are_what_the_losses_read() -> None:
    views = build().views()
    assert (dict(views.images), set(views.texts), views.regions) == ({}, {"text", "text_masked"}, True)
    assert views.label_sets == {"labels": LabelSet(("classes",), NAMES)}
    views = build(("words", "objects")).views()
    assert (views.label_sets, views.regions) == ({}, True)
    views = build(("objects",)).views()
    assert (dict(views.texts), views.regions) == ({}, True)
    views = build(("words",), **GRID).views()
    assert (dict(views.images), set(views.texts)) == ({}, {"text", "text_masked"})
    views = build(("labels",), **GRID).views()
    assert (dict(views.images), dict(views.texts), views.regions) == (
        {"image": "plain"},
        {"text": "plain"},
        False,
    )


def test_tokens_of_a_frozen_tower_serve_for_its_images() -> None:
    model = build(("labels",), vision=GRID["vision"] | {"trainable": False})
    batch = semantic_case.batch(model)
    assert model.frozen_image_tower() is model.vision
    tokens = model.vision(batch.images["image"])
    expected = model(batch).losses["labels"]
    model.vision.forward = None
    close(
        model(replace(batch, images={}, tokens={"image": tokens})).losses["labels"], expected, "labels", 1e-12
    )


@pytest.mark.parametrize(
    ("losses", "changed", "message"),
    [
        (("objects",), GRID, "have none; make regions with classes by a stage of kind regions"),
        (("labels", "words"), GLOBAL, "words asks for masked segments by the others, and segments: global"),
        (("labels",), {"segments": "global"}, "which has nothing to attend to; set encoder: fc"),
        (("labels",), {"heads": 3}, "heads: 3 does not divide dimension, 8"),
        (("words",), {"retrieval": "predictions"}, "a classifier that the loss labels trains; add it"),
        (("ccl",), {}, "'ccl' is not a loss of SemanticSharing; allowed: labels, words, objects"),
        (("labels",), {"labels": {"names": ["a", "b", "a"]}}, "names: 'a' stands twice"),
        (("labels",), {"labels": {"names": []}}, "labels.names"),
        (("labels",), {"vision": {"tower": "boxes"}}, "'boxes' is not a kind of image tower; allowed: timm"),
        (("labels",), {"text": {"tower": "lstm"}}, "'lstm' is not a kind of text tower; allowed: bert, gru"),
        (("labels",), {"text": semantic_case.GRU | {"width": 7}}, "width: 7 is odd"),
        (("labels",), {"mask_share": 0}, "mask_share"),
        (
            ("labels",),
            {"vision": {"name": "test_resnet", "image_px": 64, "tower": "regions"}},
            "vision.name",
        ),
    ],
)
def test_mistakes_in_the_recipe_are_named(
    losses: tuple[str, ...], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, ValidationError)) as raised:
        build(losses, **changed)
    assert message in str(raised.value)


def test_mistakes_in_the_data_are_named() -> None:
    model, of_pixels = build(), build(("labels",), **GRID)
    batch = semantic_case.batch(model)
    regions = batch.regions
    assert regions is not None
    with pytest.raises(ValueError, match=r"the batch has none; give the stage inputs\.regions"):
        model(replace(batch, regions=None))
    with pytest.raises(ValueError, match=r"6 a picture, 6 wide; model\.vision says count: 7, width: 6"):
        model.embed_regions(regions.each(lambda x: x[:, 1:]))
    with pytest.raises(ValueError, match=r"this model reads no pixels; give the stage inputs\.regions"):
        model.embed_images(torch.zeros(1, 3, 224, 224, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"timm computes segments from pixels; leave inputs\.regions out"):
        of_pixels.embed_regions(regions)
    ids = torch.ones(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"texts of 10 tokens; model\.text\.max_length is 9"):
        model.embed_texts(Texts(ids, ids))


@pytest.mark.parametrize("name", ["clip", "cookie", "r2d2"])
def test_a_method_of_pixels_refuses_regions(name: str) -> None:
    values = {"method": name, "vision": MODEL["vision"], "text": BERT}
    with pytest.raises(ValidationError, match="regions are not read by this method"):
        methods.parse_config(values)


def test_the_papers_numbers_are_the_defaults() -> None:
    """Sec. 3.2: 36 regions of fc7, 1024 wide; word2vec into a Bi-GRU; 15 %."""
    config: Any = methods.parse_config(
        {
            "method": "semantic_sharing",
            "vision": {"tower": "regions"},
            "text": {"tower": "gru"},
            "labels": {"names": ["a"]},
        }
    )
    assert (config.vision.count, config.vision.width, config.mask_share) == (REGIONS + 29, 1024, 0.15)
    assert (config.encoder, config.segments, config.sharing) == ("transformer", "regions", "shared")
    assert (config.text.word_width, config.label_loss, config.retrieval) == (300, "logistic", "embeddings")


@pytest.mark.parametrize("changed", [{}, {"text": BERT}, GLOBAL], ids=["GRU", "BERT", "global"])
def test_its_footprint_is_counted_without_computing(changed: dict[str, Any]) -> None:
    """No step of the method waits for a number: a plan counts it on tensors without content."""
    losses = ("labels", "triplet") if "segments" in changed else ALL
    made = footprint(MODEL | changed, losses, 4, torch.bfloat16, r2d2_case.VOCABULARY)
    assert made.forward_flops > 0
    assert made.activation_bytes > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_gives_losses_in_fp32(dtype: torch.dtype) -> None:
    model, wide = build(ALL).float().to(dtype), build(ALL)
    batch = semantic_case.batch(model)
    told, expected = model(batch).losses, wide(batch).losses
    assert {loss.dtype for loss in told.values()} == {torch.float32}
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for name, loss in told.items():
        torch.testing.assert_close(loss.double(), expected[name], rtol=tolerance, atol=tolerance)
