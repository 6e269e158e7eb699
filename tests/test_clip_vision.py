"""CLIP's vision tower: transformers' values, its files, frozen and trained, and beside timm's in a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from learning import methods, model_files
from learning.encoders.clip_vision import ClipVisionConfig, ClipVisionEncoder, read_sizes, resized_positions
from learning.encoders.momentum import Momentum
from learning.encoders.text import TextConfig, TextEncoder
from learning.encoders.towers import make_vision
from learning.encoders.vision import VisionConfig, VisionEncoder
from learning.methods.base import Method
from learning.training import distributed
from learning.training.augment import ImageTransform
from learning.training.blocks import recompute_blocks
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine
from learning.training.footprint import footprint
from learning.training.rates import OptimizerConfig, parameter_groups
from pipeline.recipe import load
from stages.base import StageError
from stages.upstream import load_upstream
from tests import cookie_case, tiny_model
from tests.training_case import CONFIGS

PX, PATCH = 32, 8
SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "intermediate": 24, "patch_px": PATCH}
TOWER: dict[str, Any] = {"tower": "clip", "image_px": PX} | SIZES
THEIRS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": PATCH,
    "image_size": PX,
}
TEXT_OF_CLIP = {
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def encoder(**changed: Any) -> ClipVisionEncoder:
    return ClipVisionEncoder(ClipVisionConfig.model_validate(TOWER | changed))


def roughened(module: nn.Module) -> None:
    """No parameter at its special start (norms of 1 and 0), so that one forgotten is seen."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def local_tower(directory: Path, **changed: Any) -> CLIPVisionModel:
    """What transformers saves of a vision tower alone."""
    torch.manual_seed(3)
    tower = CLIPVisionModel(CLIPVisionConfig(**THEIRS | changed))
    roughened(tower)
    tower.save_pretrained(directory)
    return tower.eval()


def local_clip(directory: Path) -> CLIPVisionModel:
    """What transformers saves of a whole CLIP; its vision tower is returned."""
    torch.manual_seed(4)
    clip = CLIPModel(CLIPConfig(vision_config=THEIRS, text_config=TEXT_OF_CLIP))
    roughened(clip)
    clip.save_pretrained(directory)
    return clip.vision_model.eval()


def expected_tokens(theirs: Any, images: Tensor, **options: Any) -> Tensor:
    return theirs.post_layernorm(theirs(pixel_values=images, **options).last_hidden_state)


def images(count: int = 2, px: int = PX) -> Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_are_those_of_transformers_with_the_last_norm_on_each(tmp_path: Path, whole: bool) -> None:
    theirs = local_clip(tmp_path) if whole else local_tower(tmp_path)
    tower = encoder(weights=tmp_path)
    tokens = tower(images())
    assert tokens.shape == (2, tower.tokens, tower.width) == (2, 17, 16)
    torch.testing.assert_close(tokens, expected_tokens(theirs, images()))
    # of [CLS] it is CLIP's own output
    torch.testing.assert_close(tokens[:, 0], theirs(pixel_values=images()).pooler_output)


def test_files_of_older_transformers_are_read(tmp_path: Path) -> None:
    """Names begin with vision_model, the positions' numbers are stored, and a pickle holds it all."""
    theirs = local_tower(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    old = {f"vision_model.{name}": value for name, value in theirs.state_dict().items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(encoder(weights=tmp_path)(images()), expected_tokens(theirs, images()))


def test_the_activation_is_the_files(tmp_path: Path) -> None:
    theirs = local_tower(tmp_path, hidden_act="gelu")
    tower = encoder(weights=tmp_path, hidden_act="gelu")
    torch.testing.assert_close(tower(images()), expected_tokens(theirs, images()))
    with pytest.raises(
        ValueError, match=r"hidden_act is gelu, but .*\.hidden_act is quick_gelu; set it to gelu"
    ):
        encoder(weights=tmp_path)


def test_positions_are_interpolated_for_another_image_px(tmp_path: Path) -> None:
    theirs = local_tower(tmp_path)
    tower = encoder(weights=tmp_path, image_px=48)
    assert tower.tokens == 1 + 6 * 6
    wanted = expected_tokens(theirs, images(px=48), interpolate_pos_encoding=True)
    torch.testing.assert_close(tower(images(px=48)), wanted)


def test_interpolation_keeps_cls_and_is_bicubic() -> None:
    table = torch.randn(17, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized_positions(table, 17), table)
    resized = resized_positions(table, 1 + 8 * 8)
    assert torch.equal(resized[0], table[0])
    # Row 4 of 8 lies at (4 + 1/2) / 2 - 1/2 = 1.75 of 4, column 3 at 1.25: Keys's cubic of 1981, a = -3/4
    at_175 = torch.tensor([-9.0, 67.0, 225.0, -27.0]) / 256
    wanted = torch.einsum("r,c,rcw->w", at_175, at_175.flip(0), table[1:].reshape(4, 4, 3))
    torch.testing.assert_close(resized[1 + 4 * 8 + 3], wanted)
    with pytest.raises(ValueError, match=r"\(18, 2\), which is not \[CLS\] and a square"):
        resized_positions(torch.zeros(18, 2), 17)


def clip_method(**vision: Any) -> Method:
    values = {name: cookie_case.MODEL[name] for name in ("text", "dimension")}
    config = methods.parse_config(values | {"method": "clip", "vision": TOWER | vision})
    torch.manual_seed(6)
    return methods.build(config, ("ccl",), cookie_case.VOCABULARY)


def test_a_stage_at_another_image_px_starts_from_upstream(tmp_path: Path) -> None:
    small, large = clip_method(), clip_method(image_px=48, trainable=True)
    state = small.state_dict()
    load_upstream(large, state, (), (), tmp_path)
    table = "vision.backbone.embeddings.position_embedding.weight"
    assert torch.equal(large.state_dict()[table], resized_positions(state[table], 37))
    assert all(torch.equal(value, state[name]) for name, value in large.state_dict().items() if name != table)


def test_a_frozen_tower_rests(tmp_path: Path) -> None:
    method = clip_method().train()
    tower: Any = method.vision
    assert not tower.backbone.training
    assert not tower(images()).requires_grad
    assert method.frozen_image_tower() is tower
    towers = {id(p) for p in tower.parameters()}
    groups = parameter_groups(method, OptimizerConfig(learning_rate=1.0))
    assert groups
    assert not towers & {id(p) for group in groups for p in group["params"]}
    assert "vision" not in method.parts()
    method(cookie_case_batch(method)).losses["ccl"].backward()
    assert all(p.grad is None for p in tower.parameters())


def cookie_case_batch(method: Method, count: int = 4) -> Any:
    batch = cookie_case.batch(method, count)
    batch.images = {name: images(count) for name in batch.images}
    return batch


def test_a_frozen_tower_keeps_nothing_for_backward() -> None:
    """Of the counts on tensors without content; the tower alone has 2 of the 3 layers."""
    told = []
    for trainable in (True, False):
        values = {"method": "clip", "text": cookie_case.MODEL["text"]}
        values |= {"vision": TOWER | {"trainable": trainable, "image_px": 64}}
        told.append(footprint(values, ("ccl",), 8, torch.bfloat16, cookie_case.VOCABULARY))
    trained, frozen = told
    assert frozen.activation_bytes < 0.4 * trained.activation_bytes
    assert frozen.forward_flops == trained.forward_flops


def test_a_trained_tower_gets_a_gradient_everywhere_and_rates_by_layer() -> None:
    method = clip_method(trainable=True)
    tower: Any = method.vision
    tokens = tower.train()(images())
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []
    assert len(tower.blocks()) == 2
    assert set(tower.depths()) == {name for name, _ in tower.named_parameters()}
    groups = parameter_groups(method, OptimizerConfig(learning_rate=1.0, layer_decay={"vision": 0.5}))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    told = {name: rates[id(p)] for name, p in tower.named_parameters()}
    assert told["backbone.embeddings.class_embedding"] == told["backbone.pre_layrnorm.weight"] == 0.25
    assert told["backbone.encoder.layers.0.mlp.fc1.bias"] == 0.5
    assert told["backbone.encoder.layers.1.layer_norm1.weight"] == told["backbone.post_layernorm.bias"] == 1.0


def test_recomputed_blocks_change_no_bit() -> None:
    gradients = []
    for recomputed in (False, True):
        tower = encoder_of_seed(trainable=True).train()
        if recomputed:
            assert recompute_blocks(tower) == 2
        tower(images()).square().mul(torch.arange(16)).sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name


def encoder_of_seed(**changed: Any) -> ClipVisionEncoder:
    torch.manual_seed(2)
    return encoder(**changed)


def test_in_bf16_the_tokens_are_near_those_in_fp32() -> None:
    tower = encoder_of_seed()
    wanted = tower(images())
    tokens = tower.bfloat16()(images())
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), wanted, rtol=0.1, atol=0.1)


LOSSES = {"clip": ("ccl",), "cookie": ("ccl", "vcl", "tcl"), "r2d2": ("gcpr_tgd", "fgr")}
OF_R2D2 = {
    "dimension": 8,
    "cross_layers": 1,
    "cross_heads": 2,
    "cross_intermediate": 12,
    "dropout": 0.0,
    "teacher": {"queue": 1},  # more negatives a step would let the loss rise
}


@pytest.mark.parametrize("config", ["zero0_fp32", "zero2_bf16"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_method_with_this_tower_trains(name: str, frozen: bool, config: str) -> None:
    """A few steps of the engine: the loss falls, and a frozen tower's weights stay to the bit."""
    values = {"clip": {"dimension": 8}, "cookie": cookie_case.MODEL, "r2d2": OF_R2D2}[name]
    values = values | {"text": cookie_case.MODEL["text"], "method": name}
    torch.manual_seed(0)
    parsed = methods.parse_config(values | {"vision": TOWER | {"trainable": not frozen}})
    model = methods.build(parsed, LOSSES[name], cookie_case.VOCABULARY)
    model.begin()
    losses = dict.fromkeys(LOSSES[name], 1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = cookie_case_batch(model, 8)
    distributed.init()
    try:
        held = read_deepspeed_config(CONFIGS / f"{config}.json")
        engine = Engine(model, losses, OptimizerConfig(learning_rate=1e-2), held, batch_per_gpu=8)
        told = [float(engine.step(batch, 1.0).total) for _ in range(20)]
        state = engine.full_state()
        engine.close()
    finally:
        distributed.shutdown()
    assert told[-1] < told[0] - 0.1
    dtype = torch.bfloat16 if config.endswith("bf16") else torch.float32
    same = {key for key, value in state.items() if torch.equal(before[key].to(dtype).float(), value)}
    tower = {key for key in state if key.startswith("vision.")}
    assert tower
    assert (tower <= same) if frozen else not (tower & same)


def teacher_of(tower: nn.Module) -> nn.Module:
    """A copy whose weights are buffers of the same names."""
    copy = Momentum(0.995, tower=tower).get_submodule("tower")
    assert list(copy.parameters()) == []
    return copy


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig(name="test_vit", image_px=PX),
        VisionConfig(name="test_resnet", image_px=PX),
        ClipVisionConfig.model_validate(TOWER | {"trainable": True}),
    ],
    ids=["vit", "cnn", "clip"],
)  # fmt: skip
def test_an_image_tower_whose_weights_are_buffers_gives_the_same_tokens(config: Any) -> None:
    tower = make_vision(config).double().eval()
    assert_same_without_gradient(teacher_of(tower)(images()), tower(images()))


def test_a_text_tower_whose_weights_are_buffers_gives_the_same_tokens() -> None:
    values = cookie_case.MODEL["text"]
    tower = TextEncoder(TextConfig.model_validate(values), cookie_case.VOCABULARY).double().eval()
    texts = cookie_case.texts(3, 7, torch.Generator().manual_seed(1))
    texts.mask[1, 4:] = 0
    assert_same_without_gradient(teacher_of(tower)(texts), tower(texts))


def assert_same_without_gradient(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float64
    assert theirs.requires_grad
    assert not ours.requires_grad
    assert torch.equal(ours, theirs)


def changed_card(directory: Path, **changed: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_directory_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vision: .*config\.json: cannot be read.* HF directory"):
        encoder(weights=tmp_path)
    local_tower(tmp_path)
    with pytest.raises(ValueError, match=r"layers is 2, but the recipe's model\.vision\.layers is 3; set it"):
        encoder(weights=tmp_path, layers=3)
    for key, value, told in (
        ("model_type", "siglip", r"model_type is 'siglip'; only 'clip' and 'clip_vision_model' are read"),
        ("num_channels", 4, "num_channels is 4; only 3 is supported"),
        ("layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06; only 1e-05 is supported"),
        ("hidden_act", "relu", "hidden_act is 'relu'; only quick_gelu and gelu are read"),
        ("patch_size", [8, 8], r"patch_size is \[8, 8\]; it must be like 32"),
    ):
        good = (tmp_path / "config.json").read_text()
        changed_card(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=rf"model\.vision: {tmp_path}/config\.json: {told}"):
            encoder(weights=tmp_path)
        (tmp_path / "config.json").write_text(good)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds no JSON object"):
        read_sizes(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    local_tower(tmp_path)
    path = tmp_path / "model.safetensors"
    good = safetensors.torch.load_file(path)

    def read_again(state: dict[str, Tensor]) -> None:
        safetensors.torch.save_file(state, path)
        encoder(weights=tmp_path)

    with pytest.raises(ValueError, match=r"missing post_layernorm\.bias; unexpected odd"):
        read_again({("odd" if k == "post_layernorm.bias" else k): v for k, v in good.items()})
    with pytest.raises(ValueError, match=r"position_embedding\.weight: has the shape \(16, 16\), which"):
        read_again(good | {"embeddings.position_embedding.weight": torch.zeros(16, 16)})
    with pytest.raises(ValueError, match=r"pre_layrnorm\.bias has the shape \(3,\), but"):
        read_again(good | {"pre_layrnorm.bias": torch.zeros(3)})
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        encoder(weights=tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.vision\.weights: .* has neither model\.safetensors nor"):
        encoder(weights=tmp_path)
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")  # a pickled class
    with pytest.raises(ValueError, match="cannot be read as weights"):
        encoder(weights=tmp_path)


def test_the_config_says_what_is_wrong(tmp_path: Path) -> None:
    def check(message: str, **values: Any) -> None:
        with pytest.raises(ValidationError, match=message):
            ClipVisionConfig.model_validate({"tower": "clip"} | values)

    check("'vit_b16' is not a preset; allowed: clip_vit_b16, .*, or null with sizes", name="vit_b16")
    check("width: 512, but clip_vit_b16 has 768; leave it out", name="clip_vit_b16", width=512)
    check("heads: 3 does not divide width, 16", **SIZES | {"heads": 3})
    check("image_px: 30 is no whole number of patches of 8 px; say 24 or 32", **SIZES, image_px=30)
    check("image_px: 4 is no .* of 8 px; say 8", **SIZES, image_px=4)
    local_clip(tmp_path)
    told = r"for this CLIP say \{layers: 2, width: 16, .*patch_px: 8, hidden_act: quick_gelu, weights: .*\}"
    check(r"name: .* is a directory, not a preset; " + told, name=str(tmp_path))
    check(r"layers: missing; " + told, weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"images of 16x16 px; model\.vision\.image_px is 32"):
        encoder()(images(px=16))


def test_presets_have_the_papers_sizes() -> None:
    """Parameters of the towers of Radford et al. 2021, App. F, without the projection; tokens at 224 px."""
    found = {}
    for name in ("clip_vit_b16", "clip_vit_b32", "clip_vit_l14"):
        with torch.device("meta"):
            tower = ClipVisionEncoder(ClipVisionConfig.model_validate({"tower": "clip", "name": name}))
        found[name] = (sum(p.numel() for p in tower.parameters()), tower.tokens, tower.width)
    assert found["clip_vit_b16"] == (85_799_424, 197, 768)
    assert found["clip_vit_b32"] == (87_456_000, 50, 768)
    assert found["clip_vit_l14"] == (303_179_776, 257, 1024)


RECIPE = """
name: real
model:
  method: clip
  vision: {tower: clip, name: clip_vit_b16}
  text: {layers: 1, width: 32, heads: 2, intermediate: 64}
stages:
  shard: {kind: tests.tiny.numbers}
  train:
    kind: pretrain
    inputs: {corpus: shard}
    model: "${model}"
    losses: {ccl: 1}
    contrastive_batch: 8
    epochs: 1
    optimizer: {learning_rate: 1.0e-3}
    deepspeed: zero0.json
"""


def test_a_recipe_names_the_kind_of_tower_and_mistakes_are_of_that_kind(tmp_path: Path) -> None:
    path = tmp_path / "real.yaml"
    path.write_text(RECIPE)
    stage: Any = load(path).stages["train"]
    assert isinstance(methods.parse_config(stage.model).vision, ClipVisionConfig)  # type: ignore[attr-defined]

    def told(override: str) -> str:
        with pytest.raises(StageError) as raised:
            load(path, [override])
        return str(raised.value)

    misspelt = told("model.vision.image_pix=32")
    assert "stages.train.model.vision.image_pix" in misspelt
    assert "did you mean 'image_px'?; allowed: tower, name, layers" in misspelt
    assert "model.vision.image_px (written as model.vision.image_px): 'big'" in told(
        "model.vision.image_px=big"
    )
    kind = told("model.vision.tower=clpi")
    assert "stages.train.model.vision.tower (written as model.vision.tower): 'clpi' is not a kind" in kind
    assert "allowed: timm, clip; did you mean 'clip'?" in kind
    assert "model.vision.image_px" in told("model.vision.image_px=225")
    assert "'clip_vit_b61' is not a preset" in told("model.vision.name=clip_vit_b61")
    path.write_text(RECIPE.replace("tower: clip, name: clip_vit_b16", "name: resnet10t"))
    assert "allowed: tower, name, weights, key_order" in told("model.vision.patch_px=3")


def test_timm_is_the_kind_that_needs_no_name_and_is_not_written_out() -> None:
    """So that models that were saved before there were kinds load, and new ones are written the same."""
    values = {"method": "clip", "text": cookie_case.MODEL["text"]}
    plain, named = (
        methods.parse_config(values | {"vision": {"name": "test_resnet", "image_px": 64} | kind})
        for kind in ({}, {"tower": "timm"})
    )
    assert plain == named
    assert isinstance(plain.vision, VisionConfig)  # type: ignore[attr-defined]
    dumped = plain.model_dump(mode="json")
    assert "tower" not in dumped["vision"]
    assert methods.parse_config(dumped) == plain
    assert isinstance(make_vision(plain.vision), VisionEncoder)  # type: ignore[attr-defined]


def test_a_saved_model_needs_the_directory_no_more(tmp_path: Path) -> None:
    weights = tmp_path / "hf"
    local_clip(weights)
    tokenizer = tiny_model.tokenizer()
    values = {
        "method": "clip",
        "text": cookie_case.MODEL["text"],
        "vision": TOWER | {"weights": str(weights)},
    }
    config: Any = methods.parse_config(values)
    method = methods.build(config, ("ccl",), tokenizer.vocabulary_size).eval()
    transform = ImageTransform(PX, config.vision.mean, config.vision.std)
    out = tmp_path / "stage" / "out"
    model_files.save(out, method, values, ("ccl",), tokenizer, transform=transform, max_length=9)
    (weights / "model.safetensors").unlink()
    loaded = model_files.load(out)
    assert loaded.model_config["vision"]["tower"] == "clip"
    torch.testing.assert_close(loaded.method.embed_images(images()), method.embed_images(images()))
    assert loaded.embed_texts(["red thing 1", "blue"]).shape == (2, 512)
