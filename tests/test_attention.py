"""Fused attention against the plain one; the layout of a CNN's maps; what frozen towers cost."""

import math
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from learning.encoders.text import TextConfig, TextEncoder
from learning.encoders.vision import VisionConfig, VisionEncoder
from learning.training import distributed
from learning.training.engine import Engine
from learning.training.rates import OptimizerConfig
from learning.training.scale import MOMENTS
from tests import cookie_case

BERT: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "intermediate": 24, "positions": 12,
                        "max_length": 9, "dropout": 0.0}  # fmt: skip


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda told, name=name: f"{name}: {told}")


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """softmax(Q Kᵀ / √d) V with the mask (Vaswani et al. 2017, Eq. 1); nothing else may be asked for."""
    assert not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1) @ value


def test_text_attention_is_fused_and_equals_the_plain_one_with_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(**BERT), 40).double()
    assert encoder.bert.config._attn_implementation == "sdpa"
    texts = cookie_case.texts(3, 7, torch.Generator().manual_seed(1))
    texts.mask[1, 4:] = 0
    told, masks = [], []

    def plain(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs["attn_mask"])
        return plain_attention(*args, **kwargs)

    for kernel in (nn.functional.scaled_dot_product_attention, plain):
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kernel)
        encoder.zero_grad()
        out = encoder(texts) * texts.mask[..., None]
        (out.square() * torch.arange(16)).sum().backward()
        told.append((out.detach(), gradients(encoder)))
    assert len(masks) == 2  # a layer
    assert all(mask is not None for mask in masks)
    torch.testing.assert_close(told[0][0], told[1][0])
    assert_close(told[0][1], told[1][1])


def test_vit_attention_is_fused_and_equals_the_plain_one() -> None:
    config = VisionConfig(name="test_vit", image_px=64)
    torch.manual_seed(0)
    fused, plain = (VisionEncoder(config).double() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    layers = [module for module in fused.modules() if isinstance(module, Attention)]
    assert len(layers) == 6
    assert all(layer.fused_attn for layer in layers)
    for module in plain.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    told = []
    for encoder in (fused, plain):
        out = encoder(images)
        (out.square() * torch.arange(out.shape[2])).sum().backward()
        told.append(out.detach())
    torch.testing.assert_close(told[0], told[1])
    assert_close(gradients(fused), gradients(plain))


def test_the_maps_of_a_cnn_are_channels_last_whatever_the_weights_are() -> None:
    """DeepSpeed's flat buffers give contiguous weights back; the images' layout alone must carry it."""
    encoder = VisionEncoder(VisionConfig(name="test_resnet", image_px=64))
    layouts = []

    def noted(module: nn.Module, inputs: Any, out: Tensor) -> None:
        layouts.append(out.is_contiguous(memory_format=torch.channels_last))

    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        assert module.weight.is_contiguous()
        module.register_forward_hook(noted)
    encoder(torch.randn(2, 3, 64, 64))
    assert layouts == [True] * len(convolutions)


def test_frozen_towers_cost_no_optimizer_state_and_no_gradient() -> None:
    """An engine on one rank: AdamW's moments are those of the rest, and so is the checkpoint's size."""
    text = cookie_case.MODEL["text"] | {"trainable": False}
    method = cookie_case.build(("ccl",), vision__trainable=False, text=text).float()
    rest = sum(p.numel() for n, p in method.named_parameters() if n.startswith(("fusion.", "temperature.")))
    whole = sum(p.numel() for p in method.parameters())
    batch = cookie_case.batch(method)
    distributed.init()
    try:
        engine = Engine(method, {"ccl": 1.0}, OptimizerConfig(learning_rate=1e-3), {}, batch_per_gpu=4)
        engine.step(batch, 1.0)
        size = engine.state_bytes()
        engine.close()
    finally:
        distributed.shutdown()
    assert not any(p.requires_grad for tower in (method.vision, method.text) for p in tower.parameters())
    assert all(p.grad is None for tower in (method.vision, method.text) for p in tower.parameters())
    moments = [
        value
        for state in engine._optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(value.nbytes for value in moments) == MOMENTS * rest
    buffers = sum(b.nbytes for b in method.buffers())  # running statistics
    assert buffers > 0
    assert size == 4 * whole + MOMENTS * rest + buffers
