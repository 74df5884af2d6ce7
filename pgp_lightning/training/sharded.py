"""Weights that a strategy has dealt to the processes, whole where somebody looks at them.

DeepSpeed's ZeRO-3 holds a part of every weight on each process, and the whole one only while the module that owns it
is in its forward pass; FSDP2 does alike. All functions here are collective: every process calls them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["gathered", "gathers_for", "whole_weights"]


def _is_partitioned(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")


@contextmanager
def gathered(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make ZeRO-3's weights whole meanwhile; those of other strategies are as they are."""
    partitioned = [weight for weight in weights if _is_partitioned(weight)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gathers_for(module: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Let a module's forward pass make weights whole that it reads from another module, for ZeRO-3."""
    for weight in weights:
        if _is_partitioned(weight):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, weight)


def whole_weights(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameters and buffers by name on the CPU; DeepSpeed's in float32, as its optimiser holds them."""
    found = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {name: _whole(found[name]) for name in names}


@torch.no_grad()
def _whole(weight: Tensor) -> Tensor:
    if _is_partitioned(weight) or hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        held = safe_get_full_fp32_param(weight)  # none of what is not trained
        if held is None:
            with gathered([weight]):  # type: ignore[list-item]
                return weight.detach().float().cpu().clone()
        weight = held
    elif hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return weight.detach().cpu().clone()
