"""Tile geometry: an image becomes equal square tiles, and every visual token has a place on it.

InternVL's dynamic preprocessing (`stretch`): choose the grid of tiles whose aspect ratio is nearest to the image's,
resize the image onto it without keeping the ratio, cut row by row, and append the whole image as a thumbnail when
there is more than one tile. LLaVA-1.5 has one tile: the image padded to a square (`pad`, the paper's), or its middle
(`crop`, what the processors of converted checkpoints do). Visual tokens lie in raster order inside a tile, tiles in
raster order, the thumbnail last ("tile-raster order").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Empty", "TileGrid", "TileRule", "as_rgb", "cut_tiles", "new_tiles"]

MOST_NARROW = 100  # greatest ratio of sides with `crop`, which would blow a sliver up to gigabytes
MOST_PADDED = 10_000  # greatest side with `pad`, for the same reason: the square is made in memory


# The shape of tiles -> a contiguous uint8 array of it, whatever it holds.
Empty = Callable[[tuple[int, ...]], np.ndarray]


def new_tiles(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array in memory of its own."""
    return np.empty(shape, dtype=np.uint8)


# A tuple because it travels in batches, and Lightning refuses to look for tensors in frozen dataclasses.
class TileGrid(NamedTuple):
    """How one image was tiled, and where each of its visual tokens lies.

    Args:
        columns: tiles side by side.
        rows: tiles below each other.
        tokens_per_side: visual tokens along one side of a tile.
        thumbnail: whether a view of the whole follows.
        frame: what the tiles show, as left, top, right, bottom in fractions of the image: more than the image if it
            was padded, less if it was cropped.
    """

    columns: int
    rows: int
    tokens_per_side: int
    thumbnail: bool
    frame: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return self.columns * self.rows + int(self.thumbnail)

    @property
    def tokens(self) -> int:
        """Number M of visual tokens."""
        return self.tiles * self.tokens_per_side**2

    def rectangles(self) -> np.ndarray:
        """Place of every visual token: float64 (M, 4) of left, top, right, bottom as fractions of the image.

        Tokens that show padding lie outside [0, 1].
        """
        side = self.tokens_per_side

        def raster(columns: int, rows: int) -> np.ndarray:
            """Return the cells of a columns x rows raster, (rows, columns, 4)."""
            x, y = np.meshgrid(np.arange(columns), np.arange(rows))
            return np.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], axis=-1)

        cells = raster(self.columns * side, self.rows * side)
        tiles = cells.reshape(self.rows, side, self.columns, side, 4).transpose(0, 2, 1, 3, 4)
        parts = [tiles.reshape(-1, 4)]
        if self.thumbnail:
            parts.append(raster(side, side).reshape(-1, 4))
        left, top, right, bottom = self.frame
        origin, size = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
        return np.asarray(np.concatenate(parts) * size + origin)

    def untile(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Lay per-token values (M,) out as on the image.

        Returns:
            The tiles' values, (rows * side, columns * side), and the thumbnail's, (side, side), or None.

        Raises:
            ValueError: if there are not M values.
        """
        if values.shape != (self.tokens,):
            raise ValueError(f"expected one value for each of {self.tokens} visual tokens, got {values.shape}")
        side = self.tokens_per_side
        count = self.columns * self.rows * side**2
        tiles = values[:count].reshape(self.rows, self.columns, side, side).transpose(0, 2, 1, 3)
        thumbnail = values[count:].reshape(side, side) if self.thumbnail else None
        return tiles.reshape(self.rows * side, self.columns * side), thumbnail


@dataclass(frozen=True)
class TileRule:
    """How a family tiles images.

    Args:
        tile_size: side of a tile in pixels.
        tokens_per_side: visual tokens along one side of a tile.
        min_tiles: least number of tiles, without the thumbnail.
        max_tiles: greatest number of tiles, without the thumbnail.
        thumbnail: whether an image of more than one tile is followed by a thumbnail of the whole.
        fit: how an image is made to fit: resized without keeping its ratio, padded to a square, or its middle square
            (`pad` and `crop` have one tile).
        padding: colour of the padding, RGB.
    """

    tile_size: int = 448
    tokens_per_side: int = 16
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    padding: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tiles must satisfy 1 <= min <= max, got {self.min_tiles} and {self.max_tiles}")
        if self.fit not in ("stretch", "pad", "crop") or (self.fit != "stretch" and self.max_tiles > 1):
            raise ValueError(f"fit must be stretch, or pad or crop with one tile, got {self.fit!r}, {self.max_tiles}")
        object.__setattr__(self, "padding", tuple(self.padding))  # JSON has lists

    @property
    def most_bytes(self) -> int:
        """Most bytes that the tiles of an image can take."""
        return (self.max_tiles + int(self.thumbnail and self.max_tiles > 1)) * 3 * self.tile_size**2

    def grid(self, width: int, height: int) -> TileGrid:
        """Choose the grid for an image of width x height pixels."""
        if self.fit != "stretch":
            left, top, right, bottom = self._square(width, height)
            frame = (left / width, top / height, right / width, bottom / height)
            return TileGrid(1, 1, self.tokens_per_side, False, frame)
        ratio, area = width / height, width * height
        best, best_difference = (1, 1), float("inf")
        for columns, rows in _shapes(self.min_tiles, self.max_tiles):
            difference = abs(ratio - columns / rows)
            # On an exact tie a larger grid wins only if the image fills more than half of it.
            if difference < best_difference or (
                difference == best_difference and area > 0.5 * self.tile_size**2 * columns * rows
            ):
                best, best_difference = (columns, rows), difference
        columns, rows = best
        return TileGrid(columns, rows, self.tokens_per_side, self.thumbnail and columns * rows > 1)

    def _square(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the square that the one tile shows, in pixels of the image."""
        if self.fit == "pad":
            side = max(width, height)
            if side > MOST_PADDED:
                raise ValueError(f"an image of {width} x {height} pixels is too long to be padded to a square")
            left, top = -((side - width) // 2), -((side - height) // 2)
            return left, top, left + side, top + side
        # The short side is resized to the tile first and the long one cut in whole pixels of the result.
        scale = self.tile_size / min(width, height)
        resized = self._resized(width, height)
        x, y = ((extent - self.tile_size) // 2 / scale for extent in resized)
        return x, y, x + min(width, height), y + min(width, height)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of an image whose short side is resized to the tile."""
        short, long = sorted((width, height))
        if long > MOST_NARROW * short:
            raise ValueError(f"an image of {width} x {height} pixels is too narrow for the middle square of it")
        extent = int(self.tile_size * long / short)
        return (self.tile_size, extent) if width <= height else (extent, self.tile_size)

    def cut(self, image: Image.Image, empty: Empty = new_tiles) -> tuple[np.ndarray, TileGrid]:
        """Cut an RGB image into tiles: uint8 (T, 3, tile_size, tile_size), thumbnail last, and their grid."""
        grid, size = self.grid(*image.size), self.tile_size
        if self.fit == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), self.padding)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        elif self.fit == "crop":
            image = image.resize(self._resized(*image.size), Image.Resampling.BICUBIC)
            x, y = ((extent - size) // 2 for extent in image.size)
            image = image.crop((x, y, x + size, y + size))
        canvas = np.asarray(image.resize((size * grid.columns, size * grid.rows), Image.Resampling.BICUBIC))
        cells = canvas.reshape(grid.rows, size, grid.columns, size, 3).transpose(0, 2, 4, 1, 3)
        tiles = empty((grid.tiles, 3, size, size))
        tiles[: grid.columns * grid.rows].reshape(cells.shape)[:] = cells
        if grid.thumbnail:
            tiles[-1] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return tiles, grid


@lru_cache(maxsize=64)
def _shapes(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return the columns and rows of all grids with so many tiles, by their number of tiles."""
    sides = range(1, most + 1)
    shapes = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def cut_tiles(
    image: Image.Image, rule: TileRule, max_tiles: int | None = None, empty: Empty = new_tiles
) -> tuple[np.ndarray, TileGrid]:
    """Cut an image into tiles, as it is stored: a rotation noted in its EXIF data is not applied.

    Args:
        image: any PIL image; it is converted to RGB as the original codes do, except that 16-bit greys are scaled to
            8 bits (PIL would clip them, which whitens the picture).
        rule: the family's rule.
        max_tiles: a lower limit on the tiles than the rule's, e.g. to fit a length budget.
        empty: makes the contiguous array that the tiles are written to.

    Returns:
        uint8 pixels (T, 3, tile_size, tile_size), thumbnail last, and the grid.
    """
    if max_tiles is not None:
        rule = replace(rule, min_tiles=min(rule.min_tiles, max_tiles), max_tiles=max_tiles)
    return rule.cut(as_rgb(image), empty)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return any PIL image as RGB, itself if it is; 16-bit greys are scaled to 8 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    # Converting what is RGB already would copy it.
    return image if image.mode == "RGB" else image.convert("RGB")
