"""Fusion, pooling, batch norm and the towers: against plain float64 references, and given wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from learning.encoders.batch_norm import GlobalBatchNorm2d, make_global
from learning.encoders.fusion import FullyConnected, TransformerEncoder
from learning.encoders.pooling import GeneralizedPooling, make_pooling
from learning.encoders.text import TextConfig, TextEncoder, read_sizes
from learning.encoders.vision import VisionConfig, VisionEncoder
from learning.methods.base import Texts
from tests import reference

SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "intermediate": 32, "dropout": 0.0}


def state_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.named_parameters()}


def roughened(module: nn.Module, seed: int = 0) -> nn.Module:
    """float64, no parameter at its special start (0 biases, 1 scales), so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data + 0.3 * noise
    return module


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=1e-8, atol=1e-10, msg=lambda text, n=number: f"tensor {n}: {text}"
        )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_transformer_encoder_equals_the_reference(layers: int, activation: Any) -> None:
    encoder = roughened(TransformerEncoder(layers, 8, 2, 12, dropout=0.0, activation=activation))
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    weights = torch.randn(2, 4, 8, dtype=torch.float64) * mask[..., None]
    names = state_of(encoder, "e")
    loss = (encoder(x, mask) * weights).sum()
    rows = [reference.encoder(x[i, : mask[i].sum()], names, "e", layers, 2, activation) for i in range(2)]
    expected = sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(rows))
    assert isinstance(expected, Tensor)
    inputs = [x, *names.values()]
    assert_same([loss, *gradients(loss, inputs)], [expected, *gradients(expected, inputs)])


def test_a_token_of_padding_changes_no_other() -> None:
    encoder = roughened(TransformerEncoder(2, 8, 2, 12, dropout=0.0))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    changed = x.clone()
    changed[:, 3:] = 100.0
    alone = encoder(x[:, :3], None)
    assert_same([encoder(x, mask)[:, :3], encoder(changed, mask)[:, :3]], [alone, alone])


def test_dropout_acts_in_training_alone() -> None:
    encoder = TransformerEncoder(1, 8, 2, 12, dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_fully_connected_equals_the_reference() -> None:
    layers = roughened(FullyConnected(2, 6))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    names = state_of(layers, "f")
    loss = layers(x[None]).square().sum()
    expected = reference.fully_connected(x, names, "f", 2).square().sum()
    inputs = [x, *names.values()]
    assert_same([loss, *gradients(loss, inputs)], [expected, *gradients(expected, inputs)])


def test_heads_must_divide_the_dimension() -> None:
    with pytest.raises(ValueError, match="heads: 3 does not divide"):
        TransformerEncoder(1, 8, 3, 8)


@pytest.mark.parametrize("kind", ["max", "mean", "gpo", "first"])
def test_pooling_equals_the_reference(kind: Any) -> None:
    torch.manual_seed(0)
    pooling = make_pooling(kind).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    counts = [5, 2, 1, 2]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in counts])
    names = state_of(pooling, "p")
    loss = (pooling(x, mask) ** 3).sum()
    rows = [reference.pooled(x[i, :n], kind, names, "p") for i, n in enumerate(counts)]
    expected = (torch.stack(rows) ** 3).sum()
    inputs = [x, *names.values()]
    assert_same([loss, *gradients(loss, inputs)], [expected, *gradients(expected, inputs)])
    whole = torch.ones(4, 5, dtype=torch.long)
    assert_same([pooling(x, None)], [pooling(x, whole)])


@pytest.mark.parametrize("kind", ["max", "mean", "gpo", "first"])
def test_pooling_ignores_padding_that_is_larger_than_every_token(kind: Any) -> None:
    pooling = make_pooling(kind)
    x = -torch.rand(2, 4, 3) - 1
    x[0, 2:], x[1, 3:] = 9.0, float("inf")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    if kind == "mean":  # a weight of 0 does not stop an infinity
        x[1, 3:] = 9.0
    for row, count in ((0, 2), (1, 3)):
        alone = pooling(x[row : row + 1, :count], None)
        torch.testing.assert_close(pooling(x, mask)[row : row + 1], alone)


def test_gpo_weights_are_a_distribution_over_the_ranks() -> None:
    weights = GeneralizedPooling().weights(torch.tensor([1, 3, 6]), torch.zeros(1))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert weights[0, 0].item() == 1.0
    assert bool((weights[1, 3:] == 0).all())


def test_global_batch_norm_on_one_rank_is_batch_norm() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet", num_classes=0, global_pool="")
    joined = timm.create_model("test_efficientnet", num_classes=0, global_pool="")
    joined.load_state_dict(plain.state_dict())
    make_global(joined)
    assert sum(isinstance(part, GlobalBatchNorm2d) for part in joined.modules()) > 5
    assert list(joined.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 3, 64, 64)
    for mode in (True, False):
        plain.train(mode)
        joined.train(mode)
        torch.testing.assert_close(plain(x), joined(x))


def test_global_batch_norm_statistics_equal_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arithmetic, with two ranks' worth of rows given by one process."""
    torch.manual_seed(0)
    plain = roughened(nn.BatchNorm2d(3))
    assert isinstance(plain, nn.BatchNorm2d)
    ours = GlobalBatchNorm2d(nn.BatchNorm2d(3)).double()
    ours.load_state_dict(plain.state_dict())
    monkeypatch.setattr("learning.encoders.batch_norm.world_size", lambda: 2)
    monkeypatch.setattr("learning.encoders.batch_norm.gather", lambda x: torch.cat([x, x]))
    x = (torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 7).requires_grad_()
    weights = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    twice = torch.cat([x, x])
    expected_out = plain(twice)
    expected = (expected_out * torch.cat([weights, weights])).sum() / 2
    loss = (ours(x) * weights).sum()
    assert_same([loss], [expected])
    assert_same(gradients(loss, [x, ours.weight]), gradients(expected, [x, plain.weight]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("test_resnet", 4),
        ("test_efficientnet", 4),
        ("test_convnext", 4),
        ("test_vit", 17),
        ("test_maxvit", 4),
    ],
)
def test_any_backbone_gives_its_tokens_and_trains_every_parameter(name: str, tokens: int) -> None:
    encoder = VisionEncoder(VisionConfig(name=name, image_px=64))
    out = encoder(torch.randn(4, 3, 64, 64))
    assert out.shape == (4, encoder.tokens, encoder.width)
    assert encoder.tokens == tokens
    (out * torch.randn_like(out)).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def test_tokens_of_a_map_go_row_by_row() -> None:
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=96)).eval()
    images = torch.randn(1, 3, 96, 96)
    grid = encoder.backbone(images)
    flat = encoder(images)
    assert grid.shape[2:] == (3, 3)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(flat[0, row * 3 + column], grid[0, :, row, column])


def test_levels_stand_beside_the_last_map_and_the_grid_averages() -> None:
    tower = VisionEncoder(
        VisionConfig(name="tf_efficientnet_lite0", image_px=64, levels=(3, 4), grid=1)
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    found = tower(images)
    assert (tower.tokens, tower.width) == (1, 1280 + 4 * 112 + 320) == found.shape[1:]
    maps: dict[str, Tensor] = {}
    net: Any = tower.backbone
    handles = [
        net.blocks[i].register_forward_hook(lambda _, __, out, i=i: maps.update({f"{i}": out}))
        for i in (4, 6)
    ]
    last = net(images)
    for handle in handles:
        handle.remove()
    normal = torch.nn.functional.layer_norm
    for row in range(2):
        cells = []
        for y in range(2):
            for x in range(2):
                finer = torch.stack(
                    [maps["4"][row, :, 2 * y + dy, 2 * x + dx] for dy in (0, 1) for dx in (0, 1)], dim=1
                ).flatten()
                parts = [last[row, :, y, x], normal(finer, (448,)), normal(maps["6"][row, :, y, x], (320,))]
                cells.append(torch.cat(parts))
        torch.testing.assert_close(found[row, 0], torch.stack(cells).mean(0))
    whole = VisionEncoder(VisionConfig(name="tf_efficientnet_lite0", image_px=64, levels=(4,)))
    assert (whole.tokens, whole.width) == (4, 1600)


def test_levels_that_a_model_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vision\.levels: resnet10t does not give the maps \[9\]"):
        VisionEncoder(VisionConfig(name="resnet10t", image_px=64, levels=(9,)))
    with pytest.raises(ValueError, match=r"are for CNNs; vit_tiny_patch16_224 has no map"):
        VisionEncoder(VisionConfig(name="vit_tiny_patch16_224", image_px=64, grid=2))


def test_a_backbone_with_channels_last_is_read_row_by_row_too() -> None:
    options = {"name": "swin_tiny_patch4_window7_224", "image_px": 224}
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(**options))
    assert (encoder.tokens, encoder.width) == (49, 768)


def test_output_stride_gives_more_tokens() -> None:
    with torch.device("meta"):
        few = VisionEncoder(VisionConfig(name="resnet10t", image_px=64))
        many = VisionEncoder(VisionConfig(name="resnet10t", image_px=64, output_stride=16))
    assert (few.tokens, many.tokens) == (4, 16)


def test_the_papers_backbone_gives_the_papers_tokens() -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(name="resnext101_32x8d", image_px=512))
    assert (encoder.tokens, encoder.width) == (256, 2048)


def test_an_unknown_backbone_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet51' is not a timm model; near it: .*resnet5"):
        VisionEncoder(VisionConfig(name="resnet51", image_px=64))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 32x32 px; model\.vision\.image_px is 64"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64))(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_vision_weights_come_from_a_file_with_its_classifier_left_out(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(whole.state_dict(), path)
    else:
        torch.save({"state_dict": whole.state_dict()}, path)
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path)).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = whole.eval().forward_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images), expected)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    good = timm.create_model("test_resnet", num_classes=0, global_pool="").state_dict()
    first, second, *_ = good

    def load(state: dict[str, Tensor], **options: Any) -> None:
        safetensors.torch.save_file(state, path)
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path, **options))

    with pytest.raises(ValueError, match=rf"{path}: does not fit .* missing {first}; unexpected odd"):
        load({("odd" if name == first else name): value for name, value in good.items()})
    with pytest.raises(ValueError, match=rf"{second} has the shape \(1,\), but {second} in the model"):
        load(good | {second: torch.zeros(1)})
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path))
    with pytest.raises(ValueError, match=r"model\.vision\.weights: .*no such file"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=tmp_path / "none.pth"))


def test_a_weights_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": nn.Linear(2, 2)}, path)  # a pickled class
    with pytest.raises(ValueError, match="cannot be read as weights"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path))


def test_key_order_fits_a_file_under_other_names_and_checks_shapes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole = timm.create_model("test_resnet", num_classes=7).state_dict()
    renamed = {f"_layer{number:04d}": value for number, value in enumerate(whole.values())}
    renamed = {name: value for name, value in renamed.items() if value.ndim}  # without counters
    path = tmp_path / "w.pth"
    torch.save(renamed, path)
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path, key_order=True))
    for name, value in encoder.backbone.state_dict().items():
        torch.testing.assert_close(value, whole[name])
    torch.save(renamed | {"_layer0000": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"_layer0000 has the shape .* but conv1\.0\.weight in the model"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path, key_order=True))
    torch.save(dict(list(renamed.items())[:-3]), path)
    with pytest.raises(ValueError, match="not the same model under other names"):
        VisionEncoder(VisionConfig(name="test_resnet", image_px=64, weights=path, key_order=True))


def test_frozen_statistics_stay_while_scale_and_shift_learn() -> None:
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=64, batch_norm="frozen")).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(torch.randn(4, 3, 64, 64)).sum().backward()
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_frozen_backbone_keeps_everything() -> None:
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=64, trainable=False)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    out = encoder(torch.randn(4, 3, 64, 64))
    assert not out.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.backbone.training


def texts(*rows: list[int]) -> Texts:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return Texts(ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]))


def test_text_ignores_padding_and_trains_every_parameter() -> None:
    encoder = TextEncoder(TextConfig(**SIZES), 40).double()
    batch = texts([2, 7, 8, 3], [2, 9, 3])
    out = encoder(batch)
    alone = encoder(texts([2, 9, 3]))
    torch.testing.assert_close(out[1, :3], alone[0])
    changed = Texts(batch.ids.masked_fill(batch.mask == 0, 31), batch.mask)
    torch.testing.assert_close(encoder(changed)[1, :3], alone[0])
    out.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def local_bert(directory: Path, **changed: Any) -> BertModel:
    torch.manual_seed(3)
    options = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**options, intermediate_size=32, max_position_embeddings=20, **changed))
    bert.save_pretrained(directory)
    return bert.eval()


def test_a_local_bert_gives_sizes_and_weights(tmp_path: Path) -> None:
    bert = local_bert(tmp_path)
    sizes = read_sizes(tmp_path)
    assert sizes == {"layers": 2, "width": 16, "heads": 2, "intermediate": 32, "positions": 20, "segments": 2}
    config = TextConfig(**sizes, max_length=12, weights=tmp_path)
    encoder = TextEncoder(config, 40).eval()
    batch = texts([2, 7, 8, 3], [2, 9, 3])
    expected = bert(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    torch.testing.assert_close(
        encoder(batch)[batch.mask == 1], expected[batch.mask == 1], atol=1e-5, rtol=1e-5
    )
    # a saved model is built without the directory
    again = TextConfig.model_validate(config.model_dump() | {"weights": None})
    TextEncoder(again, 40).load_state_dict(encoder.state_dict())


def test_a_local_bert_that_does_not_fit_is_named(tmp_path: Path) -> None:
    local_bert(tmp_path)
    told = r"for this BERT say \{layers: 2, width: 16, heads: 2, .*, weights: .*\}"
    with pytest.raises(ValidationError, match=r"name: .* is a directory, not a preset; " + told):
        TextConfig.model_validate({"name": str(tmp_path), "max_length": 12})
    with pytest.raises(ValidationError, match=r"layers: missing; " + told):
        TextConfig.model_validate({"weights": str(tmp_path), "max_length": 12})
    with pytest.raises(ValueError, match=r"layers is 2, but the recipe's model\.text\.layers is 3"):
        TextEncoder(TextConfig(**SIZES | {"layers": 3, "positions": 20}, max_length=12, weights=tmp_path), 40)
    fitting = TextConfig(**SIZES | {"positions": 20}, max_length=12, weights=tmp_path)
    with pytest.raises(ValueError, match="BERT knows 40 tokens, the vocabulary has 41"):
        TextEncoder(fitting, 41)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "layer.1" in name)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit the model: missing .*{name.removeprefix('bert.')}"):
        TextEncoder(fitting, 40)
    card = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(card | {"model_type": "roberta"}))
    with pytest.raises(ValueError, match="model_type is 'roberta'; only 'bert' is read"):
        TextEncoder(fitting, 40)


def test_text_config_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'bert_huge' is not a preset; allowed: bert_base"):
        TextConfig.model_validate({"name": "bert_huge"})
    with pytest.raises(ValidationError, match="width: 512, but bert_base has 768"):
        TextConfig.model_validate({"name": "bert_base", "width": 512})
    with pytest.raises(ValidationError, match="heads: 3 does not divide width, 16"):
        TextConfig(**SIZES | {"heads": 3})
    with pytest.raises(ValidationError, match="max_length: 50 is over positions, 20"):
        TextConfig(**SIZES, positions=20)
    assert TextConfig.model_validate({"name": "bert_base"}).layers == 12
    with pytest.raises(ValueError, match="texts of 6 tokens"):
        TextEncoder(TextConfig(**SIZES, positions=5, max_length=5), 9)(texts([2, 4, 4, 4, 4, 3]))


def test_frozen_parts_keep_weights_and_statistics_while_the_rest_learns():
    config = VisionConfig(name="test_efficientnet", image_px=64, frozen=("conv_stem", "bn1", "blocks.0"))
    encoder = VisionEncoder(config).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    for name, value in encoder.state_dict().items():
        frozen = name.startswith(("backbone.conv_stem.", "backbone.bn1.", "backbone.blocks.0."))
        if frozen:
            assert torch.equal(value, before[name]), name
        elif name.endswith(("running_mean", "weight")):
            assert not torch.equal(value, before[name]), name


def test_an_unknown_frozen_part_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"model\.vision\.frozen: .* no part 'block'; it has conv_stem"):
        VisionEncoder(VisionConfig(name="test_efficientnet", image_px=64, frozen=("block",)))
