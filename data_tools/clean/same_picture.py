"""Whether two thumbnails show the same picture: resaved, resized, cropped by up to some 10 % of a side, or
mirrored.

The one that may be a crop is laid over the window of the other where the hashes say it lies, and the four
edges of the window, brightness and contrast are fitted by Gauss-Newton steps (Lucas and Kanade 1981; Baker
and Matthews 2004). What is left is judged: as a whole (`correlation`), and where it is worst (`worst`,
`colour`), so that two drawings that differ by a clock's hand, or in colour, are two pictures however much
they agree elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_tools.clean.fingerprints import WINDOWS

_BLOCK = 1024  # pairs at a time: about 60 MB
_STEPS = 4
_LARGEST_STEP = 0.03  # of an edge, in widths of the picture
_PRE_CORRELATION = 0.7  # before the fit; pairs under it cannot reach `Limits.correlation`
_PRE_TINT = 14.0  # most difference of the mean Cb or Cr: a crop of 10 % seldom changes it by more than 6
_OUTSIDE = 0.02  # so far an edge may lie outside the picture: rounding of crops, resampling
_SMALLEST = 0.85  # a window's side: crops of 10 %, and some room for the fit
_GRAIN = 3.0  # grey levels that recompression alone may leave in a 3 x 3 mean
_BLUR = 0.1  # and of the gradient there (levels a pixel): what a fit to a tenth of a pixel leaves


@dataclass(frozen=True)
class Limits:
    """What still counts as the same picture; benchmarks/duplicates.py says on what they were chosen."""

    correlation: float = 0.94  # least share of the variance that the other picture explains
    worst: float = 2.0  # most residual of a 3 x 3 mean, in units of what recompression and the fit may leave
    colour: float = 9.0  # most difference of a 3 x 3 mean of Cb or Cr, levels
    contrast: tuple[float, float] = (0.7, 1.4)  # factor between the two
    least_contrast: float = 4.0  # standard deviation in grey levels under which a picture shows nothing


@dataclass(frozen=True)
class Scores:
    """Of each pair; see Limits."""

    correlation: np.ndarray
    worst: np.ndarray
    colour: np.ndarray
    contrast: np.ndarray

    def same(self, limits: Limits) -> np.ndarray:
        """bool, one a pair."""
        low, high = limits.contrast
        return (
            (self.correlation >= limits.correlation)
            & (self.worst <= limits.worst)
            & (self.colour <= limits.colour)
            & (self.contrast >= low)
            & (self.contrast <= high)
        )


def is_plain(grey: np.ndarray, limits: Limits) -> np.ndarray:
    """Of thumbnails [n, side, side]: whether a picture is of one tone, so that its hashes say nothing."""
    plain: np.ndarray = grey.reshape(len(grey), -1).std(1) < limits.least_contrast
    return plain


Thumbnails = tuple[
    np.ndarray, np.ndarray
]  # grey and colour of n pictures, as fingerprints.Fingerprint has them


def compare(
    wholes: Thumbnails,
    windowed: Thumbnails,
    whole: np.ndarray,
    other: np.ndarray,
    window: np.ndarray,
    mirrored: bool,
) -> Scores:
    """For each k: picture `whole[k]` of `wholes`, laid over window `window[k]` of picture `other[k]` of
    `windowed`.

    Args:
        wholes, windowed: thumbnails, perhaps memory-mapped.
        window: places in fingerprints.WINDOWS.
        mirrored: whether the first is seen in a mirror.
    """
    parts = list(_blocks(wholes, windowed, whole, other, window, mirrored))
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 4
    return Scores(*joined)


def _blocks(
    wholes: Thumbnails,
    windowed: Thumbnails,
    whole: np.ndarray,
    other: np.ndarray,
    window: np.ndarray,
    mirrored: bool,
) -> Iterator[tuple[np.ndarray, ...]]:
    step = -1 if mirrored else 1
    for start in range(0, len(whole), _BLOCK):
        here = slice(start, start + _BLOCK)
        target = wholes[0][whole[here]].astype(np.float32)[..., ::step]
        source = windowed[0][other[here]].astype(np.float32)
        spans = WINDOWS[window[here]]
        found = tuple(np.full(len(target), value) for value in (-1.0, np.inf, np.inf, 0.0))
        target_colour = wholes[1][whole[here]].astype(np.float32)[..., ::step]
        source_colour = windowed[1][other[here]].astype(np.float32)
        tints = np.abs(target_colour.mean((2, 3)) - source_colour.mean((2, 3))).max(1)
        good = np.flatnonzero(tints <= _PRE_TINT)
        if len(good):
            likely = _correlation(_cut(source[good], spans[good]), target[good]) >= _PRE_CORRELATION
            good = good[likely]
        if len(good):
            fitted = _fit(source[good], target[good], spans[good])
            scores = _judge(source[good], target[good], source_colour[good], target_colour[good], fitted)
            for all_of_them, part in zip(found, scores, strict=True):
                all_of_them[good] = part
        yield found


def _fit(source: np.ndarray, target: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Top, bottom, left and right of the windows of `source` that agree best with `target`."""
    side = target.shape[1]
    at = ((np.arange(side) + 0.5) / side).astype(np.float32)
    down, across = at[:, None], at[None, :]
    spans = spans.copy()
    inner = (slice(None), slice(1, -1), slice(1, -1))
    for _ in range(_STEPS):
        cut = _cut(source, spans)
        # one edge moves, the opposite stays: the picture moves by the share of the way to it
        steep_down = np.gradient(cut, axis=1) * (side / (spans[:, 1] - spans[:, 0]))[:, None, None]
        steep_across = np.gradient(cut, axis=2) * (side / (spans[:, 3] - spans[:, 2]))[:, None, None]
        columns = (
            steep_down * (1 - down),
            steep_down * down,
            steep_across * (1 - across),
            steep_across * across,
            cut,
            np.ones_like(cut),
        )
        slopes = np.stack([column[inner].reshape(len(cut), -1) for column in columns], 1).astype(np.float64)
        wanted = target[inner].reshape(len(cut), -1, 1).astype(np.float64)
        normal = slopes @ slopes.swapaxes(1, 2)
        ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] / 6 + 1e-6
        found = np.linalg.solve(normal + ridge * np.eye(6), slopes @ wanted)[..., 0]
        contrast = np.maximum(found[:, 4:5], 0.2)
        spans = spans + np.clip(found[:, :4] / contrast, -_LARGEST_STEP, _LARGEST_STEP)
        for low, high in ((0, 1), (2, 3)):
            spans[:, low] = np.clip(spans[:, low], -_OUTSIDE, 1 - _SMALLEST)
            spans[:, high] = np.clip(spans[:, high], spans[:, low] + _SMALLEST, 1 + _OUTSIDE)
    return spans


def _judge(
    source: np.ndarray,
    target: np.ndarray,
    source_colour: np.ndarray,
    target_colour: np.ndarray,
    spans: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """The four of Scores, the windows being fitted."""
    cut = _cut(source, spans)
    cut_mean, mean = cut.mean((1, 2), keepdims=True), target.mean((1, 2), keepdims=True)
    varied, variance = cut - cut_mean, (target - mean).var((1, 2))
    contrast = (varied * (target - mean)).mean((1, 2)) / np.maximum(varied.var((1, 2)), 1e-3)
    left = target - mean - contrast[:, None, None] * varied
    allowed = _GRAIN + _BLUR * np.maximum(_steepness(cut), _steepness(target))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    worst = (np.abs(_mean_3x3(left)) / _mean_3x3(allowed))[inner].reshape(len(cut), -1).max(1)
    colour = np.zeros(len(cut))
    for plane in range(2):
        apart = target_colour[:, plane] - _cut(source_colour[:, plane], spans)
        colour = np.maximum(colour, np.abs(_mean_3x3(apart))[inner].reshape(len(cut), -1).max(1))
    return 1 - left[inner].var((1, 2)) / np.maximum(variance, 1e-3), worst, colour, contrast


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a = a - a.mean((1, 2), keepdims=True)
    b = b - b.mean((1, 2), keepdims=True)
    found: np.ndarray = (a * b).sum((1, 2)) / np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)) + 1e-3)
    return found


def _steepness(pictures: np.ndarray) -> np.ndarray:
    return np.hypot(np.gradient(pictures, axis=1), np.gradient(pictures, axis=2))


def _mean_3x3(pictures: np.ndarray) -> np.ndarray:
    wide = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    lines = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (lines[:, :, :-2] + lines[:, :, 1:-1] + lines[:, :, 2:]) / 9


def _cut(pictures: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The windows of the pictures [n, side, side], each read at `side` x `side` points."""
    rows = _read_lines(pictures, spans[:, 0], spans[:, 1])
    return _read_lines(rows.swapaxes(1, 2), spans[:, 2], spans[:, 3]).swapaxes(1, 2)


def _read_lines(pictures: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Read along axis 1 from `low` to `high` by cubic convolution (Keys 1981, a = -1/2)."""
    side = pictures.shape[1]
    at = (low[:, None] + (high - low)[:, None] * (np.arange(side) + 0.5) / side) * side - 0.5
    before = np.floor(at).astype(np.intp)
    t = (at - before).astype(np.float32)
    weights = (
        ((2 - t) * t - 1) * t / 2,
        (3 * t - 5) * t * t / 2 + 1,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    one = np.arange(len(pictures))[:, None]
    found = np.zeros_like(pictures)
    for step, weight in enumerate(weights, -1):
        found += pictures[one, np.clip(before + step, 0, side - 1)] * weight[..., None]
    return found
