"""Shared memory for tiles on their way out of worker processes, used again instead of made anew.

A fresh piece of shared memory costs its pages, which the system makes, clears and maps in both processes: many times
what copying the tiles costs. So every worker has some slots that stay mapped. It cuts tiles into one that is free and
sends its place; the receiver looks at the tiles where they are, and once nothing there refers to them any more, the
slot is free again. When somebody keeps so many batches that no slot is free, tiles travel as any tensor does.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgp_lightning.data.collate import Batch, joined
from pgp_lightning.vlm.tiles import new_tiles

__all__ = ["Handed", "TilePool"]

# Two batches that wait, the one that is being made, and the one that is in use.
_SLOTS = 4

# A batch finds its pool by number in the process that made the pool.
_pools: weakref.WeakValueDictionary[int, TilePool] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_NOTHING = torch.empty(0, dtype=torch.uint8)


class TilePool:
    """Slots of shared memory, `_SLOTS` for each worker; made by the process that receives, pickled to the workers.

    It is a file without a name, which the system clears away with the last process that has it open, and which the
    size of /dev/shm, 64 MB in many containers, does not limit. Only what was written to takes room: a worker fills the
    first free slot, slots grow to the largest batch they ever held, and those that were never needed stay empty.

    Args:
        workers: number of worker processes.
        slot_bytes: the most that the tiles of a batch may take.
    """

    worker: int
    """In a worker: its number, whose slots it fills."""

    def __init__(self, workers: int, slot_bytes: int) -> None:
        self.number, self.workers, self.slot_bytes = next(_numbers), workers, slot_bytes
        self._file = os.memfd_create("tiles")
        weakref.finalize(self, os.close, self._file)
        self._map()
        _pools[self.number] = self

    def _map(self) -> None:
        """Map the file: all slots, then a flag for each."""
        slots, flags = self.workers * _SLOTS * self.slot_bytes, self.workers * _SLOTS
        os.ftruncate(self._file, slots + flags)
        memory = np.frombuffer(mmap.mmap(self._file, slots + flags), dtype=np.uint8)
        self._slots = memory[:slots].reshape(self.workers, _SLOTS, self.slot_bytes)
        self._open: int | None = None  # in a worker: the slot of the batch that is being made, and how far it is full
        self._used = 0
        # A flag has one writer at a time: the worker while it is 0, the receiver while it is 1.
        self._taken = memory[slots:].reshape(self.workers, _SLOTS)

    def __getstate__(self) -> tuple[int, int, int, Any]:
        return self.number, self.workers, self.slot_bytes, DupFd(self._file)

    def __setstate__(self, state: tuple[int, int, int, Any]) -> None:
        self.number, self.workers, self.slot_bytes, file = state
        self._file = file.detach()
        self._map()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array for an image's tiles, behind those of the image before it if a slot is free that has room."""
        if self._open is None:
            slot = int(self._taken[self.worker].argmin())
            if self._taken[self.worker, slot]:
                return new_tiles(shape)
            self._open, self._used = slot, 0
        first, self._used = self._used, self._used + math.prod(shape)
        if self._used > self.slot_bytes:
            return new_tiles(shape)
        return self._slots[self.worker, self._open, first : self._used].reshape(shape)

    def join(self, tiles: Sequence[np.ndarray]) -> Tensor:
        """Return the tiles of a batch's images as one tensor: the slot's content, if they fill it without a gap."""
        slot, self._open = self._open, None
        if slot is None:
            return joined(tiles)
        place = self._slots[self.worker, slot].ctypes.data
        for part in tiles:
            if part.ctypes.data != place:
                return joined(tiles)
            place += part.nbytes
        shape = (sum(map(len, tiles)), *tiles[0].shape[1:])
        self._taken[self.worker, slot] = 1
        return torch.from_numpy(self._slots[self.worker, slot, : math.prod(shape)].reshape(shape))

    def hand_over(self, batch: Batch) -> Batch | Handed:
        """Return what a worker sends of a batch: its tiles' place if they lie in a slot."""
        tiles = batch.request.tiles
        offset = tiles.data_ptr() - self._slots.ctypes.data
        if not 0 <= offset < self._slots.nbytes:
            return batch
        worker, slot = divmod(offset // self.slot_bytes, _SLOTS)
        return Handed(batch, _Place(self.number, worker, slot, tuple(tiles.shape)))

    def look_at(self, place: _Place) -> Tensor:
        """Return the tiles in a slot, which is free again when the tensor and all its views are gone."""
        tiles = self._slots[place.worker, place.slot, : math.prod(place.shape)].reshape(place.shape)
        freed = weakref.finalize(tiles, self._taken[place.worker].__setitem__, place.slot, 0)
        freed.atexit = False
        return torch.from_numpy(tiles)


@dataclass(frozen=True)
class _Place:
    """Where tiles are: pool, worker, slot; and their shape."""

    pool: int
    worker: int
    slot: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Handed:
    """A batch whose tiles lie in a pool; unpickled in the process of the pool, it is the batch again."""

    batch: Batch
    place: _Place

    def __reduce__(self) -> tuple[Any, ...]:
        bare, relevant = copy(self.batch), self.batch.request.relevant
        bare.request = copy(bare.request)
        # Tensors would travel through shared memory of their own.
        bare.request.tiles, bare.request.relevant = _NOTHING, None
        return _received, (bare, self.place, None if relevant is None else relevant.numpy())


def _received(bare: Batch, place: _Place, relevant: np.ndarray | None) -> Batch:
    """Return a batch with its tiles."""
    bare.request.tiles = _pools[place.pool].look_at(place)
    bare.request.relevant = None if relevant is None else torch.from_numpy(relevant)
    return bare
