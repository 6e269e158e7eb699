"""Line charts as plain geometry: the report's template draws them as SVG and escapes every name itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
MOST_POINTS = 240
COLOURS = 8  # the template has so many line colours

Series = Sequence[tuple[float, float]]  # (step, value), steps ascending


@dataclass(frozen=True)
class Tick:
    """A grid line: its place in pixels and what stands beside it."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve: its name, the number of its colour, points as SVG writes them, and its last value."""

    name: str
    colour: int
    points: str
    last: str


@dataclass(frozen=True)
class Chart:
    """All that a drawing needs, in pixels of a WIDTH × HEIGHT box."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str, series: Mapping[str, Series], x_label: str = "step", *, from_zero: bool = False
) -> Chart:
    """A chart of one or more curves over steps, from step 0 on; values that are not finite are named."""
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    xs = [0.0, *(x for points in finite.values() for x, _ in points)]
    ys = [y for points in finite.values() for _, y in points] or [0.0]
    x_ticks = ticks(min(xs), max(xs), 5, whole=True)
    y_ticks = ticks(min([0.0, *ys] if from_zero else ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1.0
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_of(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 2)

    def y_of(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 2)

    lines = []
    for number, (name, points) in enumerate(finite.items()):
        lost = len(series[name]) - len(points)
        lines.append(
            Line(
                name=f"{name} ({lost} not finite)" if lost else name,
                colour=number % COLOURS,
                points=" ".join(f"{x_of(x)},{y_of(y)}" for x, y in _drawn(points)),
                last=short(points[-1][1]) if points else "–",
            )
        )
    return Chart(
        title,
        x_label,
        [Tick(x_of(x), short(x)) for x in x_ticks if x_low <= x <= x_high],
        [Tick(y_of(y), short(y)) for y in y_ticks],
        lines,
    )


def ticks(low: float, high: float, wanted: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low … high; about `wanted`."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Series, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of equal runs of neighbours, so that noise does not hide the curve."""
    if len(points) <= most:
        return list(points)
    made = []
    for bucket in range(most):
        run = points[bucket * len(points) // most : (bucket + 1) * len(points) // most]
        made.append((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)))
    return made


def _drawn(points: Series) -> list[tuple[float, float]]:
    """A single point twice: SVG draws a line without length as a dot, and a lone point not at all."""
    return thinned(points) * (2 if len(points) == 1 else 1)


def short(value: float) -> str:
    """A number for a tick or a legend: four digits at most, powers of ten where it is tiny or huge."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
