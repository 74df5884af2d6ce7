"""Batches: rows are turns, images are shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgp_lightning.data.collate import Batch, Item, collate
from pgp_lightning.data.conversation import Conversation, Turn
from pgp_lightning.vlm.tiles import TileGrid


def conversation(key: str, grid: TileGrid, turns: tuple[Turn, ...]) -> Conversation:
    """Return a conversation whose pixels are all its number of turns."""
    return Conversation(key, turns, np.full((grid.tiles, 3, 8, 8), len(turns), dtype=np.uint8), grid)


def test_rows_are_turns_that_share_their_image() -> None:
    small, large = TileGrid(1, 1, 2, False), TileGrid(2, 1, 2, True)
    first = conversation("k1", large, (Turn("q1", "a1", (0, 11), "x"), Turn("q2", "a2")))
    second = conversation("k2", small, (Turn("q3", "a3", (2,)),))
    batch = collate([Item(first, "s", 40), Item(second, "t", 41)], epoch=3, rejected={"s/no-image": 2})
    assert len(batch) == 3 and batch.epoch == 3 and batch.rejected == {"s/no-image": 2}
    assert batch.request.questions == ["q1", "q2", "q3"] and batch.answers == ["a1", "a2", "a3"]
    assert batch.request.images == [0, 0, 1] and batch.request.counts == [12, 12, 4]
    assert batch.keys == ["k1", "k1", "k2"] and batch.sources == ["s", "s", "t"] and batch.types == ["x", "", ""]
    assert batch.indices == [40, 40, 41] and batch.turns == [0, 1, 0]
    assert batch.records() == {"s": 1, "t": 1}
    assert batch.request.tiles.shape == (4, 3, 8, 8) and batch.request.tiles.dtype == torch.uint8
    assert batch.request.tiles[:, 0, 0, 0].tolist() == [2, 2, 2, 1]
    relevant = batch.request.relevant
    assert relevant is not None and relevant.shape == (3, 12)
    assert [row.nonzero().flatten().tolist() for row in relevant] == [[0, 11], [], [2]]


def test_no_relevant_tokens_is_none() -> None:
    grid = TileGrid(1, 1, 2, False)
    assert collate([Item(conversation("k", grid, (Turn("q", "a"),)), "s", 0)]).request.relevant is None


def test_to_moves_tensors_only() -> None:
    grid = TileGrid(1, 1, 2, False)
    batch = collate([Item(conversation("k", grid, (Turn("q", "a", (1,)),)), "s", 0)], rejected={"s/no-image": 1})
    moved = batch.to("meta")
    assert moved.request.tiles.device.type == "meta" and moved.keys == ["k"] and moved.rejected == batch.rejected
    assert moved.request.relevant is not None and moved.request.relevant.device.type == "meta"
    assert batch.request.tiles.device.type == "cpu"


def mixed() -> Batch:
    """Return three questions about a large image and one about a small one."""
    large, small = TileGrid(2, 1, 2, True), TileGrid(1, 1, 2, False)
    first = conversation("k1", large, (Turn("q1", "a1", (0, 11), "x"), Turn("q2", "a2"), Turn("q3", "a3", (5,))))
    second = conversation("k2", small, (Turn("q4", "a4", (2,)),))
    batch = collate([Item(first, "s", 40), Item(second, "t", 41)], epoch=3, rejected={"s/no-image": 2})
    return replace(batch, request=replace(batch.request, other_questions=["o1", "o2", "o3", "o4"]))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 0], [2], [1, 1]])
def test_select_takes_all_that_belongs_to_a_row(rows: list[int]) -> None:
    batch = mixed()
    chosen = batch.select(rows)
    assert len(chosen) == len(chosen.request) == len(rows)
    for name in ("answers", "sources", "keys", "types", "indices", "turns"):
        assert getattr(chosen, name) == [getattr(batch, name)[row] for row in rows], name
    for name in ("questions", "images", "counts", "other_questions"):
        assert getattr(chosen.request, name) == [getattr(batch.request, name)[row] for row in rows], name
    assert chosen.epoch == 3 and chosen.rejected == {"s/no-image": 2}
    assert chosen.request.tiles is batch.request.tiles and chosen.request.grids == batch.request.grids
    assert batch.request.relevant is not None and chosen.request.relevant is not None
    assert chosen.request.relevant.tolist() == batch.request.relevant[rows].tolist()
    assert len(batch) == 4 and batch.request.questions == ["q1", "q2", "q3", "q4"]


def test_select_narrows_relevance_to_the_images_left() -> None:
    # Guides give as many columns as the largest image that a row is about.
    chosen = mixed().select([3])
    assert chosen.request.counts == [4] and chosen.request.relevant is not None
    assert chosen.request.relevant.tolist() == [[False, False, True, False]]


def test_select_keeps_what_is_not_known_unknown() -> None:
    grid = TileGrid(1, 1, 2, False)
    batch = collate([Item(conversation("k", grid, (Turn("q", "a"), Turn("r", "b"))), "s", 0)])
    chosen = batch.select([1])
    assert chosen.request.relevant is None and chosen.request.other_questions is None
    assert chosen.request.questions == ["r"] and chosen.turns == [1]
