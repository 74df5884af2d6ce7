"""What V' carry: variance shares against sums written out, and the probe on states in which the truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pgp_lightning.guides.probing import (
    chance_recall,
    jaccard,
    least_alike,
    sample_tokens,
    train_probe,
    variance_shares,
)
from pgp_lightning.selection import recall


def shares_slowly(states: np.ndarray) -> list[float]:
    """Mean squares cell by cell, and what they say of the variance components."""
    questions, tokens, channels = states.shape
    squares = np.zeros(3)
    for c in range(channels):
        table = states[:, :, c].astype(np.float64)
        table = table / np.sqrt(np.mean([np.var(row, ddof=1) for row in table]))
        mean = table.mean()
        for q in range(questions):
            for i in range(tokens):
                token, question = table[:, i].mean() - mean, table[q].mean() - mean
                squares += np.array([token, question, table[q, i] - mean - token - question]) ** 2
    token, question, rest = squares / [tokens - 1, questions - 1, (questions - 1) * (tokens - 1)]
    parts = np.maximum([(token - rest) / questions, (question - rest) / tokens, rest], 0)
    return (parts / parts.sum()).tolist()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("questions", "tokens"), [(2, 5), (3, 12), (5, 2)])
def test_variance_shares_are_those_of_the_sums_written_out(questions: int, tokens: int):
    states = normal(questions, tokens, 6) + 2 * normal(1, tokens, 6, seed=1) + normal(questions, 1, 6, seed=2)
    states = states * torch.tensor([1e-3, 1.0, 50.0, 7.0, 1.0, 0.1]) + 3
    torch.testing.assert_close(variance_shares(states).tolist(), shares_slowly(states.numpy()), rtol=2e-3, atol=2e-4)


def test_variance_shares_of_one_effect_alone():
    tokens, shift = normal(1, 40, 8), normal(3, 1, 8, seed=1)
    assert variance_shares(tokens.expand(3, -1, -1)).tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    # A shift is measured by the spread over tokens; without tokens that differ there is nothing to rank.
    assert variance_shares(shift.expand(-1, 40, -1)).tolist() == [0, 0, 0]
    both = variance_shares(tokens + 100 * shift)
    assert both[1] > 0.99 and both[2] < 1e-6
    # Of two questions each the other's negative: neither a token nor a question has a mean.
    pure = tokens - tokens.mean(dim=1, keepdim=True)
    assert variance_shares(torch.cat([pure, -pure])).tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_variance_shares_do_not_depend_on_how_many_questions_there_are():
    few = torch.stack([variance_shares(normal(2, 200, 8, seed=s) + normal(1, 200, 8, seed=99 + s)) for s in range(20)])
    many = torch.stack([variance_shares(normal(9, 200, 8, seed=s) + normal(1, 200, 8, seed=99 + s)) for s in range(20)])
    torch.testing.assert_close(few.mean(dim=0), many.mean(dim=0), rtol=0, atol=0.02)
    torch.testing.assert_close(many.mean(dim=0).tolist(), [0.5, 0.0, 0.5], rtol=0, atol=0.02)


def test_a_constant_channel_and_the_scale_of_a_channel_change_nothing():
    states = normal(3, 20, 4) + normal(1, 20, 4, seed=1)
    shares = variance_shares(states)
    torch.testing.assert_close(variance_shares(states * torch.tensor([1e3, 1e-3, 1.0, 7.0])), shares)
    torch.testing.assert_close(variance_shares(torch.cat([states, torch.full((3, 20, 1), 0.1)], dim=2)), shares)
    with pytest.raises(ValueError, match="at least two questions and two tokens"):
        variance_shares(states[:1])
    with pytest.raises(ValueError, match="at least two questions and two tokens"):
        variance_shares(states[:, :1])


def test_overlap_and_the_question_least_alike():
    rows = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)
    found = [[jaccard(a, b).item() for b in rows] for a in rows]
    sets = [set(row.nonzero().flatten().tolist()) for row in rows]
    assert found == [[pytest.approx(len(a & b) / len(a | b)) for b in sets] for a in sets]
    assert least_alike(rows).tolist() == [3, 3, 1, 0]
    assert least_alike(rows[:1].expand(2, -1)).tolist() == [1, 0]  # never the question itself


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
def test_chance_recall_is_the_mean_over_random_scores(ratio: float):
    relevant = torch.zeros(3, 40, dtype=torch.bool)
    relevant[0, :1], relevant[1, 5:12], relevant[2, :30] = True, True, True
    generator = torch.Generator().manual_seed(0)
    drawn = recall(torch.rand(6000, 40, generator=generator), relevant.repeat(2000, 1), ratio).view(2000, 3)
    torch.testing.assert_close(chance_recall(relevant, ratio), drawn.mean(dim=0), rtol=0, atol=0.03)


def test_sampled_tokens_hold_the_relevant_ones_first():
    relevant = torch.zeros(3, 20, dtype=torch.bool)
    relevant[0, [3, 17]], relevant[1, :12] = True, True
    generator = torch.Generator().manual_seed(0)
    at = sample_tokens(relevant, 8, generator)
    assert at.shape == (3, 8) and all(len(set(row)) == 8 for row in at.tolist())
    assert relevant.gather(1, at).sum(dim=1).tolist() == [2, 8, 0]
    assert {3, 17} <= set(at[0].tolist()) and not torch.equal(at, sample_tokens(relevant, 8, generator))
    few = sample_tokens(relevant[:, :5], 8, generator)  # all there are, some twice
    assert few.shape == (3, 8) and all(set(row) == set(range(5)) for row in few.tolist())
    others = torch.cat([sample_tokens(relevant[:1], 8, generator).flatten() for _ in range(200)])
    assert set(others.tolist()) == set(range(20))


def planted(questions: int, seed: int, carries: bool) -> tuple[Tensor, Tensor]:
    """States in which a token's form stands beside the form that is asked for, or another one."""
    generator = torch.Generator().manual_seed(seed)
    form = torch.randint(6, (questions, 40), generator=generator)
    asked = torch.randint(6, (questions, 1), generator=generator)
    shown = asked if carries else torch.randint(6, (questions, 1), generator=generator)
    code = functional.one_hot(form, 6), functional.one_hot(shown.expand(-1, 40), 6)
    return torch.cat(code, dim=2).float(), form == asked


def test_the_probe_finds_what_the_states_carry_and_nothing_else():
    found = {}
    for carries in (True, False):
        probe = train_probe(*planted(200, 0, carries), steps=200)
        states, relevant = planted(100, 1, carries)
        with torch.no_grad():
            found[carries] = recall(probe(states).squeeze(-1), relevant, 0.1).nanmean().item()
    assert found[True] > 0.95 and found[False] < 0.35


def test_the_probe_is_trained_as_written_out():
    states, relevant = planted(30, 0, carries=True)
    torch.manual_seed(4)
    twin = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 1))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(5):
        rows = torch.randint(30, (16,))
        logits, truth = twin(states[rows]).squeeze(-1), relevant[rows].float()
        weight = torch.tensor(5.0)
        loss = functional.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    probe = train_probe(states, relevant, steps=5, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), twin.parameters(), strict=True))
    assert not probe.training
