"""Pictures of what a method looked at and what it kept, drawn over the image itself.

Unlike the pictures that training logs (`training/images.py`, tiles put together again, thumbnail beside them), these
show the image as it was given, whatever its tiles show of it, and both views of a place at once: tokens of tiles fill
their area, tokens of the thumbnail are drawn upon it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pgp_lightning.vlm.tiles import TileGrid

__all__ = ["draw_heat", "draw_kept"]

THUMBNAIL = (255, 140, 0)
# What no kept token shows lies behind a veil; of a middle tone, so that black stands out from it and white as well.
VEIL = np.array((126, 133, 148), dtype=np.float32)
VEILED = 0.8
OPACITY = 0.72  # of the heat over the grey image
# From cold to hot, rising in brightness, so that it also reads in grey and under colour blindness.
HEAT = np.array([(20, 16, 70), (95, 30, 125), (190, 55, 95), (240, 130, 40), (252, 240, 150)], dtype=np.float32)


def draw_kept(image: Image.Image, grid: TileGrid, keep: np.ndarray) -> Image.Image:
    """Lay a grey veil over the image where no kept token covers it.

    A place is clear if a token of a tile or one of the thumbnail covering it is kept; the latter's cells are outlined
    in orange.

    Args:
        image: any PIL image; it stays as it is.
        grid: how it was tiled, with M visual tokens.
        keep: bool (M,).

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: if there are not M values.
    """
    cells, own = _cells(image, grid, keep.shape)
    clear = np.zeros((image.height, image.width, 1), dtype=bool)
    for left, top, right, bottom in cells[keep.astype(bool)]:
        clear[top:bottom, left:right] = True
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    veiled = (1 - VEILED) * np.asarray(image.convert("L"), dtype=np.float32)[..., None] + VEILED * VEIL
    drawn = Image.fromarray(np.where(clear, pixels, veiled).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for left, top, right, bottom in cells[own:][keep[own:].astype(bool)]:
        if right > left and bottom > top:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=THUMBNAIL, width=_stroke(image))
    return drawn


def draw_heat(image: Image.Image, grid: TileGrid, importance: np.ndarray) -> Image.Image:
    """Lay the importance over a grey copy of the image, from dark blue (least) to light yellow (most).

    Tokens of tiles fill their area; those of the thumbnail are squares in the middle of theirs. Colours span the finite
    values of both; tokens without a score (-inf) are left grey.

    Args:
        image: any PIL image; it stays as it is.
        grid: how it was tiled, with M visual tokens.
        importance: (M,), -inf where a token has no score.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: if there are not M values, or one is NaN.
    """
    cells, own = _cells(image, grid, importance.shape)
    values = importance.astype(np.float64)
    if np.isnan(values).any():
        raise ValueError("the importance holds NaN")
    scored = np.isfinite(values)
    colours = _colours(values, scored)
    drawn = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32).copy()
    for (left, top, right, bottom), colour in zip(cells[:own][scored[:own]], colours[:own][scored[:own]], strict=True):
        drawn[top:bottom, left:right] *= 1 - OPACITY
        drawn[top:bottom, left:right] += OPACITY * colour
    for (left, top, right, bottom), colour in zip(cells[own:][scored[own:]], colours[own:][scored[own:]], strict=True):
        x, y = (right - left) * 3 // 8, (bottom - top) * 3 // 8
        drawn[top + y : bottom - y, left + x : right - x] = colour
    return Image.fromarray(drawn.round().astype(np.uint8))


def _cells(image: Image.Image, grid: TileGrid, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Return the pixels that each token covers, int (M, 4), cut to the image, and how many tokens are tiles' own."""
    if shape != (grid.tokens,):
        raise ValueError(f"expected one value for each of {grid.tokens} visual tokens, got {shape}")
    size = np.array(image.size * 2)
    # Neighbours share their edge, so rounding leaves neither gap nor overlap; padding lies outside and shrinks to none.
    cells = np.round(grid.rectangles() * size).astype(int).clip(0, size)
    return cells, grid.columns * grid.rows * grid.tokens_per_side**2


def _stroke(image: Image.Image) -> int:
    return max(1, round(max(image.size) / 224))


def _colours(values: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Return float32 (M, 3) colours of values, by their place between least and greatest; meaningless if unscored."""
    known = values[scored] if scored.any() else np.zeros(1)
    low, high = known.min(), known.max()
    share = np.where(scored, (np.where(scored, values, low) - low) / max(high - low, 1e-12), 0.0)
    place = share * (len(HEAT) - 1)
    knots = np.arange(len(HEAT))
    return np.stack([np.interp(place, knots, HEAT[:, c]) for c in range(3)], axis=1).astype(np.float32)
