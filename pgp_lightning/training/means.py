"""Means over batches and ranks, under tags."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["Means"]


class _Sums(Metric):
    """Sum and number of values in n places: one tensor, so that one exchange between the processes does for all."""

    sums: Tensor

    def __init__(self, places: int) -> None:
        super().__init__()
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no float64
        self.add_state("sums", torch.zeros(places, 2, dtype=dtype), dist_reduce_fx="sum")

    def update(self, place: int, values: Tensor) -> None:
        self.sums[place, 0] += values.sum(dtype=self.sums.dtype)
        self.sums[place, 1] += values.numel()

    def compute(self) -> Tensor:
        return self.sums.clone()


class Means(nn.Module):
    """The mean of the values under each of a fixed set of tags.

    The set is fixed because computing is collective: every rank has every tag, also one it saw no sample of.

    Args:
        tags: the names.
    """

    def __init__(self, tags: list[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self._places = {tag: place for place, tag in enumerate(tags)}
        self._sums = _Sums(len(tags))

    def update(self, tag: str, values: Tensor) -> None:
        """Take values (n,) into a tag's mean; n may be 0.

        Raises:
            KeyError: if there is no such tag.
        """
        self._sums.update(self._places[tag], values.detach())

    def compute(self) -> dict[str, float]:
        """Return the means of tags that saw a value on any rank, and start afresh."""
        if not self._sums.update_called:
            self._sums.update(0, torch.zeros(0, device=self._sums.device))
        rows = self._sums.compute().tolist()
        self._sums.reset()
        return {tag: total / count for tag, (total, count) in zip(self.tags, rows, strict=True) if count}
