"""Regions by a Faster R-CNN and by a grid, against the models' own outputs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_tools.pictures import EncodedPicture
from learning.encoders.region_detector import DetectorConfig, RegionDetector, best_regions
from learning.encoders.region_grid import GridConfig, RegionGrid

CPU = torch.device("cpu")


def encoded(seed: int, width: int = 96, height: int = 64) -> EncodedPicture:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(data, "PNG")
    return EncodedPicture(data.getvalue(), max_pixels=10**6, name="p")


def pixels(picture: EncodedPicture) -> Tensor:
    return torch.from_numpy(np.array(picture.decoded())).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def detector() -> RegionDetector:
    """Random, but sure of itself: torchvision's own detections need scores over a threshold."""
    made = RegionDetector(DetectorConfig(regions=36, image_px=96), CPU, seed=1)
    heads = made.model.roi_heads
    heads.box_predictor.cls_score.weight.mul_(60)
    heads.box_predictor.bbox_pred.weight.mul_(5)
    return made


@pytest.mark.slow
def test_regions_are_torchvisions_detections_where_both_have_them(detector: RegionDetector) -> None:
    picture = encoded(3)
    mine = detector.of(picture)
    detector.model.roi_heads.detections_per_img = 10_000
    with torch.no_grad():
        (theirs,) = detector.model([pixels(picture)])
    assert mine.features.shape == (36, 1024) and mine.positions.shape == (36, 5)
    boxes = theirs["boxes"].numpy() / np.array([96, 64, 96, 64], np.float32)
    assert len(boxes) > 10
    both = 0
    for box, label in zip(mine.positions[:, :4], mine.classes, strict=True):
        same = np.flatnonzero((np.abs(boxes - box).max(1) < 1e-4) & (theirs["labels"].numpy() == label))
        both += len(same) > 0
    # a region that is no detection is one that its class's own NMS took away, or of too low a score
    assert both >= 10
    areas = (mine.positions[:, 2] - mine.positions[:, 0]) * (mine.positions[:, 3] - mine.positions[:, 1])
    np.testing.assert_allclose(mine.positions[:, 4], areas, atol=1e-6)
    assert detector.class_names is not None and detector.class_names[1] == "person"
    again = detector.of(encoded(3))
    assert np.array_equal(again.features, mine.features)


@pytest.mark.slow
def test_features_boxes_and_classes_belong_to_the_same_proposal(detector: RegionDetector) -> None:
    """The head's own predictor, on the features that are kept, must say the class that is kept."""
    mine = detector.of(encoded(4))
    with torch.no_grad():
        logits, _ = detector.model.roi_heads.box_predictor(torch.from_numpy(mine.features))
    assert np.array_equal(logits[:, 1:].argmax(1).numpy() + 1, mine.classes)
    scores = logits.softmax(-1)[:, 1:].max(1).values
    first = detector.candidates(pixels(encoded(4)))[2]
    assert scores[0] == pytest.approx(float(first.max()), rel=1e-4)  # the best one stands first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn"])
def test_weights_of_other_classes_and_old_names_are_read(name: str, tmp_path: Path) -> None:
    from torchvision.models import detection

    torch.manual_seed(2)
    whole = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=7).eval()
    state = whole.state_dict()
    if name == "fasterrcnn_resnet50_fpn":  # as torchvision's own, older file has them
        state = {
            key.replace("fpn.inner_blocks.0.0.", "fpn.inner_blocks.0.").replace("conv.0.0.", "conv."): value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked")
        }
        assert "rpn.head.conv.weight" in state
    torch.save(state, tmp_path / "w.pth")
    config = DetectorConfig(name=name, weights=tmp_path / "w.pth", regions=5, image_px=64)  # type: ignore[arg-type]
    made = RegionDetector(config, CPU)
    own = made.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in whole.state_dict().items())
    assert made.class_names is None and made.of(encoded(1)).classes.max() < 7
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"source\.weights: .*other\.pth: has no roi_heads"):
        RegionDetector(config.model_copy(update={"weights": tmp_path / "other.pth"}), CPU)


def test_exactly_so_many_regions_come_out_the_best_first() -> None:
    boxes = torch.tensor(
        [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [5, 5, 5, 5], [0, 0, 10, 8.0]], dtype=torch.float32
    )
    scores = torch.tensor([0.5, 0.9, 0.3, 0.99, 0.8])
    # 1 and 2 survive NMS; 4 and 0 overlap 1, by score; 3 has no area
    assert best_regions(boxes, scores, 2, 0.5).tolist() == [1, 2]
    assert best_regions(boxes, scores, 4, 0.5).tolist() == [1, 2, 4, 0]
    assert best_regions(boxes, scores, 7, 0.5).tolist() == [1, 2, 4, 0, 3, 1, 2]
    assert best_regions(boxes, scores, 3, 0.95).tolist() == [1, 4, 0]
    with pytest.raises(ValueError, match="proposed no region"):
        best_regions(boxes[:0], scores[:0], 3, 0.5)


def test_the_mean_over_the_cells_gives_the_models_own_logits() -> None:
    grid = RegionGrid(GridConfig(name="resnet10t", image_px=96), CPU, seed=3)
    assert (grid.rows, grid.columns, grid.width, grid.regions) == (3, 3, 512, 9)
    made = grid.of(encoded(7))
    features = torch.from_numpy(made.features)
    classifier = grid.model.get_classifier()
    logits = classifier(features)
    picture = grid.transform.plain(encoded(7))[None]
    with torch.no_grad():
        whole = grid.model(picture)
    torch.testing.assert_close(logits.mean(0, keepdim=True), whole)
    assert np.array_equal(logits.argmax(1).numpy(), made.classes)
    np.testing.assert_allclose(made.positions[5], [2 / 3, 1 / 3, 1, 2 / 3, 1 / 9], atol=1e-6)
    # cell 5 is the middle row's last: what is there alone must move it most
    changed = picture.clone()
    changed[..., 40:56, 80:] += 3
    with torch.no_grad():
        moved = (grid.cells(changed) - grid.cells(picture)).flatten(1, 2).norm(dim=-1)[0]
    assert int(moved.argmax()) == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("convnext_atto", "not those of the mean"),
        ("deit_tiny_patch16_224", "no map"),
        ("resnet10", "not a timm model; near it: .*resnet10t"),
    ],
)
def test_models_without_such_a_map_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"source\.name: .*{name}.*{why}"):
        RegionGrid(GridConfig(name=name, image_px=224), CPU)
