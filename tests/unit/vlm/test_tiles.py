"""Tile geometry against slow twins and against what the original code does."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image

from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import Llava
from pgp_lightning.vlm.tiles import TileGrid, TileRule, cut_tiles
from tests.tiny import GOLDEN, golden, golden_object

UNCUT = (0.0, 0.0, 1.0, 1.0)
GRIDS = st.builds(
    TileGrid, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans(), frame=st.just(UNCUT)
)


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


GRID_ROWS = golden_object("internvl_preprocess/tile_grids.json")["rows"]


@pytest.mark.parametrize("most", sorted({row[3] for row in GRID_ROWS}))
def test_grids_equal_the_original(most: int):
    rows = [row for row in GRID_ROWS if row[3] == most]
    for width, height, least, _, columns, lines, tiles in rows:
        grid = TileRule(448, 16, least, most).grid(width, height)
        assert (grid.columns, grid.rows, grid.tiles) == (columns, lines, tiles), (width, height, least)
        assert grid.tokens == tiles * 256 == len(grid.rectangles())


@pytest.mark.parametrize("case", list(enumerate(golden("internvl_preprocess/pixels.json"))), ids=lambda c: c[1]["file"])
def test_tiles_and_pixels_equal_the_original(case: tuple[int, dict[str, Any]]):
    number, facts = case
    expected = np.load(GOLDEN / "internvl_preprocess" / "pixels.npz")
    rule = TileRule(facts["image_size"], 2, 1, facts["max_num"])
    tiles, grid = cut_tiles(Image.open(GOLDEN / "internvl_preprocess" / facts["file"]), rule)
    assert grid.tiles == facts["num_tiles"]
    theirs = expected[f"tiles_{number}"].transpose(0, 3, 1, 2)
    # Made with Pillow 13, which resizes some pictures differently than earlier releases: by up to 2 of 255.
    apart = 0 if Version(PIL.__version__) >= Version("13") else 2
    assert np.abs(tiles.astype(int) - theirs.astype(int)).max() <= apart
    pixels = InternVL.normalise(torch.from_numpy(theirs))
    assert np.array_equal(pixels.numpy(), expected[f"pixel_values_{number}"])


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])
def test_llava_pixels_equal_the_original(fit: str, number: int):
    facts = golden_object("llava15/pixels.json")
    expected = np.load(GOLDEN / "llava15" / "pixels.npz")[f"{'pad' if fit == 'pad' else 'center_crop'}_{number}"]
    rule = TileRule(facts["resolution"], 6, 1, 1, thumbnail=False, fit=fit)  # type: ignore[arg-type]
    tiles, grid = cut_tiles(Image.open(GOLDEN / "internvl_preprocess" / f"img_{number}.png"), rule)
    assert grid.tokens == 36 and tiles.shape == (1, 3, 84, 84)
    pixels = Llava.normalise(torch.from_numpy(tiles)).numpy()
    # The original multiplies by 1 / 255 and this code divides: equal grey levels, pixels up to rounding.
    grey = (expected * np.array(Llava.std)[:, None, None] + np.array(Llava.mean)[:, None, None]) * 255
    assert np.array_equal(grey.round().astype(np.uint8).reshape(tiles.shape), tiles)
    assert np.abs(pixels - expected.reshape(pixels.shape)).max() < 2e-6


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["pad", "crop"]))
def test_the_frame_is_what_a_square_tile_shows(width: int, height: int, fit: str):
    if fit == "crop" and max(width, height) > 40 * min(width, height):
        return
    rule = TileRule(16, 4, 1, 1, thumbnail=False, fit=fit)  # type: ignore[arg-type]
    left, top, right, bottom = rule.grid(width, height).frame
    side = max(width, height) if fit == "pad" else min(width, height)
    assert ((right - left) * width, (bottom - top) * height) == pytest.approx((side, side))
    pixel = max(1.0, side / 16)  # of the image, or of the resized image
    assert abs((left + right) / 2 * width - width / 2) <= pixel
    assert abs((top + bottom) / 2 * height - height / 2) <= pixel
    rectangles = rule.grid(width, height).rectangles()
    assert rectangles[0, :2] == pytest.approx((left, top)) and rectangles[-1, 2:] == pytest.approx((right, bottom))


def test_tokens_of_a_padded_image_lie_where_they_show():
    # A white square in the right half of a wide picture: the tokens that see it have their rectangles there.
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    rule = TileRule(64, 8, 1, 1, thumbnail=False, fit="pad")
    tiles, grid = cut_tiles(image, rule)
    seen = tiles[0].reshape(3, 8, 8, 8, 8).min(axis=(0, 2, 4)) > 200
    rectangles = grid.rectangles()[seen.ravel()]
    assert len(rectangles) == 16
    assert rectangles.min(axis=0)[:2] == pytest.approx((0.5, 0)) and rectangles.max(axis=0)[2:] == pytest.approx((1, 1))


def test_a_sliver_is_not_blown_up():
    with pytest.raises(ValueError, match="1 x 4000 pixels is too narrow"):
        TileRule(336, 24, 1, 1, thumbnail=False, fit="crop").grid(1, 4000)


@pytest.mark.parametrize("fit", ["pad", "crop", "shrink"])
def test_a_square_has_one_tile(fit: str):
    with pytest.raises(ValueError, match="fit must be stretch, or pad or crop with one tile"):
        TileRule(fit=fit)  # type: ignore[arg-type]


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


def test_a_larger_grid_of_the_same_ratio_needs_more_than_half_of_its_pixels():
    rule = TileRule(tile_size=6, tokens_per_side=2, max_tiles=8)
    # The nearest ratio is 2: a grid of 4 x 2 tiles has 288 pixels.
    for size, grid in (((18, 8), (2, 1)), ((19, 8), (4, 2)), ((17, 8), (2, 1))):
        found = rule.grid(*size)
        assert (found.columns, found.rows) == grid, size
