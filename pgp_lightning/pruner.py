"""What a pruner is: something that rewrites what decoder layers are about to see of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["KeepAll", "Pruner"]


class Pruner(nn.Module):
    """Rewrites the prefill state before decoder layers; this one leaves it alone.

    Attributes:
        keep_ratio: share of each row's visual tokens that stay after the last of `layers`.
        layers: the depths at which the state is rewritten; 0 is before the first decoder layer.
        importance: float32 (B, M), what the last run ranked visual tokens by, -inf on padding; None if it ranks none.
        reads_vision_tower: whether the vision tower has to run inside `pruned`, so that features computed before do not
            do.
        skip_tiles: whether tiles without a kept token pass the vision tower by.
    """

    keep_ratio: float = 1.0
    layers: tuple[int, ...] = ()
    importance: Tensor | None = None
    reads_vision_tower: bool = False
    skip_tiles: bool = False

    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> AbstractContextManager[object]:
        """Prepare a run, and take back afterwards what was attached to the model.

        Args:
            vlm: the answer model.
            inputs: what it will be called with.
            request: the questions and tiles that they were made of.
        """
        return nullcontext()

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Return what decoder layer `depth` shall see."""
        return state

    def at(self, keep_ratio: float) -> Pruner:
        """Return this pruner with another budget; both share their modules."""
        self._check_ratio(keep_ratio)
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.keep_ratio = keep_ratio
        return other

    @staticmethod
    def _check_ratio(keep_ratio: float) -> None:
        if not 0 < keep_ratio <= 1:
            raise ConfigError(f"keep_ratio, the share of visual tokens to keep, must be in (0, 1], got {keep_ratio}")


class KeepAll(Pruner):
    """Keeps every visual token: the full model."""
