"""Tile geometry against slow twins and against what the original code does."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.tiles import TileGrid, TileRule, cut_tiles
from tests.tiny import GOLDEN, golden

GRIDS = st.builds(TileGrid, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())


def slow_grid(rule: TileRule, width: int, height: int) -> tuple[int, int]:
    """List all grids, look for the nearest ratios, and let the fill decide between equally near ones."""
    grids = []
    for tiles in range(rule.min_tiles, rule.max_tiles + 1):
        grids += [(columns, tiles // columns) for columns in range(1, tiles + 1) if tiles % columns == 0]
    nearest = min(abs(width / height - columns / rows) for columns, rows in grids)
    equal = [(c, r) for c, r in grids if abs(width / height - c / r) == nearest]
    filled = [(c, r) for c, r in equal[1:] if 2 * width * height > rule.tile_size**2 * c * r]
    return filled[-1] if filled else equal[0]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40), st.data())
def test_grid_equals_the_slow_twin(width: int, height: int, most: int, data: st.DataObject):
    rule = TileRule(tile_size=448, min_tiles=data.draw(st.integers(1, most)), max_tiles=most)
    grid = rule.grid(width, height)
    assert (grid.columns, grid.rows) == slow_grid(rule, width, height)
    assert grid.thumbnail == (grid.columns * grid.rows > 1)


@pytest.mark.parametrize("size", [(448, 448), (633, 633), (634, 634), (896, 448), (1266, 633), (1280, 640), (900, 900)])
def test_grid_on_exact_ties_equals_the_slow_twin(size: tuple[int, int]):
    # Ratios 1 and 2 are hit exactly by grids of several sizes; the image's area decides.
    for rule in (TileRule(max_tiles=4), TileRule(max_tiles=12), TileRule(max_tiles=40)):
        grid = rule.grid(*size)
        assert (grid.columns, grid.rows) == slow_grid(rule, *size)


@pytest.mark.parametrize(
    "case", golden("tile_grids.json"), ids=lambda c: f"{c['width']}x{c['height']}-{c['max_tiles']}"
)
def test_grid_equals_the_original(case: dict[str, int]):
    rule = TileRule(448, 16, case["min_tiles"], case["max_tiles"])
    grid = rule.grid(case["width"], case["height"])
    assert (grid.columns, grid.rows, grid.tiles) == (case["columns"], case["rows"], case["tiles"])
    assert grid.tokens == case["tiles"] * 256


def test_tiles_and_pixels_equal_the_original():
    (case,) = golden("picture.json")
    rule = TileRule(case["tile_size"], 2, 1, case["max_tiles"])
    tiles, grid = cut_tiles(Image.open(GOLDEN / case["file"]), rule)
    assert grid.tiles == len(tiles) == case["tiles"]
    assert hashlib.sha256(tiles.tobytes()).hexdigest() == case["sha256"]
    pixels = InternVL.normalise(torch.from_numpy(tiles)).flatten()
    for index, value in case["pixels"]:
        assert float(pixels[index]) == pytest.approx(value, abs=1e-6)


def test_no_thumbnail_for_one_tile_or_a_rule_without():
    assert TileRule(max_tiles=1).grid(900, 300) == TileGrid(1, 1, 16, False)
    assert TileRule(max_tiles=6, thumbnail=False).grid(900, 300) == TileGrid(3, 1, 16, False)


@pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3)])
def test_a_rule_refuses_limits_that_contradict_each_other(least: int, most: int):
    with pytest.raises(ValueError, match=f"1 <= min <= max, got {least} and {most}"):
        TileRule(min_tiles=least, max_tiles=most)


@given(GRIDS)
def test_untile_is_the_inverse_of_the_rectangles(grid: TileGrid):
    rectangles = grid.rectangles()
    assert rectangles.shape == (grid.tokens, 4)
    plane, thumbnail = grid.untile(np.arange(grid.tokens))
    assert (thumbnail is None) != grid.thumbnail
    for part in (plane, thumbnail):
        if part is None:
            continue
        height, width = part.shape
        for y in range(height):
            for x in range(width):
                expected = [x / width, y / height, (x + 1) / width, (y + 1) / height]
                assert rectangles[part[y, x]] == pytest.approx(expected)
    seen = np.concatenate([part.ravel() for part in (plane, thumbnail) if part is not None])
    assert sorted(seen) == list(range(grid.tokens))


def test_untile_refuses_another_number_of_values():
    with pytest.raises(ValueError, match="one value for each of 12 visual tokens"):
        TileGrid(2, 1, 2, True).untile(np.zeros(8))


@given(st.integers(5, 120), st.integers(5, 120), st.sampled_from(["RGB", "L", "RGBA", "P"]), st.integers(0, 99))
def test_every_token_shows_its_rectangle_of_the_image(width: int, height: int, mode: str, seed: int):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    rule = TileRule(tile_size=8, tokens_per_side=2, max_tiles=6)
    tiles, grid = cut_tiles(image, rule)
    assert tiles.dtype == np.uint8 and tiles.shape == (grid.tiles, 3, 8, 8) and tiles.flags.c_contiguous
    whole = np.asarray(image.convert("RGB").resize((8 * grid.columns, 8 * grid.rows), Image.Resampling.BICUBIC))
    small = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
    for token, rectangle in enumerate(grid.rectangles()):
        tile, place = divmod(token, 4)
        shown = tiles[tile, :, place // 2 * 4 :, place % 2 * 4 :][:, :4, :4].transpose(1, 2, 0)
        plane = small if grid.thumbnail and tile == grid.tiles - 1 else whole
        scale = np.array([plane.shape[1], plane.shape[0]] * 2)
        left, top, right, bottom = (rectangle * scale).round().astype(int)
        assert np.array_equal(shown, plane[top:bottom, left:right])


def test_a_lower_limit_of_tiles():
    image = Image.new("RGB", (80, 40))
    rule = TileRule(tile_size=8, tokens_per_side=2, min_tiles=2, max_tiles=8)
    assert cut_tiles(image, rule)[1] == TileGrid(4, 2, 2, True)
    assert cut_tiles(image, rule, 3)[1] == TileGrid(2, 1, 2, True)
    tiles, grid = cut_tiles(image, rule, 1)
    assert grid == TileGrid(1, 1, 2, False) and len(tiles) == 1
