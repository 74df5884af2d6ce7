"""Conversations -> a batch: one row per turn, one image per record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgp_lightning.data.conversation import Conversation
from pgp_lightning.vlm.request import Request

__all__ = ["Batch", "Item", "collate", "joined"]


class Item(NamedTuple):
    """A conversation, the source it came from, and its position in the global order."""

    conversation: Conversation
    source: str
    position: int


@dataclass
class Batch:
    """A micro-batch of B rows; a row is a turn, and the rows of a record share its image.

    Args:
        request: questions and tiles; tiles stay uint8 and are normalised on the device.
        answers: B answers.
        sources: B source names.
        keys: B record keys.
        types: B kinds of question, empty where the record does not say.
        indices: B positions of the records in the global order; with `turns`, the key of a row's random numbers.
        turns: B places of the turns in their records.
        epoch: the data epoch of the batch.
        rejected: "source/reason" -> records that could not be used since the batch before.
    """

    request: Request
    answers: list[str]
    sources: list[str]
    keys: list[str]
    types: list[str]
    indices: list[int]
    turns: list[int]
    epoch: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)

    def records(self) -> Counter[str]:
        """Return the number of records of each source."""
        return Counter(source for source, turn in zip(self.sources, self.turns, strict=True) if turn == 0)

    def described(self) -> str:
        """Return what somebody needs who looks for the record that broke a run: keys, tiles, lengths."""
        request = self.request
        rows = zip(self.sources, self.keys, request.images, request.questions, self.answers, strict=True)
        return "; ".join(
            f"{source}/{key} ({request.grids[image].tiles} tiles, {request.grids[image].tokens} visual tokens, "
            f"{len(question)} + {len(answer)} characters)"
            for source, key, image, question, answer in rows
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """Return some rows; images stay, also those that no row is about any more."""
        request = self.request
        images = [request.images[row] for row in rows]
        widest = max(request.grids[image].tokens for image in images)
        chosen = replace(
            request,
            questions=[request.questions[row] for row in rows],
            images=images,
            relevant=None if request.relevant is None else request.relevant[list(rows), :widest],
            other_questions=request.other_questions and [request.other_questions[row] for row in rows],
            systems=[request.systems[row] for row in rows],
        )
        return replace(
            self,
            request=chosen,
            answers=[self.answers[row] for row in rows],
            sources=[self.sources[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            types=[self.types[row] for row in rows],
            indices=[self.indices[row] for row in rows],
            turns=[self.turns[row] for row in rows],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on a device; pinned tiles travel without blocking."""
        overlap = non_blocking or self.request.tiles.is_pinned()
        return replace(self, request=self.request.to(device, non_blocking=overlap))

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory."""
        relevant = self.request.relevant
        request = replace(
            self.request,
            tiles=self.request.tiles.pin_memory(),
            relevant=None if relevant is None else relevant.pin_memory(),
        )
        return replace(self, request=request)


def joined(tiles: Sequence[np.ndarray]) -> Tensor:
    """Return the tiles of several images as one tensor."""
    return torch.from_numpy(np.concatenate(tiles))


def collate(
    items: Sequence[Item],
    epoch: int = 0,
    rejected: Mapping[str, int] | None = None,
    join: Callable[[Sequence[np.ndarray]], Tensor] = joined,
) -> Batch:
    """Put conversations into one batch.

    Args:
        items: at least one.
        epoch: the data epoch.
        rejected: "source/reason" -> records left out on the way.
        join: makes one tensor of the images' tiles.
    """
    rows = [
        (image, place, turn) for image, item in enumerate(items) for place, turn in enumerate(item.conversation.turns)
    ]
    of_rows = [items[image] for image, _, _ in rows]
    request = Request(
        questions=[turn.question for _, _, turn in rows],
        tiles=join([item.conversation.tiles for item in items]),
        grids=[item.conversation.grid for item in items],
        images=[image for image, _, _ in rows],
        systems=[item.conversation.system for item in of_rows],
    )
    request.relevant = _relevant(request.counts, [turn.relevant for _, _, turn in rows])
    return Batch(
        request=request,
        answers=[turn.answer for _, _, turn in rows],
        sources=[item.source for item in of_rows],
        keys=[item.conversation.key for item in of_rows],
        types=[turn.type for _, _, turn in rows],
        indices=[item.position for item in of_rows],
        turns=[place for _, place, _ in rows],
        epoch=epoch,
        rejected=dict(rejected or {}),
    )


def _relevant(counts: list[int], rows: list[tuple[int, ...] | None]) -> Tensor | None:
    """Return bool (B, M), False where unknown, or None if it is unknown for all rows."""
    if all(row is None for row in rows):
        return None
    relevant = torch.zeros(len(rows), max(counts), dtype=torch.bool)
    for mask, row in zip(relevant, rows, strict=True):
        mask[list(row or ())] = True
    return relevant
