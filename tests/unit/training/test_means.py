"""Means under tags, over batches and ranks."""

from __future__ import annotations

import pytest
import torch

from pgp_lightning.training.means import Means
from tests.ranks import on_two_ranks


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


def gather(rank: int) -> tuple[dict[str, float], dict[str, float], int]:
    exchanges, real = [], torch.distributed.all_gather
    torch.distributed.all_gather = lambda *given, **named: exchanges.append(1) or real(*given, **named)
    means = Means([f"tag{n}" for n in range(30)])
    for n in range(rank, 30, 3):  # a tag of the one, of the other, of both, of none
        means.update(f"tag{n}", torch.arange(n + 1.0) + 100 * rank)
    found = means.compute()
    empty = Means(["a"]).compute()
    return found, empty, len(exchanges)


def test_all_tags_of_all_ranks_in_one_exchange() -> None:
    expected = {}
    for n in range(30):
        values = [value + 100 * rank for rank in range(2) if n % 3 == rank for value in range(n + 1)]
        if values:
            expected[f"tag{n}"] = sum(values) / len(values)
    for found, empty, exchanges in on_two_ranks(gather):
        assert found == pytest.approx(expected, rel=1e-12) and empty == {}
        assert exchanges <= 4, exchanges  # shapes and values, for either object


def test_means_are_no_part_of_checkpoints():
    means = Means(["a"])
    means.update("a", torch.ones(2))
    assert means.state_dict() == {} and list(means.parameters()) == []


def test_an_unknown_tag_is_an_error():
    with pytest.raises(KeyError, match="b"):
        Means(["a"]).update("b", torch.ones(1))
