"""Means under tags, over batches and ranks."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MeanMetric

from pgp_lightning.training.means import Means


def test_a_mean_weighs_every_value_alike_and_starts_afresh():
    means = Means(["kl/a", "kl/b", "loss"])
    means.update("kl/a", torch.tensor([1.0, 2.0, 3.0]))
    means.update("kl/a", torch.tensor([[10.0]]))
    means.update("kl/b", torch.zeros(0))
    means.update("loss", torch.tensor(0.5, requires_grad=True))
    assert means.compute() == {"kl/a": 4.0, "loss": 0.5}
    assert means.compute() == {}
    means.update("kl/b", torch.tensor([7.0]))
    assert means.compute() == {"kl/b": 7.0}


def test_every_tag_is_computed_even_if_this_rank_never_met_it(monkeypatch: pytest.MonkeyPatch):
    # With several ranks computing is collective: a rank that leaves a tag out would make the others wait for ever.
    computed, real = [], MeanMetric.compute
    monkeypatch.setattr(MeanMetric, "compute", lambda self: computed.append(self) or real(self))
    means = Means(["a", "b", "c"])
    for metric in means.metrics:
        metric.compute = MeanMetric.compute.__get__(metric)
    means.update("b", torch.ones(2))
    assert means.compute() == {"b": 1.0}
    assert len(computed) == 3


def test_means_are_no_part_of_checkpoints():
    means = Means(["a"])
    means.update("a", torch.ones(2))
    assert means.state_dict() == {} and list(means.parameters()) == []


def test_an_unknown_tag_is_an_error():
    with pytest.raises(ValueError, match="not in list"):
        Means(["a"]).update("b", torch.ones(1))
