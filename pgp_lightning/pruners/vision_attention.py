"""What a layer of the vision tower attends to, for methods that rank visual tokens by it.

The tower runs as it is, with any attention implementation; what is asked for is recomputed from one layer's input. Its
first token is a class token (CLIP's, InternViT's) and no patch. A visual token is one patch (LLaVA) or a square cell of
them (InternVL's pixel shuffle: token (i, j) is the patches (2i, 2j) to (2i + 1, 2j + 1)).
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.attention import attention_rows, project_keys, project_queries
from pgp_lightning.errors import ConfigError

__all__ = ["by_row", "class_attention", "column_means", "mean_keys", "pool_cells"]

# Attention weights that are in memory at a time.
_AT_ONCE = 2**24


def class_attention(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Return what the class token pays each patch, summed over heads: (T, 1 + P, C) to float32 (T, P)."""
    rows = attention_rows(attention, project_queries(attention, hidden[:, :1]), project_keys(attention, hidden))
    return rows[:, :, 0, 1:].sum(dim=1)


def column_means(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Return what each patch gets, averaged over heads and over all queries: (T, 1 + P, C) to float32 (T, P)."""
    queries, keys = project_queries(attention, hidden), project_keys(attention, hidden).float()
    chunk = max(1, _AT_ONCE // (queries[:, :, 0, 0].numel() * keys.shape[2]))
    total = torch.zeros(len(hidden), keys.shape[2], dtype=torch.float32, device=hidden.device)
    for some in queries.split(chunk, dim=2):
        total += attention_rows(attention, some, keys).mean(dim=1).sum(dim=1)
    return (total / queries.shape[2])[:, 1:]


def mean_keys(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Return each patch's key, averaged over heads: (T, 1 + P, C) to float32 (T, P, head width)."""
    return project_keys(attention, hidden[:, 1:]).mean(dim=1, dtype=torch.float32)


def pool_cells(values: Tensor, tokens: int) -> Tensor:
    """Average patches over the cells that become visual tokens: (T, P, ...) to (T, tokens, ...).

    Raises:
        ConfigError: if the patches are no square of so many square cells.
    """
    patches, side = values.shape[1], isqrt(tokens)
    cell = isqrt(patches) // side
    if (side * cell) ** 2 != patches or side * side != tokens:
        raise ConfigError(f"{patches} patches a tile are no square of {tokens} visual tokens, each a square of patches")
    grid: Any = values.reshape(len(values), side, cell, side, cell, *values.shape[2:])
    return torch.as_tensor(grid.mean(dim=(2, 4)).flatten(1, 2))


def by_row(values: Tensor, counts: list[int], padding: float) -> Tensor:
    """Lay values of visual tokens, tile after tile (T, n), out by prompt: (B, M), padded on the right."""
    return pad_sequence(list(values.flatten().split(counts)), batch_first=True, padding_value=padding)
