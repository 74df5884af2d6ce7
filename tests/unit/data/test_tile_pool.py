"""Tiles that workers put into memory that is used again."""

from __future__ import annotations

import mmap
import os
import pickle
import random
import threading
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from topologies import READER
from torch import Tensor

from pgp_lightning.data.collate import Batch, Item, collate
from pgp_lightning.data.conversation import Conversation, Turn
from pgp_lightning.data.loader import EvaluationLoader, TrainingLoader
from pgp_lightning.data.mixture import Mixture, StreamSource
from pgp_lightning.data.tile_pool import Handed, TilePool
from pgp_lightning.vlm.tiles import TileGrid

GRIDS = TileGrid(2, 1, 2, True), TileGrid(1, 1, 2, False)
SLOTS = 4
IMAGE = 3 * 8 * 8


def items(seed: int, images: int = 2) -> list[Item]:
    """Return conversations about random pictures of three tiles and one, in turn."""
    generator, found = np.random.default_rng(seed), []
    for number in range(images):
        grid = GRIDS[number % 2]
        tiles = generator.integers(0, 256, (grid.tiles, 3, 8, 8), dtype=np.uint8)
        found.append(Item(Conversation(f"k{seed}", (Turn(f"q{seed}", "a", (0, 2)),), tiles, grid), "s", seed))
    return found


def made(pool: TilePool, seed: int, images: int = 2, worker: int = 1) -> Batch | Handed:
    """Return what a worker sends."""
    pool.worker, cut = worker, items(seed, images)
    for number, item in enumerate(cut):
        tiles = pool.empty(item.conversation.tiles.shape)
        tiles[:] = item.conversation.tiles
        cut[number] = item._replace(conversation=replace(item.conversation, tiles=tiles))
    return pool.hand_over(collate(cut, join=pool.join))


def travelled(sent: Batch | Handed) -> Batch:
    """Return what the receiver gets of it."""
    received: Batch = ForkingPickler.loads(ForkingPickler.dumps(sent))
    return received


def expected(seed: int, images: int = 2) -> Tensor:
    """Return the tiles of a batch as they were cut."""
    return collate(items(seed, images)).request.tiles


def test_a_batch_arrives_as_it_was_made() -> None:
    pool = TilePool(2, 4 * IMAGE)
    sent = made(pool, 5)
    assert isinstance(sent, Handed) and len(pickle.dumps(sent)) < 2000
    received, plain = travelled(sent), collate(items(5))
    assert received.request.tiles.dtype == torch.uint8 and received.request.tiles.is_contiguous()
    assert torch.equal(received.request.tiles, plain.request.tiles)
    assert received.request.relevant is not None and plain.request.relevant is not None
    assert torch.equal(received.request.relevant, plain.request.relevant)
    for name in ("answers", "sources", "keys", "types", "indices", "turns", "epoch", "rejected"):
        assert getattr(received, name) == getattr(plain, name), name
    assert received.request.questions == plain.request.questions and received.request.grids == plain.request.grids
    # What a worker still holds of a batch is whole, too.
    assert torch.equal(sent.batch.request.tiles, plain.request.tiles) and sent.batch.request.relevant is not None


def test_a_slot_is_used_again_and_never_while_somebody_looks_at_it() -> None:
    pool, generator = TilePool(2, 8 * IMAGE), random.Random(0)
    held: dict[int, Batch] = {}
    places, plain = set(), 0
    for seed in range(300):
        sent = made(pool, seed, generator.randrange(1, 5), worker=generator.randrange(2))
        if isinstance(sent, Handed):
            places.add((sent.place.worker, sent.place.slot))
        plain += isinstance(sent, Batch)
        held[seed] = travelled(sent)
        for kept in generator.sample(sorted(held), k=min(len(held), generator.randrange(3))):
            del held[kept]
        while len(held) > 12:
            del held[min(held)]
        for kept, batch in held.items():
            assert torch.equal(batch.request.tiles, expected(kept, len(batch)))
    assert len(places) == 2 * SLOTS  # all were used,
    assert 0 < plain < 200  # and there was a way out when none was free


def test_a_view_of_the_tiles_keeps_their_slot() -> None:
    pool = TilePool(1, 4 * IMAGE)
    batch = travelled(made(pool, 1, worker=0))
    part, pixels = batch.request.tiles[1:2], batch.request.tiles.numpy()[3]
    del batch
    for seed in range(2, 2 + 3 * SLOTS):
        travelled(made(pool, seed, worker=0))
    assert torch.equal(part[0], expected(1)[1]) and (pixels == expected(1)[3].numpy()).all()
    del part, pixels
    batches = [made(pool, seed, worker=0) for seed in range(20, 20 + SLOTS)]
    assert all(isinstance(batch, Handed) for batch in batches) and isinstance(made(pool, 30, worker=0), Batch)


def test_a_slot_may_be_given_back_by_another_thread() -> None:
    pool = TilePool(1, 4 * IMAGE)
    for seed in range(3 * SLOTS):
        sent = made(pool, seed, worker=0)
        assert isinstance(sent, Handed)
        held = [travelled(sent)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()


def test_what_is_larger_than_a_slot_travels_by_itself() -> None:
    pool = TilePool(1, 4 * IMAGE - 1)
    sent = made(pool, 3, worker=0)
    assert isinstance(sent, Batch) and torch.equal(travelled(sent).request.tiles, expected(3))
    assert isinstance(made(pool, 3, images=1, worker=0), Handed)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_image_given_up_after_it_was_cut_leaves_the_others_whole(lost: int) -> None:
    pool = TilePool(1, 8 * IMAGE)
    pool.worker, cut = 0, items(7, 3)
    arrays = [pool.empty(item.conversation.tiles.shape) for item in cut]
    kept = [number for number in range(3) if number != lost]
    for number in kept:
        arrays[number][:] = cut[number].conversation.tiles
    tiles = pool.join([arrays[number] for number in kept])
    assert torch.equal(tiles, torch.cat([torch.from_numpy(cut[number].conversation.tiles) for number in kept]))
    assert isinstance(made(pool, 8, worker=0), Handed)


def test_only_what_was_written_to_takes_room() -> None:
    pool = TilePool(8, 1 << 30)  # 32 GiB, were it all there
    batches = [travelled(made(pool, seed)) for seed in range(20)]
    del batches
    blocks = 512 * os.fstat(pool._file).st_blocks
    assert 0 < blocks <= (SLOTS + 1) * mmap.PAGESIZE


def test_tiles_outlive_their_pool() -> None:
    pool = TilePool(1, 4 * IMAGE)
    batch = travelled(made(pool, 4, worker=0))
    del pool
    assert torch.equal(batch.request.tiles, expected(4))


@pytest.mark.parametrize("keep", [1, 3, 100])
def test_batches_of_workers_stay_what_they_are_as_long_as_they_are_kept(
    sources: tuple[StreamSource, ...], keep: int
) -> None:
    mixture = Mixture(sources, seed=7, lanes=4, batch_size=2, window=8)
    plain = [batch.request.tiles for batch in TrainingLoader(mixture, READER, 30)]
    kept: list[Tensor] = []
    for number, batch in enumerate(TrainingLoader(mixture, READER, 30, workers=2)):
        kept = [*kept, batch.request.tiles][-keep:]
        first = number + 1 - len(kept)
        assert all(torch.equal(one, other) for one, other in zip(kept, plain[first:], strict=False))
    assert number == 29
    # The workers are gone now.
    assert all(torch.equal(one, other) for one, other in zip(kept, plain[30 - len(kept) :], strict=True))


def test_evaluation_has_a_pool_of_its_own_size(sources: tuple[StreamSource, ...]) -> None:
    plain = [batch.request.tiles for batch in EvaluationLoader(sources, READER, 8, limit=30)]
    found = list(EvaluationLoader(sources, READER, 8, limit=30, workers=2))
    assert all(torch.equal(batch.request.tiles, tiles) for batch, tiles in zip(found, plain, strict=True))
