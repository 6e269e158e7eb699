"""Regions of pictures by a Faster R-CNN of torchvision (Semantic Sharing, Sec. 3.2)."""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data_tools.pictures import EncodedPicture
from data_tools.regions.store import PictureRegions
from learning.encoders.weights import read_weights

logger = logging.getLogger(__name__)

_CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
_LONGER = 1333 / 800  # longer side at most, as a multiple of the shorter one: torchvision's own
_SMALLEST_PX = 1e-2  # of a box's sides, in the resized picture; torchvision drops smaller ones
COCO_CLASSES = 91  # with the background, class 0


class DetectorConfig(BaseModel):
    """Which detector, and what is taken of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Literal["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn"] = "fasterrcnn_resnet50_fpn_v2"
    weights: Path | None = Field(
        default=None,
        description="local file of the whole detector, torchvision's names; null: random, for tests alone",
    )
    regions: int = Field(default=36, ge=1, description="of each picture: the best ones")
    image_px: int = Field(
        default=800, ge=32, description="shorter side that pictures are resized to; the longer at most 1.67 ×"
    )
    nms_iou: float = Field(
        default=0.5, gt=0, le=1, description="regions that overlap a better one by more are taken last"
    )


class RegionDetector:
    """The `regions` best regions of a picture: fc7 features (1024), boxes, and the detector's classes.

    Raises ValueError for weights that do not fit.
    """

    # Differs from the paper: its detector is a ResNet-101 trained on Visual Genome (bottom-up attention, as
    # SCAN's), here torchvision's with FPN; files of the former are read by the regions stage too.
    width = 1024

    def __init__(self, config: DetectorConfig, device: torch.device, seed: int = 0):
        """`seed`: of weights where the config names none, the same on every rank."""
        self.config, self.device, self.regions = config, device, config.regions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _model(config).eval().requires_grad_(False).to(device)
        self.class_count = int(self.model.roi_heads.box_predictor.cls_score.out_features)
        self.class_names = _coco_names() if self.class_count == COCO_CLASSES else None

    @torch.inference_mode()
    def of(self, picture: EncodedPicture) -> PictureRegions:
        """The regions of a picture. Raises PictureError where it cannot be decoded."""
        image = np.array(picture.decoded(), np.uint8)
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(self.device).float() / 255
        features, boxes, scores, labels, (height, width) = self.candidates(pixels)
        best = best_regions(boxes, scores, self.regions, self.config.nms_iou)
        corners = boxes[best] / boxes.new_tensor([width, height, width, height])
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        return PictureRegions(
            features[best].cpu().numpy(),
            torch.cat([corners, area[:, None]], dim=1).cpu().numpy(),
            labels[best].cpu().numpy(),
        )

    @torch.inference_mode()
    def candidates(
        self, pixels: Float[Tensor, "3 h w"]
    ) -> tuple[
        Float[Tensor, "p 1024"],
        Float[Tensor, "p 4"],
        Float[Tensor, " p"],
        Int64[Tensor, " p"],
        tuple[int, int],
    ]:
        """Each proposal's features, box, score and class, and the height and width of what it is in.

        pixels: 0-1. The class is the proposal's likeliest object class, the score (0-1) that class's, the box
        (x1, y1, x2, y2, in the resized picture) as the detector corrects it for that class.
        """
        model = self.model
        images, _ = model.transform([pixels])
        maps = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, maps)
        heads = model.roi_heads
        features = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes))
        logits, corrections = heads.box_predictor(features)
        scores, labels = logits.softmax(-1)[:, 1:].max(dim=1)
        labels = labels + 1  # 0 is the background
        every = heads.box_coder.decode(corrections, proposals)
        boxes = _clipped(
            every[torch.arange(len(labels), device=labels.device), labels], images.image_sizes[0]
        )
        return features, boxes, scores, labels, images.image_sizes[0]


def best_regions(
    boxes: Float[Tensor, "p 4"], scores: Float[Tensor, " p"], regions: int, nms_iou: float
) -> Int64[Tensor, " r"]:
    """Which `regions` of p boxes to take, the best first: exactly so many come out.

    First those that overlap no better one by more than `nms_iou`, whatever their classes; where these are too
    few, the others, by score; boxes without an area last. Where p is smaller, they are taken again from the
    first on. Raises ValueError where p is 0.
    """
    # The paper is silent on how 36 are chosen; SCAN's files have the 36 of highest class score after NMS.
    from torchvision.ops import nms, remove_small_boxes

    if len(boxes) == 0:
        raise ValueError("the detector proposed no region")
    whole = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    whole[remove_small_boxes(boxes, _SMALLEST_PX)] = True
    ranked = torch.where(whole, scores, scores - 2)  # scores are 0-1
    kept = nms(boxes, ranked, nms_iou)
    kept = kept[whole[kept]]
    rest = torch.ones_like(whole)
    rest[kept] = False
    by_score = ranked.argsort(descending=True, stable=True)
    order = torch.cat([kept, by_score[rest[by_score]]])
    return order[torch.arange(regions, device=order.device) % len(order)]


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.ops import clip_boxes_to_image

    return clip_boxes_to_image(boxes, size)


def _model(config: DetectorConfig) -> Any:
    from torchvision.models import detection

    field = "source.weights"
    found = None if config.weights is None else read_weights(config.weights, field)
    classes = COCO_CLASSES
    if found is None:
        logger.warning("%s: null: the detector's weights are random; its regions are for tests alone", field)
    elif _CLASSIFIER not in found:
        raise ValueError(
            f"{field}: {config.weights}: has no {_CLASSIFIER}; give the file of the whole detector, as "
            f"torchvision has it for {config.name}"
        )
    else:
        classes = len(found[_CLASSIFIER])
    model = getattr(detection, config.name)(
        weights=None,
        weights_backbone=None,
        num_classes=classes,
        min_size=config.image_px,
        max_size=round(config.image_px * _LONGER),
    )
    if found is None:
        return model
    if config.name == "fasterrcnn_resnet50_fpn":
        for part in model.modules():  # as torchvision does for its COCO weights of this one
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 0.0
    try:
        model.load_state_dict(found)  # torchvision's modules rename what older files call otherwise
    except RuntimeError as error:
        raise ValueError(f"{field}: {config.weights}: is no {config.name}: {error}") from error
    return model


def _coco_names() -> list[str]:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights

    return list(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"])
