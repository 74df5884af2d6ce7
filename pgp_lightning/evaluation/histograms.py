"""Histograms of several sources under each other, over one axis, as SVG for a page and as a picture.

Both are drawn from the same shapes, so they show the same. In the SVG colours are classes, which the page's style
defines for light and dark; the picture is light.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pgp_lightning.data.statistics import summarise
from pgp_lightning.evaluation.curve import COLOURS, ticks
from pgp_lightning.evaluation.text import unit

__all__ = ["BINS", "Histogram", "bin_edges", "draw_histograms", "histogram_svg"]

BINS = 40
WIDTH, LABELS, RIGHT, TOP, ROW, BAND, FOOT = 560, 132, 18, 34, 46, 36, 34
SCALE = 2  # pixels of the picture to one of the SVG
LONGEST = 20  # characters of a source's name
LIGHT = {"ink": "#1d2433", "faint": "#5b6475", "grid": "#e4e7ee", "mark": "#1d2433"}


class Row(NamedTuple):
    """A source's bins: how many values lie in each, and the middle one of the values, NaN without a value."""

    name: str
    counts: np.ndarray
    median: float


@dataclass(frozen=True)
class Histogram:
    """One quantity of all sources.

    Args:
        title: what is counted, with its unit.
        edges: of the bins, rising, float (bins + 1,).
        rows: the sources.
        log: whether the axis is logarithmic.
    """

    title: str
    edges: np.ndarray
    rows: Sequence[Row]
    log: bool = False

    @classmethod
    def of(cls, title: str, values: Sequence[tuple[str, np.ndarray]], scale: float = 1.0) -> Histogram:
        """Count the values of each source, int (n,), in common bins; the axis shows them divided by `scale`."""
        edges, log = bin_edges(np.concatenate([part for _, part in values]))
        rows = [
            Row(
                name, np.histogram(part, edges)[0], summary.median / scale if (summary := summarise(part)) else math.nan
            )
            for name, part in values
        ]
        return cls(title, edges / scale, rows, log)


def bin_edges(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return edges of at most so many bins for whole numbers, and whether the axis is logarithmic.

    Edges lie half way between whole numbers, so bins are never without one. Few different numbers have a bin each; a
    range of more than a factor of fifty is cut by ratios.
    """
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if high - low < BINS:
        return np.arange(low, high + 2) - 0.5, False
    if low > 0 and high / low > 50:
        cuts = np.unique(np.round(np.geomspace(low, high + 1, BINS + 1)))
        return cuts - 0.5, True
    step = math.ceil((high - low + 1) / BINS)
    return np.arange(low, high + step + 1, step) - 0.5, False


class _Box(NamedTuple):
    left: float
    top: float
    width: float
    height: float
    role: str
    label: str = ""


class _Words(NamedTuple):
    x: float
    y: float
    text: str
    role: str = "ink"
    size: int = 12
    anchor: Literal["start", "middle", "end"] = "start"


def _height(chart: Histogram) -> int:
    return TOP + ROW * len(chart.rows) + FOOT


def _shapes(chart: Histogram) -> list[_Box | _Words]:
    """Return a histogram's shapes, from back to front, in a field of WIDTH x its height."""
    low, high = float(chart.edges[0]), float(chart.edges[-1])
    left, right, bottom = LABELS, WIDTH - RIGHT, TOP + ROW * len(chart.rows)

    def axis(values: np.ndarray | float) -> np.ndarray:
        """Return places as shares of the axis's length."""
        if chart.log:
            return np.asarray(np.log(np.asarray(values) / low) / math.log(high / low))
        return np.asarray((np.asarray(values, dtype=np.float64) - low) / (high - low))

    shapes: list[_Box | _Words] = [_Words(12, 20, chart.title, size=14)]
    marks = [mark for mark in ticks(low, high, 9 if chart.log else 6, chart.log) if low <= mark <= high]
    for mark in marks:
        x = left + float(axis(mark)) * (right - left)
        shapes.append(_Box(x - 0.5, TOP, 1, bottom - TOP, "grid"))
        shapes.append(_Words(x, bottom + 16, _short(mark), "faint", 11, "middle"))
    places = left + axis(chart.edges) * (right - left)
    for number, row in enumerate(chart.rows):
        base = TOP + ROW * (number + 1) - 4
        shapes.append(_Words(left - 10, base - 8, _cut(row.name), anchor="end"))
        shapes.append(_Box(left, base, right - left, 1, "grid"))
        # Bins differ in width: what shows the share is the area.
        heights = row.counts / np.diff(places)
        heights = heights * BAND / max(float(heights.max()), 1e-12)
        for bin_number in np.flatnonzero(row.counts).tolist():
            start, end = (float(place) for place in places[bin_number : bin_number + 2])
            tall = max(float(heights[bin_number]), 0.75)  # a single value is to be seen
            ends = " to ".join(_short(edge) for edge in chart.edges[bin_number : bin_number + 2].tolist())
            label = f"{row.name}: {int(row.counts[bin_number]):,} from {ends}"
            gap = min(0.5, (end - start) / 4)
            shapes.append(_Box(start + gap, base - tall, end - start - 2 * gap, tall, _colour(number, chart), label))
        if math.isfinite(row.median):
            x = left + float(axis(row.median)) * (right - left)
            shapes.append(_Box(x - 0.75, base - BAND, 1.5, BAND + 3, "mark", f"median {_short(row.median)}"))
    return shapes


def _colour(number: int, chart: Histogram) -> str:
    """Return the role of a row's bars: the last of several rows is the sum's."""
    last = len(chart.rows) > 1 and number == len(chart.rows) - 1
    return "faint" if last else f"c{number % len(COLOURS)}"


def _short(value: float) -> str:
    """Write a number of the axis."""
    scale, prefix = unit([value])
    return f"{value / scale:.4g}{prefix}" if value >= 10_000 else f"{value:.5g}"


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def histogram_svg(chart: Histogram) -> str:
    """Return a histogram as an SVG element for an HTML page, whose style colours the classes of its shapes."""
    height, label = _height(chart), escape(chart.title, quote=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-label="{label}">']
    for shape in _shapes(chart):
        if isinstance(shape, _Words):
            parts.append(
                f'<text class="{shape.role}" x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" '
                f'text-anchor="{shape.anchor}">{escape(shape.text)}</text>'
            )
            continue
        title = f"<title>{escape(shape.label)}</title>" if shape.label else ""
        parts.append(
            f'<rect class="{shape.role}" x="{shape.left:.2f}" y="{shape.top:.2f}" width="{shape.width:.2f}" '
            f'height="{shape.height:.2f}">{title}</rect>'
        )
    return "\n".join([*parts, "</svg>"])


def draw_histograms(charts: Sequence[Histogram], heading: str, columns: int = 2) -> Image.Image:
    """Return the histograms as one RGB picture, in so many columns under a heading."""
    columns = min(columns, len(charts))
    rows = [charts[first : first + columns] for first in range(0, len(charts), columns)]
    heights = [max(map(_height, row)) for row in rows]
    head = 52
    size = (WIDTH * columns * SCALE, (head + sum(heights) + 12) * SCALE)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    _write(draw, _Words(12, 34, heading, size=18), 0, 0)
    top = head
    for row, height in zip(rows, heights, strict=True):
        for column, chart in enumerate(row):
            for shape in _shapes(chart):
                if isinstance(shape, _Words):
                    _write(draw, shape, WIDTH * column, top)
                else:
                    _fill(draw, shape, WIDTH * column, top)
        top += height
    return page


def _fill(draw: ImageDraw.ImageDraw, shape: _Box, x: float, y: float) -> None:
    left, top = round((x + shape.left) * SCALE), round((y + shape.top) * SCALE)
    right = max(left, round((x + shape.left + shape.width) * SCALE) - 1)
    bottom = max(top, round((y + shape.top + shape.height) * SCALE) - 1)
    colour = LIGHT.get(shape.role) or COLOURS[int(shape.role[1:])]
    draw.rectangle((left, top, right, bottom), fill=colour)


def _write(draw: ImageDraw.ImageDraw, shape: _Words, x: float, y: float) -> None:
    # Pillow's own font knows Latin letters only.
    text = shape.text.replace("…", "...").encode("latin-1", "replace").decode("latin-1")
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
    place = ((x + shape.x) * SCALE, (y + shape.y) * SCALE)
    draw.text(place, text, fill=LIGHT[shape.role], font=ImageFont.load_default(shape.size * SCALE), anchor=anchor)
