"""Pictures of importance and of kept tokens: which pixels change, and how."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pgp_lightning.evaluation.overlay import HEAT, THUMBNAIL, draw_heat, draw_kept
from pgp_lightning.vlm.tiles import TileGrid, TileRule
from tests.unit.evaluation.results_made import FULL, GRID

COLOUR = (10, 200, 60)
IMAGE = Image.new("RGB", (64, 32), COLOUR)  # a tile's token covers 16 x 16 pixels, one of the thumbnail 32 x 16


def drawn_kept(*tokens: int, grid: TileGrid = GRID, image: Image.Image = IMAGE) -> np.ndarray:
    keep = np.zeros(grid.tokens, dtype=bool)
    keep[list(tokens)] = True
    return np.asarray(draw_kept(image, grid, keep))


def clear(pixels: np.ndarray, colour: tuple[int, int, int] = COLOUR) -> np.ndarray:
    return (pixels == colour).all(-1)


def test_the_grid_is_as_the_tests_think():
    assert GRID.tokens == FULL
    assert drawn_kept().shape == (32, 64, 3)


def test_a_token_of_a_tile_clears_its_own_place():
    # Token 6 is the third of the second tile: second row, first column of its right half.
    expected = np.zeros((32, 64), dtype=bool)
    expected[16:32, 32:48] = True
    np.testing.assert_array_equal(clear(drawn_kept(6)), expected)


def test_a_token_of_the_thumbnail_clears_its_place_inside_an_outline():
    # Token 9 is the thumbnail's second: the upper right quarter.
    pixels = drawn_kept(9)
    outline, inside = np.zeros((32, 64), dtype=bool), np.zeros((32, 64), dtype=bool)
    outline[0:16, 32:64] = True
    inside[1:15, 33:63] = True
    np.testing.assert_array_equal(clear(pixels), inside)
    np.testing.assert_array_equal(clear(pixels, THUMBNAIL), outline & ~inside)


def test_tokens_of_both_views_add_up():
    both = clear(drawn_kept(6, 9)) | clear(drawn_kept(6, 9), THUMBNAIL)
    alone = clear(drawn_kept(6)) | clear(drawn_kept(9)) | clear(drawn_kept(9), THUMBNAIL)
    np.testing.assert_array_equal(both, alone)


def test_every_token_kept_leaves_no_place_veiled_and_none_clears_nothing():
    assert clear(drawn_kept(*range(8))).all()
    assert not clear(drawn_kept()).any()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
def test_what_is_kept_stands_out_from_black_and_white(colour: tuple[int, int, int]):
    pixels = drawn_kept(0, image=Image.new("RGB", (64, 32), colour)).astype(int)
    assert abs(pixels[0, 0] - pixels[-1, -1]).min() > 60


def test_odd_sizes_leave_no_gap():
    grid, image = TileGrid(3, 1, 7, False), Image.new("RGB", (101, 37), COLOUR)
    assert clear(drawn_kept(*range(grid.tokens), grid=grid, image=image)).all()
    # Token by token, every pixel belongs to exactly one.
    assert sum(clear(drawn_kept(token, grid=grid, image=image)).sum() for token in range(grid.tokens)) == 101 * 37


def test_padding_lies_outside_the_image():
    # A wide image padded to a square: the upper and lower quarter of the tile show none of it.
    grid = TileRule(tile_size=8, tokens_per_side=4, max_tiles=1, fit="pad").grid(64, 32)
    assert not clear(drawn_kept(*range(4), *range(12, 16), grid=grid)).any()
    assert clear(drawn_kept(*range(4, 12), grid=grid)).all()


def test_a_token_half_on_padding_clears_the_other_half():
    # Three tokens along 64 pixels of the square, of which the image fills 16 to 48: the first ends at 21.3.
    grid = TileRule(tile_size=6, tokens_per_side=3, max_tiles=1, fit="pad").grid(64, 32)
    expected = np.zeros((32, 64), dtype=bool)
    expected[:5, :21] = True
    np.testing.assert_array_equal(clear(drawn_kept(0, grid=grid)), expected)


def test_the_image_stays_as_it_is():
    image = Image.new("L", (64, 32), 200)
    draw_kept(image, GRID, np.ones(FULL, dtype=bool))
    draw_heat(image, GRID, np.arange(float(FULL)))
    assert image.mode == "L"
    assert image.getextrema() == (200, 200)


def heat(values: list[float], image: Image.Image = IMAGE) -> np.ndarray:
    return np.asarray(draw_heat(image, GRID, np.array(values))).astype(int)


def test_heat_spans_least_to_greatest_in_the_tokens_places():
    pixels = heat([0.0] * 6 + [4.0, 2.0] + [0.0] * 3 + [4.0])
    # Grey below, 72 % of the colour above.
    grey = np.asarray(IMAGE.convert("L"))[0, 0]

    def expected(colour: np.ndarray) -> np.ndarray:
        return np.round(0.28 * grey + 0.72 * colour).astype(int)

    assert abs(pixels[8, 2] - expected(HEAT[0])).max() <= 1  # token 0
    assert abs(pixels[17, 33] - expected(HEAT[-1])).max() <= 1  # token 6, the greatest
    assert abs(pixels[17, 49] - expected(HEAT[2])).max() <= 1  # token 7, half way
    # The thumbnail's last token, a square of a quarter of its side in the middle of its cell, drawn opaque.
    assert (pixels[24, 48] == HEAT[-1]).all()
    assert (pixels[22:26, 44:52] == HEAT[-1]).all()
    assert not (pixels[21, 44:52] == HEAT[-1]).all(-1).any()


def test_brightness_rises_with_importance():
    brightness = HEAT @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) > 15).all()


def test_tokens_without_a_score_stay_grey():
    pixels = heat([-np.inf] * 4 + [1.0, 2.0, 3.0, 4.0] + [-np.inf] * 4)
    left = pixels[:, :32]
    assert (left == left[0, 0]).all()
    assert np.ptp(left[0, 0]) == 0
    assert np.ptp(pixels[0, 63]) > 0


@pytest.mark.parametrize("values", [[1.0] * FULL, [-np.inf] * FULL])
def test_equal_values_and_none_at_all_are_drawn(values: list[float]):
    pixels = heat(values)
    assert (pixels >= 0).all()
    assert (pixels <= 255).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"each of 12 visual tokens, got \(11,\)"):
        draw_heat(IMAGE, GRID, np.zeros(11))
    with pytest.raises(ValueError, match="each of 12 visual tokens"):
        draw_kept(IMAGE, GRID, np.zeros(13, dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        heat([np.nan] * FULL)
