"""A chart of lines with intervals as SVG, written by hand: accuracy against what it costs, a line per method.

The PGP paper's figure of performance against efficiency is drawn from it. Colours are Okabe and Ito's, which stay apart
under colour blindness; lines also differ in their markers, and in dashes once the colours are used up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from pgp_lightning.errors import ConfigError

__all__ = ["Chart", "Line", "Point", "draw_chart", "ticks"]

# Okabe & Ito, Color Universal Design (2008), without yellow, which is too pale on white, and with a dark purple.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B")
MARKERS = ("circle", "square", "triangle", "diamond", "down")
DASHES = ("", "7 3", "2 3")
INK, FAINT, GRID = "#1d2433", "#5b6475", "#e4e7ee"
LEFT, TOP, BOTTOM, LEGEND, ROW = 74, 58, 66, 216, 22
LONGEST = 25  # characters of a name in the legend


class Point(NamedTuple):
    """A point of a line; low and high are the ends of its interval, NaN if there is none."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A method over its budgets.

    Args:
        name: for the legend.
        points: in any order; drawn from left to right.
        strong: drawn thicker, and over the others.
    """

    name: str
    points: Sequence[Point]
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Args:
        lines: one for each method.
        title: above the chart.
        x_label: below it.
        y_label: beside it.
        level: what the dashed line across stands for: its height, and its own place if `x` is finite.
        note: small print below.
        log: whether the x axis is logarithmic.
    """

    lines: Sequence[Line]
    title: str
    x_label: str
    y_label: str
    level: Point | None = None
    note: str = ""
    log: bool = False


def ticks(low: float, high: float, about: int = 10, log: bool = False) -> list[float]:
    """Return round numbers from low to high: steps of 1, 2 or 5 times a power of ten, about so many.

    On a logarithmic axis 1, 2 and 5 times powers of ten, or, if these are too many, the powers or some of them; if
    they are fewer than three, as on a linear one.
    """
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        # Written as text, for 10.0 ** -5 is not 1e-5.
        fine, coarse = ([float(f"{digit}e{k}") for k in decades for digit in digits] for digits in ((1, 2, 5), (1,)))
        fine, coarse = ([value for value in values if low <= value <= high] for values in (fine, coarse))
        if 3 <= len(fine) <= about:
            return fine
        if len(coarse) >= 3:
            return coarse[:: math.ceil(len(coarse) / about)]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    """Maps values from [low, high] to pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def draw_chart(chart: Chart, width: int = 900, height: int = 500) -> str:
    """Return the chart as an SVG document of width x height pixels, higher if the legend needs it.

    Raises:
        ConfigError: if there is no point, one is not finite, or one is not positive on a logarithmic axis.
    """
    points = [point for line in chart.lines for point in line.points]
    _check(chart, points)
    height = max(height, TOP + BOTTOM + ROW * (len(chart.lines) + 1))
    right, bottom = width - LEGEND, height - BOTTOM
    x = _x_axis(chart, points, right)
    y = _y_axis([*points, *([chart.level] if chart.level else [])], bottom)
    label = escape(chart.title, quote=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}" font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 30, chart.title, size=17, weight=600),
        *_axes(chart, x, y),
    ]
    if chart.level:
        level = y(chart.level.y)
        parts.append(
            f'<line class="level" x1="{LEFT}" y1="{level:.1f}" x2="{right}" y2="{level:.1f}" stroke="{INK}" '
            f'stroke-width="1.5" stroke-dasharray="6 4"/>'
        )
        parts.append(_text(LEFT + 8, level - 7, f"{chart.level.label}: {chart.level.y:.1f}", FAINT, 12, halo=True))
        if math.isfinite(chart.level.x):
            parts.append(_marker("circle", x(chart.level.x), level, INK, chart.level.label))
    order = sorted(range(len(chart.lines)), key=lambda i: chart.lines[i].strong)  # the strong one lies on top
    parts += [part for i in order for part in _line(chart.lines[i], i, x, y)]
    parts += [part for i, line in enumerate(chart.lines) for part in _legend(line, i, right + 22)]
    if chart.note:
        parts.append(_text(LEFT, height - 10, chart.note, FAINT, 11))
    return "\n".join([*parts, "</svg>", ""])


def _check(chart: Chart, points: Sequence[Point]) -> None:
    if not points:
        raise ConfigError("nothing to draw: no method has both a cost and an accuracy")
    for point in points:
        if not math.isfinite(point.x) or not math.isfinite(point.y):
            raise ConfigError(f"cannot draw {point.label or 'a point'} at {point.x}, {point.y}")
        if chart.log and point.x <= 0:
            raise ConfigError(f"a logarithmic axis needs positive values, got {point.x} for {point.label or 'a point'}")


def _x_axis(chart: Chart, points: Sequence[Point], right: float) -> _Axis:
    values = [point.x for point in points]
    if chart.level and math.isfinite(chart.level.x):
        values.append(chart.level.x)
    low, high = min(values), max(values)
    if chart.log:
        factor = max((high / low) ** 0.05, 1.05)
        return _Axis(low / factor, high * factor, LEFT, right, log=True)
    # Costs start at nothing: cut off, a saving of a tenth would look like one of a half.
    spread = (high - min(low, 0.0)) or 1.0
    return _Axis(min(low, 0.0), high + 0.05 * spread, LEFT, right)


def _y_axis(points: Sequence[Point], bottom: float) -> _Axis:
    values = [v for point in points for v in (point.y, point.low, point.high) if math.isfinite(v)]
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or 0.5
    return _Axis(low - margin, high + margin, bottom, TOP)


def _axes(chart: Chart, x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line x1="{x.start}" y1="{at:.1f}" x2="{x.end}" y2="{at:.1f}" stroke="{GRID}"/>')
        parts.append(_text(x.start - 10, at + 4.5, f"{value:g}", FAINT, anchor="end"))
    for value in ticks(x.low, x.high, log=x.log):
        at = x(value)
        parts.append(f'<line x1="{at:.1f}" y1="{y.end}" x2="{at:.1f}" y2="{y.start}" stroke="{GRID}"/>')
        parts.append(_text(at, y.start + 20, f"{value:g}", FAINT, anchor="middle"))
    parts.append(f'<path d="M{x.start} {y.end}V{y.start}H{x.end}" fill="none" stroke="{FAINT}" stroke-width="1.2"/>')
    parts.append(_text((x.start + x.end) / 2, y.start + 42, chart.x_label, anchor="middle"))
    middle = (y.start + y.end) / 2
    parts.append(_text(20, middle, chart.y_label, anchor="middle", extra=f' transform="rotate(-90 20 {middle:.1f})"'))
    return parts


def _line(line: Line, index: int, x: _Axis, y: _Axis) -> list[str]:
    colour, marker, dash = _style(index)
    points = sorted(line.points, key=lambda point: point.x)
    places = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
    parts = ["<g>"]
    for point in points:
        if math.isfinite(point.low) and math.isfinite(point.high):
            at, low, high = x(point.x), y(point.low), y(point.high)
            parts.append(
                f'<path class="interval" d="M{at:.1f} {low:.1f}V{high:.1f}M{at - 3:.1f} {low:.1f}h6M{at - 3:.1f} '
                f'{high:.1f}h6" stroke="{colour}" stroke-opacity="0.45" fill="none"/>'
            )
    parts.append(
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{3 if line.strong else 1.8}" '
        f'stroke-linejoin="round"{dash}/>'
    )
    parts += [_marker(marker, x(point.x), y(point.y), colour, point.label) for point in points]
    return [*parts, "</g>"]


def _legend(line: Line, index: int, left: float) -> list[str]:
    colour, marker, dash = _style(index)
    at = TOP + 8 + ROW * index
    short = line.name if len(line.name) <= LONGEST else f"{line.name[: LONGEST - 1]}…"
    return [
        f'<line x1="{left}" y1="{at}" x2="{left + 28}" y2="{at}" stroke="{colour}" '
        f'stroke-width="{3 if line.strong else 1.8}"{dash}/>',
        _marker(marker, left + 14, at, colour, line.name),
        _text(left + 36, at + 4.5, short, weight=600 if line.strong else 400),
    ]


def _style(index: int) -> tuple[str, str, str]:
    """Return a line's colour, marker, and dashes as an attribute."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], f' stroke-dasharray="{dash}"' if dash else ""


def _marker(kind: str, x: float, y: float, colour: str, label: str) -> str:
    corners = {
        "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        "triangle": ((0, -5.6), (5.2, 4), (-5.2, 4)),
        "diamond": ((0, -6), (5.4, 0), (0, 6), (-5.4, 0)),
        "down": ((0, 5.6), (5.2, -4), (-5.2, -4)),
    }
    rest = f'fill="{colour}" stroke="#ffffff" stroke-width="1.2"><title>{escape(label)}</title>'
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.8" {rest}</circle>'
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[kind])
    return f'<polygon points="{places}" {rest}</polygon>'


def _text(
    x: float,
    y: float,
    text: str,
    colour: str = INK,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
    halo: bool = False,
    extra: str = "",
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"{extra}'
    words = escape(text)
    # A halo keeps a text legible where lines run through it; drawn apart, as not every viewer knows paint-order.
    rim = f'<text {place} stroke="#ffffff" stroke-width="4" aria-hidden="true">{words}</text>' if halo else ""
    return f'{rim}<text {place} fill="{colour}">{words}</text>'
