"""Guided pruning: before decoder layer L the answer model keeps the visual tokens that a guide ranks first.

PGP (Sec. 3.3) with a `PosteriorGuide`, SGP ("A Stitch in Time Saves Nine", Sec. 3.2) with an `AttentionGuide`, and the
controls with the guides of `simple.py`. Original positions are kept, as in both releases; kept are
max(1, int(ratio * M)) tokens, where SGP's release keeps int(ratio * M), none at all if that is 0.

Tile skipping is ours. Scores are there before the answer model sees a pixel, and InternVL encodes every tile by itself,
so with L = 0 a tile without a kept token need not pass the vision tower: the same logits for less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["Guided"]


class Guided(Pruner):
    """Keeps what a guide ranks first.

    Args:
        guide: gives every visual token of a request an importance.
        layer: L, the decoder layer before which the others are dropped; 0 is before the first.
        keep_ratio: share of each image's visual tokens that stay.
        renumber: count positions again after the cut (the *servable* preset at L = 0: inference engines take
            shortened embeddings without their positions).
        skip_tiles: with L = 0, leave tiles without a kept token out of the answer model's vision tower (exact).
        max_tiles_kept: choose so many tiles of an image first, those with the greatest sum of importance over as many
            tokens as the budget has, and tokens only in them, fewer than the budget if they have no more (ours; not
            exact, and off by default).

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        guide: Guide,
        layer: int = 0,
        keep_ratio: float = 0.05,
        renumber: bool = False,
        skip_tiles: bool = True,
        max_tiles_kept: int | None = None,
    ) -> None:
        super().__init__()
        self._check_ratio(keep_ratio)
        if layer < 0 or (max_tiles_kept is not None and max_tiles_kept < 1):
            raise ConfigError(
                f"layer must be at least 0 and max_tiles_kept at least 1, got {layer} and {max_tiles_kept}"
            )
        self.guide = guide
        self.layers, self.keep_ratio = (layer,), keep_ratio
        self.renumber, self.max_tiles_kept = renumber, max_tiles_kept
        self.skip_tiles = skip_tiles and layer == 0
        self.keep: Tensor | None = None

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        """Ask the guide, and let tiles that are not needed pass the vision tower by."""
        if request is None:
            raise ConfigError("a guide reads questions and tiles: call pruned(model, pruner, inputs, request)")
        self.importance = self.guide(request)
        expected = (len(request), max(request.counts))
        if self.importance.shape != expected:
            raise ConfigError(
                f"the guide gives importance of shape {tuple(self.importance.shape)} for {expected[0]} rows of up to "
                f"{expected[1]} visual tokens: pair guide and answer model of one family and one tile rule"
            )
        self.keep = self._choose(self.importance, request)
        pixels = inputs.get("pixel_values")
        if not self.skip_tiles or pixels is None:
            yield
            return
        with vlm.skipping_tiles(_by_tile(self.keep, request)[2].any(dim=1)):
            yield

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Drop what the guide does not rank first, before layer L."""
        if (depth,) != self.layers:
            return state
        assert self.keep is not None
        kept = state.keep_tokens(state.expand(self.keep))
        return kept.renumber() if self.renumber else kept

    def _choose(self, importance: Tensor, request: Request) -> Tensor:
        """Return the keep mask, bool (B, M)."""
        if self.max_tiles_kept is None:
            return keep_top(importance, self.keep_ratio)
        keep = torch.zeros_like(importance, dtype=torch.bool)
        rows, columns, values = _by_tile(importance, request)
        budgets = keep_top(importance, self.keep_ratio).sum(dim=1)
        for row, budget in enumerate(budgets.tolist()):
            tiles = values[rows == row]
            # What a tile could bring into the budget; a tile's mean would favour evenly lukewarm ones.
            worth = tiles.sort(dim=1, descending=True).values[:, :budget].sum(dim=1)
            chosen = worth.argsort(descending=True, stable=True)[: self.max_tiles_kept]
            among = torch.full_like(importance[row], -torch.inf)
            places = columns[rows == row][chosen]
            among[places] = importance[row, places]
            keep[row] = keep_top(among[None], count=budget)[0]
        return keep


def _by_tile(values: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Split values by visual token (B, M) into tiles, row by row: rows (T,), columns (T, n), values (T, n)."""
    sizes = [request.grids[image].tokens_per_side ** 2 for image in request.images]
    places = [
        (row, first)
        for row, (count, size) in enumerate(zip(request.counts, sizes, strict=True))
        for first in range(0, count, size)
    ]
    rows, firsts = torch.tensor(places, device=values.device).T
    columns = firsts[:, None] + torch.arange(sizes[0], device=values.device)
    return rows, columns, values[rows[:, None], columns]
