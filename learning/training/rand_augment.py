"""Crop, flip and RandAugment (2 operations, magnitude 5 of 10) of R2D2's released fine-tuning.

The operations on pixels are torchvision's. Its classes RandomResizedCrop and RandAugment are not used: they
draw from the process's random state, from which the training, in another thread, draws its dropout. Here
all randomness is a generator's.

The operations and their strengths are those of the release (the RandomAugment that ALBEF and BLIP have too).
Beside torchvision's RandAugment: no Color, Contrast, Posterize and Solarize; an operation that was drawn acts
with 50 %; Brightness and Sharpness have the factor 0.1 + 1.8 m of a magnitude m, which is 1 at 5 of 10, so
that they change nothing; a shift is 10 m pixels, not a share of the side; what comes in from outside is grey.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

SMALLEST_AREA = 0.5  # of the picture, that a crop takes
NARROWEST = 3 / 4  # a crop's width over its height; the widest is its inverse
CROPS = 10  # drawn, of which the first that fits is taken
FLIP = 0.5
OPERATIONS, ACTS, MAGNITUDE = 2, 0.5, 0.5
FILL = 128.0
SMALLEST_SIDE = math.sqrt(SMALLEST_AREA * NARROWEST)  # of a crop, as a share of the picture's shorter side

_SHEAR_DEGREES = math.degrees(math.atan(0.3 * MAGNITUDE))
_SHIFT_PX = round(10 * MAGNITUDE)
_TURN_DEGREES = 30 * MAGNITUDE


def rand_augmented(
    pixels: UInt8[Tensor, "3 h w"], side: int, generator: torch.Generator
) -> UInt8[Tensor, "3 side side"]:
    """A random crop resized to the square (bicubic, antialiased), mirrored or not, and two operations.

    The generator gives 29 even numbers: area and aspect of ten crops, top, left, mirror, and of each
    operation which, whether, and its sign.
    """
    draws = torch.rand(2 * CROPS + 3 + 3 * OPERATIONS, generator=generator).tolist()
    top, left, height, width = crop_of(pixels.shape[1], pixels.shape[2], draws[: 2 * CROPS + 2])
    image = v2.resized_crop(
        pixels, top, left, height, width, [side, side], InterpolationMode.BICUBIC, antialias=True
    )
    if draws[2 * CROPS + 2] < FLIP:
        image = v2.horizontal_flip(image)
    rest = draws[2 * CROPS + 3 :]
    for which, whether, sign in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if whether < ACTS:
            operation = list(_OPERATIONS.values())[int(which * len(_OPERATIONS))]
            image = operation(image, 1 if sign < 0.5 else -1)
    return image


def crop_of(height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, in px: torchvision's RandomResizedCrop of scale 0.5-1.

    Its area is even in 0.5-1 of the picture's, the logarithm of its aspect even; the first of the crops
    drawn that fits is taken, and where none does the largest central one of an allowed aspect.
    """
    *shapes, down, right = draws
    for area, aspect in zip(shapes[::2], shapes[1::2], strict=True):
        target = height * width * (SMALLEST_AREA + (1 - SMALLEST_AREA) * area)
        ratio = NARROWEST ** (1 - 2 * aspect)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height / NARROWEST)), min(height, round(width / NARROWEST))
    return (height - h) // 2, (width - w) // 2, h, w


def _affine(
    image: Tensor,
    shift: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
    corner: bool = False,
) -> Tensor:
    """Shifted by px, sheared by degrees; about the picture's `corner`, else about its middle."""
    return v2.affine(
        image,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=[FILL] * 3,
        center=[0.0, 0.0] if corner else None,
    )


def _rotated(image: Tensor, degrees: float) -> Tensor:
    return v2.rotate(image, degrees, InterpolationMode.BILINEAR, fill=[FILL] * 3)


_OPERATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda image, sign: image,
    "brightness": lambda image, sign: image,  # the factor is 1: see above
    "sharpness": lambda image, sign: image,
    "autocontrast": lambda image, sign: v2.autocontrast(image),
    "equalize": lambda image, sign: v2.equalize(image),
    "shear_x": lambda image, sign: _affine(image, shear=(sign * _SHEAR_DEGREES, 0.0), corner=True),
    "shear_y": lambda image, sign: _affine(image, shear=(0.0, sign * _SHEAR_DEGREES), corner=True),
    "shift_x": lambda image, sign: _affine(image, shift=(sign * _SHIFT_PX, 0)),
    "shift_y": lambda image, sign: _affine(image, shift=(0, sign * _SHIFT_PX)),
    "rotate": lambda image, sign: _rotated(image, sign * _TURN_DEGREES),
}
