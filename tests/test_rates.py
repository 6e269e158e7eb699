"""Rates by part and by layer: of known layers of a ViT, a ResNet, an EfficientNet and a BERT."""

from typing import Any

import pytest
import torch

from learning import methods
from learning.methods.base import Method
from learning.training.rates import OptimizerConfig, parameter_groups
from tests.training_case import TinyMethod


def clip(vision: str, layers: int = 3, **changed: Any) -> Method:
    values = {
        "method": "clip",
        "vision": {"name": vision, "image_px": 32} | changed,
        "text": {"layers": layers, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
        "dimension": 16,
    }
    with torch.device("meta"):
        return methods.build(methods.parse_config(values), ("ccl",), 60)


def rates(method: Method, **options: Any) -> dict[str, float]:
    groups = parameter_groups(method, OptimizerConfig(learning_rate=1.0, **options))
    names = {id(p): name for name, p in method.named_parameters()}
    assert all(group["lr"] == group["base_lr"] for group in groups)
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        (  # the stem, six blocks; the norm after them is with the last
            "test_vit",
            {"cls_token": 6, "patch_embed.proj.weight": 6, "blocks.0.attn.qkv.weight": 5,
             "blocks.4.mlp.fc1.bias": 1, "blocks.5.norm1.weight": 0, "norm.weight": 0},
        ),
        (
            "resnet10t",
            {"conv1.0.weight": 4, "bn1.weight": 4, "layer1.0.conv1.weight": 3, "layer4.0.bn2.bias": 0},
        ),
        (
            "tf_efficientnet_lite0",
            {"conv_stem.weight": 16, "blocks.0.0.bn1.weight": 15, "blocks.1.1.conv_pw.weight": 13,
             "blocks.6.0.conv_pw.weight": 0, "conv_head.weight": 0},
        ),
    ],
)  # fmt: skip
def test_vision_rates_fall_by_layer(vision: str, expected: dict[str, int]) -> None:
    told = rates(clip(vision), layer_decay={"vision": 0.5}, lr_scale={"vision": 0.1})
    for name, below in expected.items():
        assert told[f"vision.backbone.{name}"] == pytest.approx(0.1 * 0.5**below), name
    assert {rate for name, rate in told.items() if not name.startswith("vision.")} == {1.0}


def test_text_rates_fall_by_layer() -> None:
    told = rates(clip("test_vit"), layer_decay={"text": 0.9})
    assert told["text.bert.embeddings.word_embeddings.weight"] == pytest.approx(0.9**3)
    assert told["text.bert.encoder.layer.0.attention.self.query.weight"] == pytest.approx(0.9**2)
    assert told["text.bert.encoder.layer.2.output.dense.bias"] == 1.0
    assert told["vision.backbone.cls_token"] == 1.0


def test_frozen_layers_count_and_get_no_group() -> None:
    method = clip("resnet10t", frozen=("conv1", "bn1", "layer4"))
    told = rates(method, layer_decay={"vision": 0.5})
    assert told["vision.backbone.layer3.0.conv1.weight"] == 0.5
    assert not any("layer4" in name or "backbone.conv1" in name for name in told)


def test_the_order_of_groups_is_the_same_for_a_model_built_again() -> None:
    def told() -> list[Any]:
        method = clip("test_vit")
        names = {id(p): name for name, p in method.named_parameters()}
        config = OptimizerConfig(learning_rate=1.0, layer_decay={"vision": 0.7, "text": 0.9})
        return [
            (g["part"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]])
            for g in parameter_groups(method, config)
        ]

    first = told()
    assert first == told()
    assert len(first) > 2 * (7 + 4)  # a ViT of a stem and six layers, a BERT of embeddings and three
    assert [part for part, *_ in first] == sorted((part for part, *_ in first), key=["vision", "text",
                                                  "fusion", "temperature"].index)  # fmt: skip


def test_a_decay_of_1_leaves_every_rate() -> None:
    assert set(rates(clip("test_vit"), layer_decay={"vision": 1.0}).values()) == {1.0}


@pytest.mark.parametrize(
    ("method", "decay", "message"),
    [
        (clip("test_vit"), {"visoin": 0.5}, "layer_decay: visoin is no trainable part .* vision, text"),
        (clip("test_vit"), {"fusion": 0.5}, "fusion is not one encoder of layers .* are: vision, text"),
        (TinyMethod(), {"text": 0.5}, "text is not one encoder of layers in order; those that are: none"),
    ],
)  # fmt: skip
def test_a_part_without_layers_is_refused(method: Method, decay: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(method, layer_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_a_decay_is_above_0_and_at_most_1(decay: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay\.vision"):
        OptimizerConfig(learning_rate=1.0, layer_decay={"vision": decay})
