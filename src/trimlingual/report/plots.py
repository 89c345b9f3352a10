"""Geometry of the page's charts with two axes; `plots.svg.j2` draws them. Lengths in SVG user units (about a CSS pixel).

Every point has its values in a tooltip, and every chart its content in words, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 40


@dataclass(frozen=True)
class Point:
    """Something measured. `mark` is shown in the dot; `low` and `high` bound an interval of y."""

    x: float
    y: float
    tip: str
    mark: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line or not. `number` picks the colour; `hollow` dots are others' results."""

    name: str
    points: Sequence[Point]
    number: int = 1
    joined: bool = True
    hollow: bool = False


@dataclass(frozen=True)
class Dot:
    """A point, laid out. `low_y` and `high_y` are the ends of its interval, if it has one."""

    x: float
    y: float
    tip: str
    mark: str
    low_y: float | None
    high_y: float | None


@dataclass(frozen=True)
class Drawn:
    """A series, laid out. `path` is empty where its points are not joined."""

    name: str
    number: int
    hollow: bool
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Plot:
    """A chart, laid out. Ticks are pairs of a place and its label."""

    id: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Drawn]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot(
    name: str, title: str, x_label: str, y_label: str, series: Sequence[Series], from_zero: Sequence[str] = ()
) -> Plot:
    """Lay out a chart whose axes span all points; an axis in `from_zero` ("x", "y") begins at 0."""
    points = [point for each in series for point in each.points]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    across = [point.x for point in points] + ([0.0] if "x" in from_zero else [])
    x_low, x_high = min(across), max(across) + 0.04 * (max(across) - min(across) or 1.0)
    x_ticks = [tick for tick in _ticks(across) if x_low <= tick <= x_high]
    y_ticks = _ticks(heights + ([0.0] if "y" in from_zero else []))

    def x_of(value: float) -> float:
        share = (value - x_low) / (x_high - x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for each in series:
        dots = [
            Dot(
                x_of(point.x),
                y_of(point.y),
                point.tip,
                point.mark,
                *(None if end is None else y_of(end) for end in (point.low, point.high)),
            )
            for point in each.points
        ]
        path = "M" + " L".join(f"{dot.x} {dot.y}" for dot in dots) if each.joined and len(dots) > 1 else ""
        drawn.append(Drawn(each.name, each.number, each.hollow, path, dots))
    described = "; ".join(f"{each.name}: " + ", ".join(_thinned([p.tip for p in each.points])) for each in series)
    return Plot(
        id=f"plot-{name}",
        title=title,
        description=described,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(x_of(value), _label(value, x_ticks)) for value in x_ticks],
        y_ticks=[(y_of(value), _label(value, y_ticks)) for value in y_ticks],
        series=drawn,
    )


def _ticks(values: Sequence[float], most: int = 6) -> list[float]:
    """Round numbers, at most `most` + 1 of them, that span the values."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - abs(low or 1.0) / 2, high + abs(high or 1.0) / 2
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _label(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if ticks and max(map(abs, ticks)) < 1e-2:  # learning rates
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _thinned(texts: Sequence[str], most: int = 12) -> list[str]:
    """At most `most` of the texts, evenly spaced, with the first and the last: a listener follows no more."""
    if len(texts) <= most:
        return list(texts)
    return [texts[round(index * (len(texts) - 1) / (most - 1))] for index in range(most)]
