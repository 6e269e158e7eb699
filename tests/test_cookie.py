"""COOKIE as a whole: Eq. 1-13 against the plain reference, Tables IX and X's variants, and its switches."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from learning import methods
from learning.methods.base import Batch, Method, Texts
from tests import cookie_case, reference
from tests.cookie_case import ALL, MODEL, build

SHARINGS = ("shared", "unshared", "none", "fc")
POOLINGS = ("max", "mean", "gpo")


def reference_embeddings(
    model: Any, batch: Batch, config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Embeddings of every view by Eq. 1-4 from the towers' tokens, and the towers' tokens (leaves)."""
    state = dict(model.fusion.named_parameters())
    config = {"sharing": "shared", "pooling": "max", "tav_layers": 1, "ws_layers": 2} | config

    def top(tokens: Tensor, side: str) -> Tensor:
        if config["sharing"] == "none":
            return tokens
        if config["sharing"] == "fc":
            return reference.fully_connected(tokens, state, "ws.both", config["ws_layers"])
        name = "both" if config["sharing"] == "shared" else side
        return reference.encoder(tokens, state, f"ws.{name}", config["ws_layers"], 2)

    found: dict[str, Tensor] = {}
    leaves = []
    with torch.no_grad():
        views = torch.cat(list(batch.images.values()))
        v_by_view = model.vision(views).chunk(len(batch.images))
        t_by_view = [model.text(text) for text in batch.texts.values()]
    for name, v in zip(batch.images, v_by_view, strict=True):
        leaves.append(v.clone().requires_grad_())
        rows = []
        for sample in leaves[-1]:
            projected = [
                reference.linear(x, state, "image_fc") + p
                for x, p in zip(sample, state["position"], strict=True)
            ]  # Eq. 1
            f_v = reference.encoder(torch.stack(projected), state, "tav", config["tav_layers"], 2)
            f_v = f_v + state["image_vector"]  # Eq. 3
            rows.append(
                reference.unit(reference.pooled(top(f_v, "image"), config["pooling"], state, "pooling.image"))
            )
        found[name] = torch.stack(rows)
    for (name, text), t in zip(batch.texts.items(), t_by_view, strict=True):
        leaves.append(t.clone().requires_grad_())
        rows = []
        for sample, mask in zip(leaves[-1], text.mask, strict=True):
            words = sample[: int(mask.sum())]
            f_t = torch.stack(
                [reference.linear(x, state, "text_fc") + state["text_vector"] for x in words]
            )  # Eq. 2
            rows.append(
                reference.unit(reference.pooled(top(f_t, "text"), config["pooling"], state, "pooling.text"))
            )
        found[name] = torch.stack(rows)
    return found, leaves


def reference_losses(model: Any, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    tau = torch.exp(model.temperature.log[0])
    image = found["image_a" if config.get("ccl_view") == "a" else "image"]
    text = found["text_a" if config.get("ccl_text_view") == "a" else "text"]
    return {
        "ccl": reference.info_nce(image, text, tau) + reference.info_nce(text, image, tau),
        "vcl": reference.info_nce(found["image_a"], found["image_b"], tau),
        "tcl": reference.info_nce(found["text_a"], found["text_b"], tau),
        "hinge": reference.hinge(image, text, 0.2),
    }


CASES: list[dict[str, Any]] = [
    {"pooling": "max"},
    {"pooling": "mean", "tav_layers": 0},
    {"pooling": "gpo", "sharing": "unshared"},
    {"sharing": "none", "tav_layers": 0},
    {"sharing": "fc", "pooling": "mean"},
    {"ws_layers": 0},
    {"ccl_view": "a", "ccl_text_view": "a", "tav_layers": 2, "ws_layers": 1},
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_losses_and_gradients_equal_the_paper(config: dict[str, Any]) -> None:
    """Every loss, and its gradient in every parameter above the towers and in the towers' tokens."""
    model: Any = build(**config, vision__batch_norm="frozen")
    batch = cookie_case.batch(model, count=3)
    found, leaves = reference_embeddings(model, batch, config)
    expected = reference_losses(model, found, config)
    kept = {"vision": model.vision, "text": model.text}
    v = torch.cat([leaf for leaf, _ in zip(leaves, batch.images, strict=False)])
    longest = max(text.ids.shape[1] for text in batch.texts.values())
    t = torch.cat(
        [nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in leaves[len(batch.images) :]]
    )
    model.vision, model.text = Given(v), Given(t)  # the towers' tokens as leaves of both computations
    terms = model(batch)
    model.vision, model.text = kept["vision"], kept["text"]
    assert set(terms.losses) == set(ALL)
    inputs = [*model.fusion.parameters(), model.temperature.log, *leaves]
    for name, loss in terms.losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-11)
        options: dict[str, Any] = {"allow_unused": True, "retain_graph": True, "materialize_grads": True}
        ours = torch.autograd.grad(loss, inputs, **options)
        theirs = torch.autograd.grad(expected[name], inputs, **options)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


class Given(nn.Module):
    """A tower that gives what it was given."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens

    def forward(self, ignored: Any) -> Tensor:
        return self.tokens


COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(ALL, n)]
VARIANTS = list(itertools.product(SHARINGS, POOLINGS))


def check_gradients(losses: tuple[str, ...], sharing: str, pooling: str) -> None:
    model = build(losses, sharing=sharing, pooling=pooling)
    terms = model(cookie_case.batch(model, count=3))
    assert set(terms.losses) == set(losses)
    sum(terms.losses.values(), torch.zeros(())).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@pytest.mark.parametrize(
    "number", range(len(COMBINATIONS)), ids=["+".join(losses) for losses in COMBINATIONS]
)
def test_every_trainable_parameter_gets_a_gradient(number: int) -> None:
    """Each set of losses, with one of the variants in turn."""
    check_gradients(COMBINATIONS[number], *VARIANTS[number % len(VARIANTS)])


@pytest.mark.slow
@pytest.mark.parametrize("losses", COMBINATIONS, ids="+".join)
def test_every_trainable_parameter_gets_a_gradient_in_every_variant(losses: tuple[str, ...]) -> None:
    for sharing, pooling in VARIANTS:
        check_gradients(losses, sharing, pooling)


def parameters(model: Method) -> int:
    return sum(p.numel() for p in model.fusion.parameters())  # type: ignore[union-attr]


def test_table_ix_and_x_by_their_parameters() -> None:
    d, wide = 8, 12
    encoder_layer = 4 * d * d + 4 * d + 2 * d * wide + wide + d + 4 * d  # attention, FFN, two norms
    baseline = parameters(build(sharing="none", tav_layers=0))
    for sharing, layers, tav, expected in [
        ("fc", 2, 0, 2 * (d * d + d)),
        ("unshared", 2, 0, 4 * encoder_layer),
        ("shared", 2, 0, 2 * encoder_layer),
        ("unshared", 2, 1, 5 * encoder_layer),
        ("shared", 2, 1, 3 * encoder_layer),
        ("shared", 0, 0, 0),
        ("shared", 8, 1, 9 * encoder_layer),
    ]:
        model = build(sharing=sharing, ws_layers=layers, tav_layers=tav)
        assert parameters(model) - baseline == expected, (sharing, layers, tav)


def test_unshared_encoders_with_the_shared_weights_are_the_shared_encoder() -> None:
    shared, unshared = build(sharing="shared"), build(sharing="unshared")
    state = {
        name.replace("ws.both.", f"ws.{side}."): value
        for name, value in shared.state_dict().items()
        for side in ("image", "text")
    }
    unshared.load_state_dict(state)
    batch = cookie_case.batch(shared)
    for name, loss in shared(batch).losses.items():
        torch.testing.assert_close(unshared(batch).losses[name], loss)


def test_no_layers_of_ws_te_are_the_baseline() -> None:
    none, zero = build(sharing="none"), build(sharing="shared", ws_layers=0)
    zero.load_state_dict(none.state_dict())
    batch = cookie_case.batch(none)
    torch.testing.assert_close(zero(batch).losses, none(batch).losses)


def test_sharing_sends_both_sides_gradients_to_one_encoder() -> None:
    for losses in (("vcl",), ("tcl",)):
        model: Any = build(losses, sharing="shared")
        model(cookie_case.batch(model)).losses[losses[0]].backward()
        assert all(p.grad is not None for p in model.fusion.ws["both"].parameters())


@pytest.mark.parametrize(("sharing", "pooling"), VARIANTS)
def test_padding_changes_nothing(sharing: str, pooling: str) -> None:
    model = build(sharing=sharing, pooling=pooling).eval()
    batch = cookie_case.batch(model)
    text = batch.texts["text"]
    longer = Texts(nn.functional.pad(text.ids, (0, 4), value=17), nn.functional.pad(text.mask, (0, 4)))
    torch.testing.assert_close(model.embed_texts(longer), model.embed_texts(text))
    for row, length in enumerate(text.mask.sum(dim=1).tolist()):
        alone = Texts(text.ids[row : row + 1, :length], text.mask[row : row + 1, :length])
        torch.testing.assert_close(model.embed_texts(alone)[0], model.embed_texts(text)[row])


def test_embeddings_have_unit_length_and_no_neighbour_changes_them() -> None:
    model = build().eval()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    embedded = model.embed_images(images)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(model.embed_images(images[1:2])[0], embedded[1])


def test_views_in_one_forward_pass_equal_views_apart() -> None:
    """With frozen statistics; with others the views are normalised together, as documented."""
    model: Any = build(vision__batch_norm="frozen")
    batch = cookie_case.batch(model)
    together = model._images(batch) | model._texts(batch.texts)
    for name, image in batch.images.items():
        torch.testing.assert_close(together[name], model.embed_images(image))
    for name, text in batch.texts.items():
        torch.testing.assert_close(together[name], model.embed_texts(text))


@pytest.mark.parametrize(
    ("losses", "changed", "images", "texts"),
    [
        (("ccl",), {}, {"image": "plain"}, {"text": "plain"}),
        (("hinge",), {"ccl_view": "augmented"}, {"image": "augmented"}, {"text": "plain"}),
        (("vcl",), {}, {"image_a": "augmented", "image_b": "augmented"}, {}),
        (("tcl",), {}, {}, {"text_a": "augmented", "text_b": "augmented"}),
        (
            ("ccl", "vcl", "tcl"),
            {},
            {"image": "plain", "image_a": "augmented", "image_b": "augmented"},
            {"text": "plain", "text_a": "augmented", "text_b": "augmented"},
        ),
        (
            ("ccl", "vcl", "tcl"),
            {"ccl_view": "a", "ccl_text_view": "a"},
            {"image_a": "augmented", "image_b": "augmented"},
            {"text_a": "augmented", "text_b": "augmented"},
        ),
        (("ccl",), {"ccl_view": "a"}, {"image": "augmented"}, {"text": "plain"}),
    ],
)
def test_views_are_those_of_the_losses(losses: Any, changed: Any, images: Any, texts: Any) -> None:
    views = build(losses, **changed).views()
    assert (dict(views.images), dict(views.texts)) == (images, texts)


def test_report_is_shown_and_carries_no_gradient() -> None:
    model = build()
    terms = model(cookie_case.batch(model))
    assert set(terms.report) == {
        "temperature",
        "ccl_accuracy",
        "vcl_accuracy",
        "tcl_accuracy",
        "hinge_accuracy",
    }
    assert terms.report["temperature"].item() == pytest.approx(0.1)
    assert not any(value.requires_grad for value in terms.report.values())


def test_parts_split_every_trainable_parameter_once() -> None:
    model = build()
    parts = model.parts()
    assert set(parts) == {"vision", "text", "fusion", "temperature"}
    listed = [id(p) for part in parts.values() for p in part]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert set(build(("hinge",), vision__trainable=False).parts()) == {"text", "fusion"}


def test_the_state_goes_on_from_a_stage_to_the_next() -> None:
    """Other losses, a fixed temperature and no dropout: still the same names and shapes."""
    first = build(("ccl",))
    later = build(("hinge",), temperature={"initial": 0.1})
    later.load_state_dict(first.state_dict())
    shapes = {name: value.shape for name, value in first.state_dict().items()}
    assert shapes == {name: value.shape for name, value in build(ALL, pooling="mean").state_dict().items()}
    assert all(parameter.ndim > 0 for parameter in first.parameters())


def test_token_norm_and_feature_dropout_are_switches() -> None:
    plain, normed = build(), build(token_norm=True)
    assert parameters(normed) - parameters(plain) == 4 * 8
    dropping = build(feature_dropout=0.5)
    batch = cookie_case.batch(dropping)
    assert not torch.equal(dropping(batch).losses["ccl"], dropping(batch).losses["ccl"])
    assert torch.equal(plain(batch).losses["hinge"], plain(batch).losses["hinge"])


def test_a_model_in_bf16_gives_losses_in_float32() -> None:
    model = build().to(torch.bfloat16)
    batch = cookie_case.batch(model)
    terms = model(Batch({n: i.float() for n, i in batch.images.items()}, batch.texts, batch.keys))
    assert {loss.dtype for loss in terms.losses.values()} == {torch.float32}


def test_mistakes_in_the_recipe_are_named() -> None:
    def parse(**changed: Any) -> None:
        methods.parse_config(MODEL | changed)

    with pytest.raises(ValueError, match="'mlm' is not a loss of Cookie; allowed: ccl, vcl, tcl, hinge"):
        build(("mlm",))
    with pytest.raises(ValidationError, match="heads: 3 does not divide dimension, 8"):
        parse(heads=3)
    with pytest.raises(ValidationError, match="sharing"):
        parse(sharing="both")
    with pytest.raises(ValidationError, match="poolin"):
        parse(poolin="max")
    with pytest.raises(ValueError, match=r"model\.method: 'cooky' is not a method; allowed: .*cookie"):
        parse(method="cooky")


def test_the_defaults_are_the_papers() -> None:
    config: Any = methods.parse_config(
        {"method": "cookie", "vision": {"name": "resnext101_32x8d"}, "text": {"name": "bert_base"}}
    )
    assert (config.vision.image_px, config.text.max_length, config.dimension) == (512, 50, 1024)
    assert (config.heads, config.intermediate, config.tav_layers, config.ws_layers) == (8, 1024, 1, 2)
    assert (config.sharing, config.pooling, config.hinge_margin) == ("shared", "max", 0.2)
    with torch.device("meta"):
        model: Any = methods.build(config, ("ccl", "vcl", "tcl"), 30522)
    assert (model.vision.tokens, model.vision.width, model.text.width) == (256, 2048, 768)


def test_clip_pools_projects_and_contrasts() -> None:
    values = {key: MODEL[key] for key in ("vision", "text")} | {
        "method": "clip",
        "dimension": 6,
        "pooling": "mean",
    }
    torch.manual_seed(0)
    model: Any = methods.build(methods.parse_config(values), ("ccl", "hinge"), 30).double().eval()
    batch = cookie_case.batch(model)
    found = {}
    for side, tokens, mask in (
        ("image", model.vision(batch.images["image"]), None),
        ("text", model.text(batch.texts["text"]), batch.texts["text"].mask),
    ):
        weight = model.fusion[side].projection.weight
        counts = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(dim=1).tolist()
        rows = [weight @ (sum(x[:n]) / n) for x, n in zip(tokens, counts, strict=True)]
        found[side] = torch.stack([reference.unit(row) for row in rows])
    losses = model(batch).losses
    tau = torch.tensor(0.07, dtype=torch.float64)
    ccl = reference.info_nce(found["image"], found["text"], tau) + reference.info_nce(
        found["text"], found["image"], tau
    )
    torch.testing.assert_close(losses["ccl"], ccl, rtol=1e-6, atol=1e-6)  # τ is stored in float32
    torch.testing.assert_close(losses["hinge"], reference.hinge(found["image"], found["text"], 0.2))
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert set(model.parts()) == {"vision", "text", "fusion", "temperature"}
