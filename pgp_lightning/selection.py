"""From importance to keep mask: how many visual tokens stay, and which.

An importance map is (B, M) with -inf on padding; a keep mask is bool (B, M), True on tokens that stay. Every
row's budget comes from its own number of tokens, so a sample's mask does not depend on the batch it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pgp_lightning.errors import ConfigError

__all__ = ["equal_shares", "keep_count", "keep_top", "max_min_diversity", "recall"]

# Far above float64's error in tokens * ratio, far below any fraction a budget could mean.
_ROUNDING_GUARD = 1e-6
# Rows of the similarity matrix that are in memory at a time.
_CHUNK = 256


def keep_count(tokens: int, ratio: float) -> int:
    """Return how many of a sample's visual tokens a keep ratio keeps: max(1, int(tokens * ratio)).

    Products that are whole numbers but for rounding count as whole: 100 * 0.29 keeps 29, not 28.

    Raises:
        ConfigError: if the ratio is outside (0, 1].
        ValueError: if there is no token.
    """
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(f"ratio must be in (0, 1], got {ratio}; it is the share of visual tokens to keep")
    if tokens < 1:
        raise ValueError(f"expected at least one visual token, got {tokens}")
    return max(1, int(tokens * ratio + _ROUNDING_GUARD))


def equal_shares(count: int, parts: int) -> list[int]:
    """Split a budget among an image's tiles: equal shares, the first tiles get one more where it does not divide."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def keep_top(importance: Tensor, ratio: float | None = None, *, count: int | None = None) -> Tensor:
    """Keep every row's most important tokens; of equally important ones those at lower positions.

    Args:
        importance: (B, M), -inf on padding, which may lie anywhere.
        ratio: share of each row's tokens to keep, see ``keep_count``.
        count: number of tokens to keep instead; a row with fewer keeps all it has.

    Returns:
        Keep mask, bool (B, M); exactly the budget is True in every row, and never padding.

    Raises:
        ConfigError: unless exactly one of ratio and count is given, and is in its range.
        ValueError: if the importance is not (B, M), contains NaN, or a row has no token.
    """
    tokens = _tokens(importance)
    if ratio is not None and count is None:
        kept = [keep_count(n, ratio) for n in tokens]
    elif count is not None and ratio is None:
        if count < 1:
            raise ConfigError(f"count must be at least 1, got {count}")
        kept = [min(n, count) for n in tokens]
    else:
        raise ConfigError(f"give exactly one of ratio and count, got ratio={ratio} and count={count}")
    budget = torch.tensor(kept, dtype=torch.long, device=importance.device)
    # A stable sort breaks ties by position; -inf comes last, so a budget within the row's tokens never reaches padding.
    order = importance.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(importance.shape[1], device=importance.device) < budget[:, None]
    return torch.zeros_like(first).scatter(1, order, first)


@torch.no_grad()
def max_min_diversity(features: Tensor, count: int) -> Tensor:
    """Choose tokens that are as unlike each other as can be, greedily (DivPrune's max-min diversity problem).

    The first is the token whose nearest neighbour is farthest; each next one is the token farthest from its nearest
    among those chosen. Distance is 1 - cosine, in float32; of equally far tokens the one at the lowest position wins.
    Tokens are chosen once, also where all that are left repeat a chosen one. Memory is O(N d): a few rows of the
    similarity matrix at a time for the first token, one row for every other.

    Args:
        features: (N, d).
        count: how many to choose, 1 to N.

    Returns:
        Positions in the order of choice, int64 (count,).

    Raises:
        ValueError: if the features are not (N, d) and finite, or the count is out of range.
    """
    if features.ndim != 2 or not 1 <= count <= len(features):
        raise ValueError(f"expected features (N, d) and a count from 1 to N, got {tuple(features.shape)} and {count}")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite; look at the vision tower's output")
    unit = normalize(features.float(), dim=1)
    # Similarity to the nearest other token. Each pair is computed once, so both of a pair have the same.
    nearest = unit.new_full((len(unit),), -torch.inf)
    for first in range(0, len(unit), _CHUNK):
        rows = unit[first : first + _CHUNK] @ unit[first:].T
        rows = rows.masked_fill(~torch.ones_like(rows, dtype=torch.bool).triu(1), -torch.inf)
        nearest[first:] = torch.maximum(nearest[first:], rows.amax(dim=0))
        nearest[first : first + _CHUNK] = torch.maximum(nearest[first : first + _CHUNK], rows.amax(dim=1))
    chosen = [nearest.argmin(dim=0, keepdim=True)]
    nearest = torch.full_like(nearest, -torch.inf)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    while len(chosen) < count:
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]][0])
        taken[chosen[-1]] = True
        chosen.append(nearest.masked_fill(taken, torch.inf).argmin(dim=0, keepdim=True))
    return torch.cat(chosen)


def recall(importance: Tensor, relevant: Tensor, ratio: float) -> Tensor:
    """Return the share of a row's relevant tokens that its top k contains, out of those k could hold.

    |top k and relevant| / min(k, |relevant|): 1 is reachable at every ratio.

    Args:
        importance: (B, M), -inf on padding.
        relevant: bool (B, M); padding is never relevant, whatever it says there.
        ratio: share of each row's tokens in its top k, see ``keep_count``.

    Returns:
        Float32 (B,), NaN in rows without a relevant token.

    Raises:
        ConfigError: if the ratio is outside (0, 1].
        ValueError: if the shapes disagree, the importance contains NaN, or a row has no token.
    """
    if relevant.shape != importance.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"expected bool relevance of shape {tuple(importance.shape)}, got {relevant.dtype} {tuple(relevant.shape)}"
        )
    keep = keep_top(importance, ratio)
    relevant = relevant & (importance != -torch.inf)
    reachable = torch.minimum(keep.sum(dim=1), relevant.sum(dim=1)).float()
    # 0 / 0 is the NaN that marks a row without relevant tokens.
    return (keep & relevant).sum(dim=1).float() / reachable


def _tokens(importance: Tensor) -> list[int]:
    """Check an importance map and return every row's number of tokens."""
    if importance.ndim != 2:
        raise ValueError(f"expected importance of shape (B, M), got {tuple(importance.shape)}")
    if bool(importance.isnan().any()):
        rows = importance.isnan().any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"importance must not contain NaN, got some in rows {rows}; look at the guide's states")
    tokens: list[int] = (importance != -torch.inf).sum(dim=1).tolist()
    if min(tokens, default=1) < 1:
        raise ValueError(f"expected a visual token in every row, got none in row {tokens.index(0)}")
    return tokens
