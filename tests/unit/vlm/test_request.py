"""Requests: what they refuse, and turns that share an image."""

from __future__ import annotations

import pytest
import torch

from pgp_lightning.vlm.request import Request
from tests.tiny import GRIDS, QUESTIONS, tiny_request


def test_counts_follow_the_images():
    request = tiny_request(QUESTIONS, images=(2, 0, 2, 1))
    assert len(request) == 4 and request.counts == [20, 12, 20, 4]
    assert tiny_request().images == [0, 1, 2]
    moved = request.to("cpu")
    assert torch.equal(moved.tiles, request.tiles) and moved.images == [2, 0, 2, 1] and moved.relevant is None


@pytest.mark.parametrize("images", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_refuses_images_that_are_not_there(images: list[int]):
    with pytest.raises(ValueError, match="3 questions need an index each into 3 images"):
        Request(list(QUESTIONS[:3]), tiny_request().tiles, list(GRIDS), images)


@pytest.mark.parametrize("tiles", [torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(9, 3, 32, 32)])
def test_refuses_other_tiles(tiles: torch.Tensor):
    with pytest.raises(ValueError, match=r"expected uint8 tiles of shape \(9, 3, S, S\)"):
        Request(list(QUESTIONS[:3]), tiles, list(GRIDS))
