"""A picture's fingerprint: hashes of it and of windows of it, and a thumbnail to verify with.

The hashes are for finding: the signs of the lowest 63 coefficients of a cosine transform (Zauner 2010,
"pHash"), of the whole picture and of windows that a cropped copy may show. A mirrored picture's hash is the
whole one's with the signs of the odd columns turned. The thumbnail is for deciding: see same_picture.py.

A picture takes BYTES_PER_PICTURE bytes: 23 million take 38 GB on disk, of which a search holds the hashes of
one window at a time in memory (see near_duplicates.py). All arithmetic is on whole numbers, so that a
fingerprint is the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

_SAMPLES = 64  # the picture is scaled to so many pixels a side, whatever its aspect
_COEFFICIENTS = 8  # a side
THUMBNAIL = 32  # pixels a side of the grey one
CHROMA = 16  # and of the two of colour
_SCALE = 2**12  # of the whole numbers that stand for the transform's

_SPANS = ((0.0, 1.0), (0.0, 0.9), (0.05, 0.95), (0.1, 1.0), (0.0, 0.95), (0.05, 1.0))  # of a side
# The windows as (vertical, horizontal) spans: the whole, nine of 90 % of each side, four of 95 %. A crop that
# cuts off up to 10 % of width and height is at most 2.5 % from one of them at each edge, or a little more.
_PLACES = (
    (0, 0),
    *((y, x) for y in (1, 2, 3) for x in (1, 2, 3)),
    *((y, x) for y in (4, 5) for x in (4, 5)),
)
WINDOWS = np.array([(*_SPANS[y], *_SPANS[x]) for y, x in _PLACES])  # top, bottom, left, right, from 0 to 1
HASH_BITS = _COEFFICIENTS**2 - 1
BYTES_PER_PICTURE = len(WINDOWS) * 8 + THUMBNAIL**2 + 2 * CHROMA**2


@dataclass(frozen=True)
class Fingerprint:
    """Of one picture."""

    hashes: np.ndarray  # uint64 [len(WINDOWS)]
    grey: np.ndarray  # uint8 [THUMBNAIL, THUMBNAIL]
    colour: np.ndarray  # uint8 [2, CHROMA, CHROMA]: Cb and Cr, 128 for none


def fingerprint(picture: Image.Image) -> Fingerprint:
    """Of an RGB picture, upright, as data_tools.pictures gives it."""
    grey = picture.convert("L")
    samples = np.asarray(grey.resize((_SAMPLES, _SAMPLES), Image.Resampling.BILINEAR), np.float64)
    products = _TRANSFORM @ samples @ _TRANSFORM.T  # whole numbers under 2^53: exact in any order of addition
    blocks = products.reshape(len(_SPANS), _COEFFICIENTS, len(_SPANS), _COEFFICIENTS)
    signs = np.stack([blocks[y, :, x, :] > 0 for y, x in _PLACES]).reshape(len(WINDOWS), -1)
    chroma = picture.resize((CHROMA, CHROMA), Image.Resampling.BILINEAR).convert("YCbCr")
    return Fingerprint(
        (signs[:, _ORDER] * _BITS).sum(1, dtype=np.uint64),
        np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)),
        np.asarray(chroma)[..., 1:].transpose(2, 0, 1),
    )


def mirrored(hashes: np.ndarray) -> np.ndarray:
    """The hashes of the whole pictures seen in a mirror."""
    turned: np.ndarray = hashes ^ _MIRROR
    return turned


def _transform() -> np.ndarray:
    """[spans × coefficients, samples]: the cosine transform of each span of a line of samples."""
    rows = []
    fine = 4 * _SAMPLES  # points at which a span is read, by linear interpolation
    for low, high in _SPANS:
        place = (low + (high - low) * (np.arange(fine) + 0.5) / fine) * _SAMPLES - 0.5
        before = np.floor(place).astype(int)
        read = np.zeros((fine, _SAMPLES))
        for step, weight in ((0, 1 - (place - before)), (1, place - before)):
            np.add.at(read, (np.arange(fine), np.clip(before + step, 0, _SAMPLES - 1)), weight)
        waves = np.cos(np.pi * np.outer(np.arange(_COEFFICIENTS), np.arange(fine) + 0.5) / fine)
        rows.append(waves @ read / fine * 4)
    # to 2^-20 first, so that no machine's cosine decides how a number is rounded
    return np.round(np.round(np.concatenate(rows) * 2**20) / 2**20 * _SCALE)


_TRANSFORM = _transform()
# The coefficients but for the mean, from the lowest frequency on; bit 62 is the first.
_ORDER = np.array(
    sorted(range(1, _COEFFICIENTS**2), key=lambda n: (sum(divmod(n, _COEFFICIENTS)), n)), dtype=np.intp
)
_BITS = np.uint64(1) << np.arange(HASH_BITS - 1, -1, -1, dtype=np.uint64)
_MIRROR = (((_ORDER % _COEFFICIENTS) % 2 == 1) * _BITS).sum(dtype=np.uint64)
