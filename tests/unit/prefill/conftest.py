"""A stand-in for FlashAttention's kernels."""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend as the kernel does: (Q, H, dh) over (K, G, dh), causal, the last query beside the last key."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(query))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


def _even(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal or q.shape[1] == 1
    return torch.stack([_attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


def _ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    assert causal or max_seqlen_q == 1
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_attend(*row, softmax_scale) for row in rows])


@pytest.fixture
def flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' own FlashAttention path, unpadding and all, run with kernels of four lines."""
    stand_ins = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": _even,
        "_flash_varlen_fn": _ragged,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(_ragged),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(flash, name, value)
