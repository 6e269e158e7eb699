"""Image towers of patches: embeddings hidden before positions, tables of positions at another size."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from learning.encoders.clip_vision import ClipVisionConfig
from learning.encoders.image_tower import ImageTower, PatchGrid
from learning.encoders.towers import VisionTower, make_vision
from learning.encoders.vision import VisionConfig, VisionEncoder

SIZES = {"patch_px": 8, "layers": 2, "width": 16, "heads": 2}
CLIP = {"tower": "clip", "image_px": 32, "intermediate": 24, "hidden_act": "gelu", "trainable": True} | SIZES
# timm's test_vit gives a map of patches, which takes any size; vit_tiny a list
TIMM = {name: {"name": name, "image_px": 32, "vit": SIZES} for name in ("test_vit", "vit_tiny_patch16_224")}
TOWERS: dict[str, dict[str, Any]] = {"clip": CLIP} | TIMM


def tower(name: str, px: int = 32, seed: int = 0, **changed: Any) -> ImageTower:
    torch.manual_seed(seed)
    values = TOWERS[name] | {"image_px": px} | changed
    kind: VisionTower = (
        ClipVisionConfig.model_validate(values) if name == "clip" else VisionConfig.model_validate(values)
    )
    return make_vision(kind).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_hidden_patches_are_replaced_before_positions(name: str) -> None:
    """In the order of the tokens: row by row. What is hidden leaves no trace of its pixels."""
    made = tower(name)
    assert made.patch_grid() == PatchGrid(1, True, 4, 8)
    images = torch.randn(2, 3, 32, 32)
    plain = made(images)
    assert torch.equal(made(images, lambda patches: patches), plain)
    seen: list[Tensor] = []

    def hide(patches: Tensor) -> Tensor:
        seen.append(patches)
        return torch.cat([patches[:, :6], torch.ones_like(patches[:, 6:7]), patches[:, 7:]], dim=1)

    hidden = made(images, hide)
    assert seen[0].shape == (2, 16, 16)
    other = images.clone()
    other[:, :, 8:16, 16:24] += 1  # patch 6: second row, third column
    assert not torch.equal(made(other), plain)
    assert torch.equal(made(other, hide), hidden)
    other[:, :, 8:16, 8:16] += 1
    assert not torch.equal(made(other, hide), hidden)
    assert torch.equal(made(images), plain)  # nothing stays behind


def test_towers_without_patches_hide_none() -> None:
    made = VisionEncoder(VisionConfig(name="test_resnet", image_px=32))
    with pytest.raises(ValueError, match="test_resnet keeps no token for each of its patches; choose a ViT"):
        made(torch.randn(1, 3, 32, 32), lambda patches: patches)


@pytest.mark.parametrize("name", TIMM)
def test_a_vit_at_another_size_has_its_positions_interpolated(name: str) -> None:
    """As timm itself does it in a forward of another size; [CLS]'s own is kept. 224 to 336 px is 14 to 21."""
    small, large = tower(name), tower(name, px=48, seed=1)
    assert (small.tokens, large.tokens) == (17, 37)
    large.load_state_dict(large.fitted(small.state_dict()))
    plain: Any = timm.create_model(
        name, num_classes=0, global_pool="", img_size=32, dynamic_img_size=True, patch_size=8, depth=2,
        embed_dim=16, num_heads=2,
    ).eval()  # fmt: skip
    plain.load_state_dict(small.backbone.state_dict())
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(large(images), plain(images))
    tables = [made.state_dict()["backbone.pos_embed"] for made in (small, large)]
    assert torch.equal(tables[0][:, 0], tables[1][:, 0])
    same = small.fitted(small.state_dict())
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in same.items())


def test_weights_of_a_file_are_interpolated_too(tmp_path: Path) -> None:
    small = tower("test_vit")
    save_file({k: v.clone() for k, v in small.backbone.state_dict().items()}, tmp_path / "vit.safetensors")
    large = tower("test_vit", px=48, weights=tmp_path / "vit.safetensors")
    expected = tower("test_vit", px=48)
    expected.load_state_dict(expected.fitted(small.state_dict()))
    assert all(torch.equal(value, large.state_dict()[key]) for key, value in expected.state_dict().items())


def test_what_is_no_table_of_positions_is_left_to_the_check_of_shapes() -> None:
    made = tower("test_vit")
    for shape in ((1, 15, 16), (1, 1, 16), (17, 16)):
        odd = {"backbone.pos_embed": torch.zeros(shape)}
        assert made.fitted(odd)["backbone.pos_embed"].shape == shape


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vit": SIZES | {"heads": 3}}, "heads: 3 does not divide width, 16"),
        ({"name": "test_resnet"}, "timm cannot make test_resnet .* output_stride and vit"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoder(VisionConfig.model_validate(TIMM["test_vit"] | changed))
