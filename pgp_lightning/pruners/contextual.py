"""Dominant and contextual tokens of one tile: which stay, and what they absorb (VisionZip, Sec. 3.2 and 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pgp_lightning.selection import keep_top

__all__ = ["Choice", "merge", "select", "split_budget"]


class Choice(NamedTuple):
    """Which of a tile's n visual tokens stay.

    Attributes:
        dominant: int64 (d,), ascending.
        targets: int64 (c,), the contextual tokens' places, ascending.
        owner: int64 (n,), the target that a token is merged into; a token that is not merged owns itself.
    """

    dominant: Tensor
    targets: Tensor
    owner: Tensor


def split_budget(count: int, contextual_share: float = 1 / 6.4) -> tuple[int, int]:
    """Return how many of a tile's tokens are dominant and how many contextual: 54 + 10, 108 + 20, 162 + 30."""
    contextual = min(max(1, round(count * contextual_share)), count - 1) if contextual_share and count else 0
    return count - contextual, contextual


def select(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> Choice:
    """Choose a tile's dominant and contextual tokens.

    Args:
        score: (n,), the attention that tokens get.
        keys: (n, head width), compared by cosine.
        dominant: how many to keep by score; of equals those at lower places.
        contextual: how many of the others to keep, evenly spaced; fewer if there are fewer.
    """
    places = torch.arange(len(score), device=score.device)
    top = keep_top(score[None], count=dominant)[0] if dominant else torch.zeros_like(places, dtype=torch.bool)
    rest, owner = places[~top], places.clone()
    contextual = min(contextual, len(rest))
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else rest[:0]
    if contextual:
        unit = normalize(keys.float(), dim=1)
        owner[rest] = targets[(unit[rest] @ unit[targets].T).argmax(dim=1)]
        owner[targets] = targets
    return Choice(places[top], targets, owner)


def merge(tokens: Tensor, choice: Choice) -> Tensor:
    """Add to each target the mean of the tokens that it owns: (n, C) to (n, C), the others as they are.

    A sum of target and mean, as released: no mean over the cluster.
    """
    owned = choice.owner == choice.targets[:, None]
    owned[torch.arange(len(choice.targets)), choice.targets] = False
    means = owned.float() @ tokens.float() / owned.sum(dim=1, keepdim=True).clamp(min=1)
    return tokens.index_copy(0, choice.targets, tokens[choice.targets] + means.to(tokens.dtype))
