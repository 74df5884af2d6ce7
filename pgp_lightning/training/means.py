"""Means over batches and ranks, under tags."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

__all__ = ["Means"]


class Means(nn.Module):
    """A torchmetrics mean for each of a fixed set of tags.

    The set is fixed because computing is collective: every rank computes every tag, also one it saw no sample of.

    Args:
        tags: the names.
    """

    def __init__(self, tags: list[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self.metrics = nn.ModuleList(MeanMetric() for _ in tags)

    def update(self, tag: str, values: Tensor) -> None:
        """Take values (n,) into a tag's mean; n may be 0."""
        metric = self.metrics[self.tags.index(tag)]
        assert isinstance(metric, MeanMetric)
        values = values.detach().float().flatten()
        # A weight of zero marks the metric as used without moving it.
        metric.update(values if len(values) else values.new_zeros(1), 1.0 if len(values) else 0.0)

    def compute(self) -> dict[str, float]:
        """Return the means of tags that saw a value on any rank, and start afresh."""
        found = {}
        for tag, metric in zip(self.tags, self.metrics, strict=True):
            assert isinstance(metric, MeanMetric)
            if not metric.update_called:
                self.update(tag, torch.zeros(0, device=metric.device))
            value = metric.compute()
            if not torch.isnan(value):
                found[tag] = float(value)
            metric.reset()
        return found
