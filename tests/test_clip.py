"""The baseline with [CLS] as it is: pooled by the first token, and no projection."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from learning import methods
from learning.methods.base import Batch, Texts

MODEL: dict[str, Any] = {
    "method": "clip",
    "vision": {
        "name": "vit_tiny_patch16_224",
        "vit": {"patch_px": 8, "layers": 1, "width": 16, "heads": 2},
        "image_px": 16,
    },
    "text": {"layers": 1, "width": 16, "heads": 2, "intermediate": 16, "max_length": 8, "dropout": 0.0},
    "dimension": None,
    "pooling": "first",
    "temperature": {"initial": 0.05},
}


def build(**changed: Any) -> Any:
    torch.manual_seed(0)
    return methods.build(methods.parse_config(MODEL | changed), ("ccl",), 20)


def test_without_a_projection_cls_is_the_embedding() -> None:
    """And all that learns is in the towers: a method that reads [CLS] takes them over whole."""
    method = build().eval()
    images, ids = torch.randn(3, 3, 16, 16), torch.randint(5, 20, (3, 6))
    texts = Texts(ids, torch.ones_like(ids))
    towers = (method.vision(images)[:, 0], method.text(texts)[:, 0])
    torch.testing.assert_close(method.embed_images(images), F.normalize(towers[0], dim=1))
    torch.testing.assert_close(method.embed_texts(texts), F.normalize(towers[1], dim=1))
    assert set(method.parts()) == {"vision", "text"}
    method.train()(Batch({"image": images}, {"text": texts}, ["a", "b", "c"])).losses["ccl"].backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_without_a_projection_the_towers_are_equally_wide() -> None:
    with pytest.raises(ValueError, match=r"model\.dimension: null: .* is 16 wide and the text tower 8"):
        build(text={**MODEL["text"], "width": 8})
    assert build(text={**MODEL["text"], "width": 8}, dimension=4).fusion["text"].projection.out_features == 4
