"""DivPrune: the visual tokens that stay are those that are least like each other (CVPR 2025).

Max-min diversity (`selection.max_min_diversity`) over the projected visual tokens, before the first decoder layer; it
looks at no question and no attention. Written from the method's description; where the release differs: it computes in
the model's dtype and may choose a token twice, and one row's choice there is applied to the whole batch. Its published
numbers are for tokens in the order of choice, its current code keeps the prompt's order, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import equal_shares, keep_count, max_min_diversity
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["DivPrune"]


class DivPrune(Pruner):
    """Keeps a diverse set of visual tokens.

    Args:
        keep_ratio: share of each row's visual tokens that stay.
        scope: `image` chooses among all tiles of an image at once (the release, with LLaVA-NeXT); `tile` gives every
            tile an equal share of the budget and chooses in each by itself.
        rounding: `floor` keeps max(1, int(ratio * M)), the same budget as every other method here; `round` is the
            release's, half to even.
        renumber: count positions again after the cut, as the release does.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(
        self,
        keep_ratio: float = 0.2,
        scope: Literal["image", "tile"] = "image",
        rounding: Literal["floor", "round"] = "floor",
        renumber: bool = False,
    ) -> None:
        super().__init__()
        self._check_ratio(keep_ratio)
        if scope not in ("image", "tile") or rounding not in ("floor", "round"):
            raise ConfigError(f"scope must be image or tile, rounding floor or round, got {scope!r} and {rounding!r}")
        self.layers, self.keep_ratio = (0,), keep_ratio
        self.scope, self.rounding, self.renumber = scope, rounding, renumber
        self._tile: int | None = None
        self._rows = 1

    def budget(self, tokens: int) -> int:
        """Return how many of a row's visual tokens stay."""
        if self.rounding == "floor":
            return keep_count(tokens, self.keep_ratio)
        return max(1, round(tokens * self.keep_ratio))

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        """Ask for the size of a tile, if tiles matter: a model without a processor may come with a request."""
        self._rows = len(inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"])
        self._tile = None
        if self.scope == "tile":
            self._tile = (vlm.processor.rule if request is None else request.grids[0]).tokens_per_side ** 2
        yield

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Drop what is not chosen; `importance` is higher the earlier a token was chosen, and 0 for the others."""
        if depth != 0:
            return state
        # Beams and returned sequences of a row are alike until the first token.
        one = slice(None, None, len(state.hidden) // self._rows)
        hidden, visual, counts = state.hidden[one], state.visual[one], state.counts[one].tolist()
        importance = torch.full((len(counts), max(counts)), -torch.inf, device=hidden.device)
        for row, count in enumerate(counts):
            # The decoder's input is the projector's output, in tile-raster order.
            importance[row, :count] = self._rank(hidden[row, visual[row]])
        self.importance = importance
        kept = state.keep_tokens(state.expand(importance) > 0)
        return kept.renumber() if self.renumber else kept

    def _rank(self, features: Tensor) -> Tensor:
        """Return each token's rank from the budget down to 1, 0 if it is not chosen: features (M, d) to (M,)."""
        size = self._tile or len(features)
        if len(features) % size:
            raise ConfigError(f"{len(features)} visual tokens are no whole tiles of {size}: take scope: image")
        ranks = torch.zeros(len(features), device=features.device)
        for tile, share in enumerate(equal_shares(self.budget(len(features)), len(features) // size)):
            if share:
                chosen = max_min_diversity(features[tile * size : (tile + 1) * size], share)
                ranks[tile * size + chosen] = torch.arange(share, 0, -1, device=ranks.device, dtype=ranks.dtype)
        return ranks
