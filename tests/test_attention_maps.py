"""Attention maps: the right tokens of a known attention, pictures by the evaluate stage, errors, ranks."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from learning import methods, model_files
from learning.evaluation.attention_maps import attention_map
from learning.methods.base import Batch, Method, Terms, Texts, Views
from learning.methods.r2d2 import R2D2
from learning.training.augment import ImageTransform
from stages.attention import PICTURE_PX, overlay
from stages.base import Job, StageError
from stages.evaluate import Config, run
from tests import tiny_model
from tests.data_helpers import CountingProgress, NoTracker
from tests.distributed_harness import run_distributed

PX, SIDE = 64, 4
CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "method": "r2d2",
    "vision": {"name": "test_vit", "image_px": PX, "mean": [0.5] * 3, "std": [0.5] * 3},
    "text": {"layers": 1, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
    "dimension": 32,
    "cross_layers": 3,
    "cross_heads": 2,
    "cross_intermediate": 64,
}
TRANSFORM = ImageTransform(PX, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Known(Method):
    """A method whose attention is given: (heads, text tokens, image tokens)."""

    def __init__(self, given: torch.Tensor):
        super().__init__(())
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.given = given
        self.seen: list[tuple[torch.Tensor, bool]] = []  # ids of the texts, and the mode

    def views(self) -> Views:
        return Views({}, {})

    def forward(self, batch: Batch) -> Terms:
        return Terms({})

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    def embed_texts(self, texts: Texts) -> torch.Tensor:
        return texts.ids

    def image_tokens(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2)

    def text_tokens(self, texts: Texts) -> torch.Tensor:
        self.seen.append((texts.ids, self.training))
        return texts.ids[..., None]

    def score_pairs(
        self, image_tokens: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        return torch.ones(len(image_tokens))

    def attention(
        self, image_tokens: torch.Tensor, text_tokens: torch.Tensor, text_mask: torch.Tensor, layer: int
    ) -> torch.Tensor:
        return self.given[None]


def asked(method: Method, entity: str = "red thing", layer: int = 3) -> np.ndarray:
    pixels = torch.linspace(-1, 1, 3 * PX * PX).view(3, PX, PX)
    return attention_map(
        method, tiny_model.tokenizer(), pixels, entity, layer=layer, max_length=12, device=CPU
    )


def tiny(seed: int = 0, **changed: Any) -> Method:
    torch.manual_seed(seed)
    config = methods.parse_config(MODEL | changed)
    return methods.build(config, ("gcpr",), tiny_model.tokenizer().vocabulary_size)


# ----------------------------------------------------------------------------------------------- the map


def test_the_entitys_tokens_ask_and_the_special_ones_do_not() -> None:
    ids = tiny_model.tokenizer().encode(["red thing"], 12).ids[0]
    given = torch.zeros(2, len(ids), 9)
    given[:, 0, 0] = given[:, -1, 8] = 100.0  # what [CLS] and [SEP] look at: were they to ask, they would win
    given[0, 1:-1, 5] = 0.4  # row 1, column 2
    given[1, 1:-1, 5] = 0.2
    given[1, 1:-1, 6] = 0.4  # row 2, column 0
    method = Known(given).train()
    found = asked(method)
    expected = np.zeros((3, 3), dtype=np.float32)
    expected[1, 2], expected[2, 0] = 0.6, 0.4
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (seen, training), *more = method.seen
    assert more == []
    assert torch.equal(seen[0], ids)  # the entity alone is the text
    assert not training
    assert method.training


def test_the_map_is_the_mean_of_the_third_layers_weights() -> None:
    method = tiny().train()
    assert isinstance(method, R2D2)
    assert method.ranking is not None
    found = asked(method)
    assert all(module.training for module in method.modules())
    seen: list[torch.Tensor] = []
    layer: Any = method.ranking.text_image.layers[2].cross_attention
    layer.key.register_forward_hook(lambda _, inputs, out: seen.append(out))
    layer.query.register_forward_hook(lambda _, inputs, out: seen.append(out))
    again = asked(method)
    np.testing.assert_array_equal(found, again)  # no dropout
    # by hand, from what the third layer's two projections gave; one row a token, 16 numbers a head
    by_size = {len(x[0]): x[0].detach().double().numpy() for x in seen}
    keys, queries = by_size[1 + SIDE * SIDE], by_size[min(by_size)]
    assert len(queries) == len(tiny_model.tokenizer().tokens("red thing")) + 2
    shares = np.zeros(SIDE * SIDE)
    for head in (slice(0, 16), slice(16, 32)):
        for query in queries[1:-1]:
            weights = np.exp(keys[:, head] @ query[head] / 4)
            shares += (weights / weights.sum())[1:]
    np.testing.assert_allclose(found.ravel(), shares / shares.sum(), rtol=1e-5)
    assert not np.allclose(asked(method, layer=2), found, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "entity", "message"),
    [
        (lambda: tiny_model.method(), "red", "Clip embeds images and texts apart"),
        (lambda: tiny(cross_layers=2), "red", r"layer: 3; this cross encoder has the layers 1 … 2"),
        (lambda: tiny(cross_layers=0), "red", "model.cross_layers: 0: there are no cross encoders"),
        # a mean is put before the ViT's own [CLS], which then stands among the patches
        (lambda: tiny(image_cls="mean"), "red", "image's 17 tokens beside .* no square grid"),
        (lambda: tiny(), "\u200b", "no token beside"),
        (lambda: Known(torch.full((2, 3, 9), float("nan"))), "red", "sums to nan .*diverged"),
    ],
)
def test_what_cannot_be_drawn_is_said(make: Callable[[], Method], entity: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(make(), entity)


def test_the_overlay_is_brightest_at_the_peak_and_has_the_pictures_shape() -> None:
    shares = np.zeros((3, 3), dtype=np.float32)
    shares[0, 2] = 0.25
    drawn = overlay(Image.new("RGB", (90, 60), (128, 128, 128)), shares)
    assert drawn.size == (90, 60)
    light = np.asarray(drawn.convert("L")).astype(int)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row < 20
    assert column >= 60
    assert light[30:, :30].max() == light.min()
    flat = np.asarray(overlay(Image.new("RGB", (9, 6)), np.full((3, 3), 1 / 9, dtype=np.float32)))
    assert (flat == flat[0, 0]).all()


# ----------------------------------------------------------------------------------------------- the stage


def write_model(stage: Path, method: Method, model: dict[str, Any]) -> Path:
    words = tiny_model.tokenizer()
    model_files.save(stage / "out", method, model, ("gcpr",), words, transform=TRANSFORM, max_length=12)
    (stage / "config.yaml").write_text("kind: finetune\n")
    (stage / "DONE.json").write_text("{}")
    return stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    tiny_model.write_corpus(root / "shard" / "out", 9)
    return {"corpus": root / "shard", "weights": write_model(root / "finetune", tiny(), MODEL)}


def config(**maps: Any) -> Config:
    gallery = {"name": "own", "split": "test", "texts": ["title", "captions"]}
    values = {"galleries": [gallery], "examples": 1, "attention_maps": {"gallery": "own"} | maps}
    return Config.model_validate(values)


def evaluate(directory: Path, inputs: dict[str, Path], *, seed: int = 7, **maps: Any) -> dict[str, Any]:
    run(config(**maps), Job(directory, inputs, NoTracker(), CountingProgress(), lambda: False, seed=seed))
    written: dict[str, Any] = json.loads((directory / "out" / "attention.json").read_text())
    return written


def test_entities_are_shown_in_pictures_with_a_text_that_has_them(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    written = evaluate(tmp_path, inputs, entities=["Green", " caption 7 2 "], count=2)
    assert written["gallery"] == "own"
    maps = written["maps"]
    assert [m["entity"] for m in maps] == ["Green", "Green", "caption 7 2"]
    # three samples are green, of which two are drawn; the captions of one have the other entity
    assert {m["key"] for m in maps[:2]} < {"test0003", "test0004", "test0005"}
    assert [(m["key"], m["title"]) for m in maps[2:]] == [("test0007", "blue thing 2")]
    model = model_files.load(inputs["weights"])
    for m in maps:
        pixels = TRANSFORM.plain(Image.open(io.BytesIO(tiny_model.picture_bytes(int(m["key"][-4:])))))
        shares = attention_map(
            model.method, model.tokenizer, pixels, m["entity"], layer=3, max_length=12, device=CPU
        )
        peak = m["peak"]
        assert (m["layer"], m["side"]) == (3, SIDE)
        assert (peak["row"], peak["column"]) == divmod(int(shares.argmax()), SIDE)
        assert peak["share"] == pytest.approx(shares.max(), abs=1e-6)
        for role in ("picture", "map"):
            with Image.open(tmp_path / "out" / m[role]) as drawn:
                assert drawn.format == "WEBP"
                assert drawn.size == (PICTURE_PX, PICTURE_PX)
    assert len({m[role] for m in maps for role in ("picture", "map")}) == 6


def test_without_entities_each_picture_has_its_shortest_text(inputs: dict[str, Path], tmp_path: Path) -> None:
    maps = evaluate(tmp_path / "a", inputs, count=3)["maps"]
    assert len({m["key"] for m in maps}) == 3
    for m in maps:
        number = int(m["key"][-4:])
        own = [m["title"], *(f"caption {number} {i}" for i in range(5))]
        assert m["entity"] == min(own, key=lambda text: (len(text), text))
    assert evaluate(tmp_path / "b", inputs, count=3)["maps"] == maps
    assert evaluate(tmp_path / "c", inputs, count=3, seed=8)["maps"] != maps
    assert len(evaluate(tmp_path / "d", inputs, count=100)["maps"]) == 9


def test_a_chinese_entity_matches_inside_a_text_and_a_latin_one_as_a_word(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    corpus = tiny_model.write_corpus(tmp_path / "shard" / "out", 2, title="一只大熊猫 pandas")
    own = inputs | {"corpus": corpus.parent}
    assert len(evaluate(tmp_path / "a", own, entities=["熊猫"])["maps"]) == 2
    with pytest.raises(StageError, match="attention_maps: entities: 'panda' stands in no title and no capt"):
        evaluate(tmp_path / "b", own, entities=["熊猫", "panda"])


def test_a_model_that_judges_no_pairs_is_refused_before_the_galleries(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    clip = inputs | {"weights": tiny_model.write_stage(tmp_path / "clip")}
    with pytest.raises(StageError, match=r"^evaluate: attention_maps: Clip embeds .* leave the field out"):
        evaluate(tmp_path / "a", clip)
    with pytest.raises(StageError, match=r"^evaluate: attention_maps: layer: 4; .* the layers 1 … 3"):
        evaluate(tmp_path / "b", inputs, layer=4)
    assert not list(tmp_path.glob("?/out/*.json"))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"gallery": "other"}, "attention_maps.gallery: 'other'; allowed: own"),
        ({"entities": []}, "at least 1 item"),
        ({"entities": [" "]}, "at least 1 character"),
        ({"layer": 0}, "greater than or equal to 1"),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_config_is_refused(maps: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**maps)


def test_none_are_drawn_unless_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain = Config.model_validate(config().model_dump() | {"attention_maps": None})
    run(plain, Job(tmp_path, inputs, NoTracker(), CountingProgress(), lambda: False))
    assert not (tmp_path / "out" / "attention.json").exists()


def _evaluate_in(rank: int, world: int, corpus: str, weights: str, out: str) -> None:
    inputs = {"corpus": Path(corpus), "weights": Path(weights)}
    evaluate(Path(out), inputs, entities=["green"], count=2)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluate(tmp_path / "one", inputs, entities=["green"], count=2)
    finally:
        torch.set_num_threads(threads)
    run_distributed(
        _evaluate_in, 2, str(inputs["corpus"]), str(inputs["weights"]), os.fspath(tmp_path / "two")
    )
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert [p for p in names if p.suffix == ".webp"]
    for name in names:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
