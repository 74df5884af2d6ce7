"""The training objective of posterior-guided pruning (Eq. 5) and its schedule.

The paper prints a quantity to be maximised; everything here is its negative, to be minimised. How the
reconstruction term is averaged is not stated there and sets the effective weight of the divergence: see
``reconstruction_loss``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pgp_lightning.errors import ConfigError

__all__ = ["Average", "beta", "divergence_loss", "objective", "reconstruction_loss"]

Average = Literal["token", "sample", "square"]

# A token of a sample with n supervised tokens weighs n to this power.
_POWER: dict[Average, float] = {"token": 0.0, "sample": -1.0, "square": -0.5}


def reconstruction_loss(logits: Tensor, targets: Tensor, rows: Tensor, average: Average = "token") -> Tensor:
    """Average the answer tokens' cross-entropy over a micro-batch.

    Args:
        logits: predictions at the S supervised positions, (S, V); computed in float32, or in float64 if that is theirs.
        targets: token ids, int64 (S,).
        rows: the sample each position belongs to, int64 (S,), in any order.
        average: "token", the mean over all supervised tokens; "sample", the mean of the samples' means;
            "square", tokens weigh 1/sqrt(n) in a sample of n, normalised by the sum of weights (InternVL2.5's
            square averaging, between the other two).

    Returns:
        Float32 scalar.

    Raises:
        ConfigError: if ``average`` is none of these.
        ValueError: if the shapes disagree or nothing is supervised.
    """
    if average not in _POWER:
        raise ConfigError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or rows.shape != targets.shape:
        raise ValueError(
            "expected logits (S, V), targets (S,) and rows (S,), "
            f"got {tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(rows.shape)}"
        )
    if not len(targets):
        raise ValueError("expected at least one supervised token, got none; drop samples with empty answers")
    losses = functional.cross_entropy(logits.to(_wide(logits)), targets, reduction="none")
    if average == "token":  # equal weights, without the device synchronisation that counting costs
        return losses.mean()
    weights = torch.bincount(rows)[rows].to(losses.dtype).pow(_POWER[average])
    return (weights * losses).sum() / weights.sum()


def divergence_loss(divergence: Tensor, mask: Tensor) -> Tensor:
    """Average the divergence over each sample's own visual tokens, then over samples (Eq. 5).

    Every sample counts alike, however many tiles it has and however long its answer is.

    Args:
        divergence: per visual token, (B, m); values off the mask are ignored.
        mask: True on visual tokens, bool (B, m).

    Returns:
        Float32 scalar.

    Raises:
        ValueError: if the shapes disagree or a sample has no visual token.
    """
    if mask.shape != divergence.shape or mask.dtype != torch.bool:
        shape = tuple(divergence.shape)
        raise ValueError(f"expected a bool mask of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
    counts = mask.sum(dim=1)
    if not bool((counts > 0).all()):
        raise ValueError("expected a visual token in every sample, got a row without any; drop text-only samples")
    return (divergence.to(_wide(divergence)).masked_fill(~mask, 0.0).sum(dim=1) / counts).mean()


def objective(reconstruction: Tensor, divergence: Tensor, beta: float) -> Tensor:
    """Combine the two terms into the loss (Eq. 5, negated)."""
    return reconstruction + beta * divergence


def beta(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Return the divergence's weight at an optimiser step: linear from start to end, then constant.

    The paper's formula falls (0.5 to 0.2), its prose rises; both are this function with the ends exchanged.

    Args:
        step: optimiser steps taken since the beginning of training, resumed runs included.
        start: value at step 0.
        end: value from step ``warmup_steps`` on.
        warmup_steps: gamma; 0 gives ``end`` throughout.

    Raises:
        ValueError: if the step or the warm-up is negative.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step and warmup_steps must not be negative, got {step} and {warmup_steps}")
    if step >= warmup_steps:
        return end
    return start + (end - start) * (step / warmup_steps)


def _wide(values: Tensor) -> torch.dtype:
    """Return the dtype to compute in: at least float32."""
    return torch.promote_types(values.dtype, torch.float32)
