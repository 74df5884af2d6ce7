"""Tile geometry of the InternVL family: an image becomes equal square tiles, and a visual token has a place on it.

The rule is InternVL's dynamic preprocessing: choose the grid of tiles whose aspect ratio is nearest to the
image's, resize the image onto it without keeping the ratio, cut row by row, and append the whole image as a
thumbnail when there is more than one tile. Visual tokens lie in raster order inside a tile, tiles in raster
order, the thumbnail last ("tile-raster order").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["TileGrid", "TileRule", "cut_tiles"]


@dataclass(frozen=True)
class TileGrid:
    """How one image was tiled, and where each of its visual tokens lies."""

    columns: int
    rows: int
    tokens_per_side: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return self.columns * self.rows + int(self.thumbnail)

    @property
    def tokens(self) -> int:
        """Number M of visual tokens."""
        return self.tiles * self.tokens_per_side**2

    def rectangles(self) -> np.ndarray:
        """Place of every visual token: float64 (M, 4) of left, top, right, bottom as fractions of the image."""
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
        return np.concatenate(parts)

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
    """

    tile_size: int = 448
    tokens_per_side: int = 16
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tiles must satisfy 1 <= min <= max, got {self.min_tiles} and {self.max_tiles}")

    def grid(self, width: int, height: int) -> TileGrid:
        """Choose the grid for an image of width x height pixels (InternVL's dynamic preprocessing)."""
        candidates = sorted(
            (
                (columns, rows)
                for columns in range(1, self.max_tiles + 1)
                for rows in range(1, self.max_tiles + 1)
                if self.min_tiles <= columns * rows <= self.max_tiles
            ),
            key=lambda grid: grid[0] * grid[1],
        )
        ratio, area = width / height, width * height
        best, best_difference = (1, 1), float("inf")
        for columns, rows in candidates:
            difference = abs(ratio - columns / rows)
            # On an exact tie a larger grid wins only if the image fills more than half of it.
            if difference < best_difference or (
                difference == best_difference and area > 0.5 * self.tile_size**2 * columns * rows
            ):
                best, best_difference = (columns, rows), difference
        columns, rows = best
        return TileGrid(columns, rows, self.tokens_per_side, self.thumbnail and columns * rows > 1)


def cut_tiles(image: Image.Image, rule: TileRule, max_tiles: int | None = None) -> tuple[np.ndarray, TileGrid]:
    """Cut an image into tiles.

    Args:
        image: any PIL image; it is converted to RGB.
        rule: the family's rule.
        max_tiles: a lower limit on the tiles than the rule's, e.g. to fit a length budget.

    Returns:
        uint8 pixels (T, 3, tile_size, tile_size), thumbnail last, and the grid.
    """
    if max_tiles is not None:
        rule = TileRule(rule.tile_size, rule.tokens_per_side, min(rule.min_tiles, max_tiles), max_tiles, rule.thumbnail)
    image = image.convert("RGB")
    grid, size = rule.grid(*image.size), rule.tile_size
    canvas = np.asarray(image.resize((size * grid.columns, size * grid.rows), Image.Resampling.BICUBIC))
    tiles = canvas.reshape(grid.rows, size, grid.columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    if grid.thumbnail:
        small = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, small[None]])
    return np.ascontiguousarray(tiles), grid
