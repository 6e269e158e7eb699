"""Images to tensors, and COOKIE's augmentations of images and texts (Sec. IV-C).

A view is made of a JPEG that is decoded at the smallest scale that has the view's pixels: what is drawn for
the crop is drawn first, and says how large the picture must be. A view hangs on its picture, its size and its
own draws, on no other view.

Resizing is torch's antialiased kernel, which torchvision's transforms.v2 calls too. The colour operations are
not v2's: four of them and the grey are one 3 x 3 matrix here, one pass over the pixels in place of five, and
the hue needs no way through HSV (benchmarks/peer_loader.py prints the times of both). tests/test_augment.py
holds brightness, contrast, saturation and grey to v2's values; the hue is turned in YIQ's colour plane, v2's
in HSV.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from data_tools.pictures import EncodedPicture
from learning.training.rand_augment import SMALLEST_SIDE, rand_augmented

# Sec. IV-C a: what the paper gives
SMALLEST_CROP = 0.6
FLIP, NOISE, JITTER, GREY = 0.5, 0.5, 0.8, 0.2
# The paper is silent on strengths: the jitter is SimCLR's at half strength [35], the noise 5 % of the range.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.4, 0.1
NOISE_STD = 0.05
# Sec. IV-C b
TOKEN, MASKED, REPLACED = 0.2, 0.5, 0.1  # the rest, 40 %, is deleted

_LUMA = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]]
)
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)
_IDENTITY = torch.eye(3)


Picture = EncodedPicture | Image.Image | UInt8[Tensor, "3 h w"]


class ImageTransform:
    """Pictures to normalised float32 tensors (3, image_px, image_px).

    A picture is encoded, a PIL image (taken as RGB) or a uint8 tensor (3, h, w). `mean` and `std` are of
    pixels in 0-1. An encoded one that cannot be decoded raises its PictureError.
    """

    def __init__(self, image_px: int, mean: Sequence[float], std: Sequence[float]):
        if image_px < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"image_px {image_px}, mean {tuple(mean)}, std {tuple(std)}: a size, 3 means, 3 stds > 0"
            )
        self.image_px = image_px
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._scale = 1.0 / torch.tensor(self.std)[:, None, None]
        self._shift = -torch.tensor(self.mean)[:, None, None] * self._scale

    def plain(self, picture: Picture) -> Float32[Tensor, "3 p p"]:
        """Resized to the square, whatever the shape ("we reshape all images", Sec. IV-A b), normalised."""
        # The paper is silent on the filter: bilinear, antialiased
        pixels = _resized(_pixels(picture, self.image_px, self.image_px), self.image_px)
        return torch.addcmul(self._shift, pixels.float(), self._scale / 255)

    def augmented(self, picture: Picture, generator: torch.Generator) -> Float32[Tensor, "3 p p"]:
        """Crop, flip, Gaussian noise, colour jitter, grey (Sec. IV-C a, its order); then resized, normalised.

        All randomness is `generator`'s: first 12 even numbers (crop's height, width, top, left; flip; noise;
        jitter, its brightness, contrast, saturation, hue; grey), then, where there is noise, a normal number
        for each value of the crop.
        """
        # Differs from the paper: its text to Eq. 8 says Gaussian blur, its list Gaussian noise; the list
        # holds. The paper is silent on clipping: values are clipped to 0-1 once, at the end. So the colour
        # operations, affine maps of a pixel's colour, are one matrix, and give the same before the resizing
        # and after it. Noise is of the picture as decoded: of a JPEG at the scale of the view.
        draws = torch.rand(12, generator=generator).tolist()
        height, width = (math.ceil(self.image_px / _share(draw)) for draw in draws[:2])
        pixels = _flipped(_cropped(_pixels(picture, width, height), draws[:4]), draws[4])
        white = 255.0
        if draws[5] < NOISE:
            noise = torch.randn(pixels.shape, generator=generator).mul_(NOISE_STD)
            pixels, white = noise.add_(pixels, alpha=1 / 255), 1.0
        matrix, offset = _colours(pixels.mean(dim=(1, 2), dtype=torch.float32) / white, draws[6:])
        small = _resized(pixels, self.image_px).flatten(1).float()  # whole numbers are resized faster
        small = torch.addmm(offset[:, None], matrix / white, small).clamp_(0, 1)
        return torch.addcmul(self._shift, small.view(3, self.image_px, self.image_px), self._scale)

    def randaugmented(self, picture: Picture, generator: torch.Generator) -> Float32[Tensor, "3 p p"]:
        """Crop, flip and RandAugment of R2D2's released fine-tuning, normalised (rand_augment.py)."""
        side = math.ceil(self.image_px / SMALLEST_SIDE)
        pixels = rand_augmented(_pixels(picture, side, side), self.image_px, generator)
        return torch.addcmul(self._shift, pixels.float(), self._scale / 255)


def augment_tokens(
    ids: Int64[Tensor, " m"],
    generator: torch.Generator,
    mask_id: int,
    vocabulary_size: int,
    special_ids: Sequence[int],
) -> Int64[Tensor, " k"]:
    """One unpadded text, each token changed with 20 %: 50 % [MASK], 10 % a random token, 40 % deleted.

    COOKIE, Sec. IV-C b. [CLS], [SEP] and the other special tokens stay; random tokens are none of them. A
    text whose every token would be deleted keeps one of them, drawn at random: no text becomes empty. k ≤
    m.
    """
    # The paper says "each token" and then "the word": here it is each word piece.
    special = torch.tensor(list(special_ids))
    ordinary = torch.isin(ids, special, invert=True)
    chosen_m, kind_m = torch.rand(2, len(ids), generator=generator)
    keeper = torch.rand((), generator=generator)
    changed = ordinary & (chosen_m < TOKEN)
    masked = changed & (kind_m < MASKED)
    replaced = changed & ~masked & (kind_m < MASKED + REPLACED)
    deleted = changed & ~masked & ~replaced
    augmented = ids.masked_fill(masked, mask_id)
    if replaced.any():
        augmented[replaced] = _random_tokens(int(replaced.sum()), generator, vocabulary_size, special_ids)
    if deleted.any() and bool((deleted == ordinary).all()):
        places = deleted.nonzero()[:, 0]
        deleted[places[int(keeper * len(places))]] = False
    return augmented[~deleted]


def _random_tokens(
    count: int, generator: torch.Generator, vocabulary_size: int, special_ids: Sequence[int]
) -> Int64[Tensor, " n"]:
    """Ids drawn evenly from the vocabulary without its special tokens."""
    special = sorted({number for number in special_ids if 0 <= number < vocabulary_size})
    drawn = torch.randint(vocabulary_size - len(special), (count,), generator=generator)
    for number in special:  # ascending: each special id at or below pushes the draw up by one
        drawn = drawn + (drawn >= number)
    return drawn


def _pixels(picture: Picture, width: int, height: int) -> UInt8[Tensor, "3 h w"]:
    """The picture's pixels; of an encoded one `width` x `height` or more, where it has as many."""
    if isinstance(picture, EncodedPicture):
        picture = picture.decoded((width, height))
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"a picture is uint8 (3, h, w), not {picture.dtype} {tuple(picture.shape)}")
        return picture
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _resized(pixels: Tensor, side: int) -> Tensor:
    if tuple(pixels.shape[1:]) == (side, side):
        return pixels
    return F.interpolate(
        pixels[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )[0]


def _cropped(pixels: Tensor, draws: Sequence[float]) -> Tensor:
    """A window of (σ₁H, σ₂W) pixels, σ₁ and σ₂ each even in 0.6-1, its place even among those that fit."""
    height, width = pixels.shape[1:]
    h, w = max(1, round(_share(draws[0]) * height)), max(1, round(_share(draws[1]) * width))
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    return pixels[:, top : top + h, left : left + w]


def _share(draw: float) -> float:
    """Of a side of the picture, that a crop takes."""
    return SMALLEST_CROP + (1 - SMALLEST_CROP) * draw


def _flipped(pixels: Tensor, draw: float) -> Tensor:
    return pixels.flip(2) if draw < FLIP else pixels


def _colours(mean: Float32[Tensor, "3"], draws: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Jitter and grey as one map x → matrix · x + offset of a colour; `mean` is the picture's mean.

    The jitter: brightness, contrast, saturation, hue, in the order that the paper names them. Contrast blends
    with the picture's mean grey, saturation with each pixel's grey; hue turns the colour plane of YIQ.
    """
    jitter, brightness, contrast, saturation, hue, grey = draws
    matrix, offset = _IDENTITY, torch.zeros(3)
    if jitter < JITTER:
        light = _between(brightness, BRIGHTNESS)
        spread = _between(contrast, CONTRAST)
        middle = float(_LUMA @ mean) * light
        angle = torch.tensor((2 * hue - 1) * HUE * 2 * torch.pi)
        turn = torch.eye(3)
        turn[1, 1] = turn[2, 2] = torch.cos(angle)
        turn[2, 1] = torch.sin(angle)
        turn[1, 2] = -turn[2, 1]
        colour = _FROM_YIQ @ turn @ _TO_YIQ @ _saturation(_between(saturation, SATURATION))
        matrix = colour * (light * spread)
        offset = colour.sum(dim=1) * ((1 - spread) * middle)
    if grey < GREY:
        drop = _saturation(0.0)
        matrix, offset = drop @ matrix, drop @ offset
    return matrix, offset


def _between(draw: float, strength: float) -> float:
    return 1 + (2 * draw - 1) * strength


def _saturation(factor: float) -> Float32[Tensor, "3 3"]:
    """The map that blends a colour with its grey: 1 leaves it, 0 is grey."""
    return factor * _IDENTITY + (1 - factor) * _LUMA.expand(3, 3)
