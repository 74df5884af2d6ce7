"""A few rows of attention of a foreign model, recomputed beside it by hooks: never the whole matrix.

A row's softmax needs its own query and all keys it may see, so one row costs what one token costs. The model runs as it
is, with any attention implementation; what is asked of it is only that queries and keys come from `q_proj` and
`k_proj`, as they do in Llama, Qwen2, CLIP and InternViT. Rows are float32, products included, and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pgp_lightning.vlm.decoder_call import Call, Rope, held_keys

__all__ = [
    "attention_rows",
    "coming_parts",
    "coming_rows",
    "project_keys",
    "project_queries",
    "watch_attention",
]


def project_queries(attention: nn.Module, hidden: Tensor, rope: Rope | None = None) -> Tensor:
    """Return the queries an attention module makes of its input: (B, N, d) to (B, H, N, head width)."""
    return _project(attention, "q", hidden, rope)


def project_keys(attention: nn.Module, hidden: Tensor, rope: Rope | None = None) -> Tensor:
    """Return the keys an attention module makes of its input: (B, N, d) to (B, G, N, head width), G key heads."""
    return _project(attention, "k", hidden, rope)


def attention_rows(attention: nn.Module, queries: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the softmax of some rows of attention.

    Args:
        attention: the module, asked for its scale.
        queries: (B, H, R, head width), positions applied.
        keys: (B, G, K, head width), positions applied; G divides H.
        allowed: bool (B, R, K), what each row may see; everything by default.

    Returns:
        Float32 (B, H, R, K); a row that may see nothing is zero.
    """
    batch, heads, rows, width = queries.shape
    groups, slots = keys.shape[1], keys.shape[2]
    # As fused kernels do it: products stay in float32. In half precision they could be infinite, and would be rounded.
    scaled = queries.float() * _scale(attention)
    scores = scaled.reshape(batch, groups, -1, width) @ keys.float().transpose(2, 3)
    scores = scores.reshape(batch, heads, rows, slots)
    if allowed is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~allowed.any(dim=-1)[:, None, :, None], 0.0)


@contextmanager
def watch_attention(
    attention: nn.Module, seen: Callable[[Tensor], object], last: int = 1, block: int | None = None
) -> Iterator[None]:
    """While open, show the attention of a decoder layer's last queries after each of its forward passes.

    Args:
        attention: a decoder layer's `self_attn`.
        seen: called with float32 (B, H, R, K): the last R = min(last, number of queries) rows over all K keys that the
            layer holds, in prefill and in decode; what a row may not see is 0.
        last: how many of the queries to show.
        block: show at most so many rows at a time, first ones first, with one call of `seen` each: bounds the memory.
    """

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        call = Call(module, args, kwargs)
        hidden, rope = call.hidden, call.rope
        rows = min(last, hidden.shape[1])
        with torch.no_grad():
            queries = project_queries(module, hidden[:, -rows:], (rope[0][:, -rows:], rope[1][:, -rows:]))
            held = held_keys(call)
            keys = (project_keys(module, hidden, rope) if held is None else held).float()  # once for all blocks
            allowed = _allowed(call.mask, queries, keys.shape[2])
            for start in range(0, rows, block or rows):
                part = slice(start, start + (block or rows))
                seen(attention_rows(module, queries[:, :, part], keys, allowed[:, part]))

    handle = attention.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def coming_rows(layer: Any, hidden: Tensor, rope: Rope, valid: Tensor, last: int = 1) -> Tensor:  # noqa: ANN401
    """Return the attention that a decoder layer which has not run yet would pay.

    Args:
        layer: the decoder layer.
        hidden: its input (B, N, d).
        rope: the slots' rotary positions.
        valid: bool (B, N), False on padding.
        last: how many of the last queries to return.

    Returns:
        Float32 (B, H, last, N), on the layer's device.
    """
    return next(coming_parts(layer, hidden, rope, valid, last))


@torch.no_grad()
def coming_parts(
    layer: Any,  # noqa: ANN401
    hidden: Tensor,
    rope: Rope,
    valid: Tensor,
    last: int,
    at_once: int | None = None,
) -> Iterator[Tensor]:
    """Yield what `coming_rows` returns in parts, first rows first: float32 (B, H, R, N); keys are projected once.

    Args:
        layer: the decoder layer.
        hidden: its input (B, N, d).
        rope: the slots' rotary positions.
        valid: bool (B, N), False on padding.
        last: how many of the last queries.
        at_once: attention weights in a part, at least one row; all rows by default.
    """
    attention, slots = layer.self_attn, hidden.shape[1]
    device = _device_of(attention.q_proj, hidden.device)
    if device.type != "meta":  # weights that are offloaded come to the input
        hidden, valid, rope = hidden.to(device), valid.to(device), (rope[0].to(device), rope[1].to(device))
    states = layer.input_layernorm(hidden)
    queries = project_queries(attention, states[:, -last:], (rope[0][:, -last:], rope[1][:, -last:]))
    keys = project_keys(attention, states, rope).float()
    batch, heads, rows = queries.shape[:3]
    block = rows if at_once is None else max(1, at_once // (batch * heads * slots))
    places = torch.arange(slots, device=hidden.device)
    for some, own in zip(queries.split(block, dim=2), places[-rows:].split(block), strict=True):
        yield attention_rows(attention, some, keys, (places <= own[:, None]) & valid[:, None])


def _device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return where a module's weights are; quantised layers hold them as buffers."""
    part = next(chain(module.parameters(), module.buffers()), None)
    return otherwise if part is None else part.device


def _project(attention: Any, which: str, hidden: Tensor, rope: Rope | None) -> Tensor:  # noqa: ANN401
    projected = getattr(attention, f"{which}_proj")(hidden)
    norm = getattr(attention, f"{which}_norm", None)
    # InternViT norms the whole width before heads are split, Qwen3 every head after it.
    by_head = norm is not None and getattr(norm, "weight", projected).shape[-1] == attention.head_dim
    if norm is not None and not by_head:
        projected = norm(projected)
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    if by_head and norm is not None:
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    if rope is None:
        return torch.as_tensor(heads)
    cos, sin = (part[:, None].to(heads.dtype) for part in rope)
    first, second = heads.chunk(2, dim=-1)
    turned: Tensor = heads * cos + torch.cat([-second, first], dim=-1) * sin
    return turned


def _scale(attention: Any) -> float:  # noqa: ANN401
    return float(attention.scaling if hasattr(attention, "scaling") else attention.scale)


def _causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """Return what the last rows may see of the keys: bool (1, rows, keys)."""
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)[None]


def _allowed(mask: Tensor | None, queries: Tensor, keys: int) -> Tensor:
    """Read the mask of any attention implementation for the last R queries (B, H, R, dh): bool (B, R, keys).

    None is a plain causal mask; (B, K) marks padding (flash); (B, 1, Q, K) is bool (sdpa) or added to scores (eager).
    """
    batch, rows = queries.shape[0], queries.shape[2]
    causal = _causal(rows, keys, queries.device).expand(batch, -1, -1)
    if mask is None:
        return causal
    if mask.ndim == 2:
        return causal & mask[:, None, -keys:].bool()
    mask = mask[:, 0, -rows:, :keys]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.expand(batch, -1, -1)
