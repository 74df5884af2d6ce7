"""From importance to keep mask: how many visual tokens stay, and which.

An importance map is (B, M) with -inf on padding; a keep mask is bool (B, M), True on tokens that stay. Every
row's budget comes from its own number of tokens, so a sample's mask does not depend on the batch it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError

__all__ = ["keep_count", "keep_top", "recall"]

# Far above float64's error in tokens * ratio, far below any fraction a budget could mean.
_ROUNDING_GUARD = 1e-6


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
