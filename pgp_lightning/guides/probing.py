"""Do a guide's visual states V' carry the question at all? An analysis of variance, and a supervised probe.

The bottleneck can rank visual tokens by question only if V', taken with the question before the picture, differs
with the question from token to token. A small network trained on the truth itself bounds from above what any score
read from V' can recall; if it does no better than "some object is here", no bottleneck will.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgp_lightning.selection import keep_count

__all__ = ["chance_recall", "jaccard", "least_alike", "sample_tokens", "train_probe", "variance_shares"]

_ROWS = 16  # questions of a step
_RELEVANT = 5.0  # weight of a relevant token, of which there are few


def train_probe(
    states: Tensor, relevant: Tensor, steps: int = 1500, seed: int = 0, device: torch.device | str = "cpu"
) -> nn.Module:
    """Train a network of one hidden layer to tell relevant visual tokens by their states.

    Args:
        states: V' of n questions, (n, m, d) in any floating point type; they stay where they are, a step's rows travel.
        relevant: bool (n, m).
        steps: of AdamW, 16 questions each.
        seed: of the first weights and the order.
        device: where the network is trained.

    Returns:
        The network: float32 states (..., d) to logits (..., 1).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = states.shape[-1]
        probe = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1)).to(device)
        weight = torch.tensor(_RELEVANT, device=device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.01)
        for _ in range(steps):
            rows = torch.randint(len(states), (_ROWS,))
            logits = probe(states[rows].to(device, torch.float32)).squeeze(-1)
            truth = relevant[rows].to(device, torch.float32)
            loss = functional.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe.eval()


def sample_tokens(relevant: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose tokens to train the probe on: relevant ones first, in as far as they fit, then others, all at random.

    Args:
        relevant: bool (B, m), on the CPU.
        count: how many of each row; a row with fewer gives them again, so that rows stay equally long.
        generator: draws.

    Returns:
        Positions, int64 (B, count).
    """
    chance = torch.rand(relevant.shape, generator=generator, dtype=torch.float64)
    order = (chance + relevant).argsort(dim=1, descending=True)
    return order[:, torch.arange(count) % relevant.shape[1]]


def variance_shares(states: Tensor) -> Tensor:
    """Split the variance of one image's V' into effects of token, of question and of their interaction.

    Channels are divided by their standard deviation over tokens. The shares are those of variance components (two-way
    layout with one observation a cell, expected mean squares), which unlike sums of squares do not depend on how many
    questions and tokens there are. An effect of the question is a shift of all tokens, which ranks none anew.

    Args:
        states: (Q, m, d), Q and m at least 2.

    Returns:
        Float64 (3,): token, question, interaction; they add up to 1, or are 0 if nothing varies over the tokens.

    Raises:
        ValueError: if there are fewer than two questions or tokens.
    """
    questions, tokens = states.shape[:2]
    if min(questions, tokens) < 2:
        raise ValueError(f"expected at least two questions and two tokens, got {tuple(states.shape)}")
    values = states.float()
    spread = values.var(dim=1).mean(dim=0).sqrt()
    # A constant channel holds rounding errors of its mean; divided by their own size they would weigh like the others.
    alive = spread > 1e-6 * values.abs().amax(dim=(0, 1))
    values = torch.where(alive, values / spread, torch.zeros_like(values))
    of_token = values.mean(dim=0)
    of_question = values.mean(dim=1)
    grand = of_token.mean(dim=0)
    rest = values - of_token - of_question[:, None] + grand
    token = questions * (of_token - grand).square().sum(dtype=torch.float64) / (tokens - 1)
    question = tokens * (of_question - grand).square().sum(dtype=torch.float64) / (questions - 1)
    interaction = rest.square().sum(dtype=torch.float64) / ((questions - 1) * (tokens - 1))
    parts = torch.stack([(token - interaction) / questions, (question - interaction) / tokens, interaction])
    parts = parts.clamp_min(0).cpu()
    return parts / parts.sum() if parts.sum() > 0 else parts


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Return |both| / |either| of bool masks (..., m), NaN where both are empty."""
    return (first & second).sum(dim=-1) / (first | second).sum(dim=-1)


def least_alike(relevant: Tensor) -> Tensor:
    """Return for each question the other one of its image whose relevant tokens overlap least with its own.

    Args:
        relevant: bool (Q, m), Q at least 2 and no row empty.

    Returns:
        Int64 (Q,).
    """
    overlap = jaccard(relevant[:, None], relevant[None])
    overlap.fill_diagonal_(torch.inf)
    return overlap.argmin(dim=1)


def chance_recall(relevant: Tensor, ratio: float) -> Tensor:
    """Return the recall to expect of random scores, float32 (Q,), for bool (Q, m) without padding."""
    tokens, found = relevant.shape[1], relevant.sum(dim=1)
    kept = keep_count(tokens, ratio)
    return kept * found / tokens / found.clamp_max(kept)
