"""Weights that a strategy has dealt to the processes, whole where somebody looks at them.

DeepSpeed's ZeRO-3 and FSDP2 hold a part of every weight on each process, and the whole one only while the module that
owns it is in its forward pass. All functions here are collective: every process calls them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pgp_lightning.guides.posterior import PosteriorGuide

__all__ = ["gathers_for", "shard_guide", "whole", "whole_weights"]


def _is_partitioned(weight: Tensor) -> bool:
    """Return whether ZeRO-3 has dealt a weight."""
    return hasattr(weight, "ds_id")


@torch.no_grad()
def whole(weight: Tensor) -> Tensor:
    """Return a weight, gathered from all processes if it is dealt to them."""
    if _is_partitioned(weight):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def whole_weights(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameters and buffers by name on the CPU; DeepSpeed's in float32, as its optimiser holds them."""
    found = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {name: _held(found[name]).detach().cpu().clone() for name in names}


def _held(weight: Tensor) -> Tensor:
    if _is_partitioned(weight) or hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        held: Tensor | None = safe_get_full_fp32_param(weight)  # none of what is not trained
        return whole(weight).float() if held is None else held
    return whole(weight)


def gathers_for(module: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Let a module's forward pass make weights whole that it reads from another module, for ZeRO-3."""
    for weight in weights:
        if _is_partitioned(weight):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, weight)


def shard_guide(guide: PosteriorGuide, mesh: DeviceMesh) -> None:
    """Deal a guide's weights to the processes of a mesh by FSDP2, decoder layer by decoder layer."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(guide, FSDPModule):
        return
    for layer in guide.vlm.decoder_layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(guide, mesh=mesh)
    # Training calls these by name, and not the guide's own forward pass.
    for method in ("visual_tokens", "bottleneck_pass", "reconstruction_pass"):
        register_fsdp_forward_method(guide, method)
