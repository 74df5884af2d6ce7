"""Is the posterior well? Its figures while training, and an alarm with advice when it degenerates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pgp_lightning.bottleneck import GaussianBottleneck
from pgp_lightning.errors import ConfigError
from pgp_lightning.training.callbacks import _AfterStep, event_step, write_figures
from pgp_lightning.training.sharded import whole

if TYPE_CHECKING:
    from pgp_lightning.training.pgp import StepRecord

__all__ = ["PosteriorHealth", "channel_divergence"]

# Measured on the embedded world: 0.70 at the start, 0.03 to 0.13 when trained well, 0.0005 once collapsed.
COLLAPSED = 0.005
EXPLODED = 50.0
# A sigmoid gate whose mean is past these passes everything, or nothing, on.
SATURATED = (0.005, 0.995)
DEAD_CHANNEL = 1e-4


class PosteriorHealth(_AfterStep):
    """Logs the posterior's figures from `pl_module.last` and warns, once per episode, when it degenerates.

    `health/kl` (histogram of the divergence per token), `health/gate_mean`, `health/dead_channels` (the share of
    channels whose mean divergence is below 1e-4), `health/rms_visual`, `health/rms_states` and `health/rms_latents`.
    A figure that is not finite is left out. Relative contrast of the map is no sign of health: it rises on collapse.

    Args:
        every_n_steps: optimiser steps from one look to the next.
        collapsed: mean divergence per token under which the posterior counts as collapsed.
        exploded: mean divergence per token over which it counts as exploded.

    Raises:
        ConfigError: if every_n_steps is less than 1, or the bounds are not 0 < collapsed < exploded.
    """

    def __init__(self, every_n_steps: int = 50, collapsed: float = COLLAPSED, exploded: float = EXPLODED) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not 0 < collapsed < exploded:
            raise ConfigError(f"expected 0 < collapsed < exploded, got {collapsed} and {exploded}")
        self.every_n_steps, self.collapsed, self.exploded = every_n_steps, collapsed, exploded
        self._alarm = ""  # the alarm of the current episode

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the step."""
        if trainer.global_step % self.every_n_steps:
            return
        step = cast("StepRecord", pl_module.last)
        divergence = step.divergence[step.mask]
        figures = self.figures(step, cast(GaussianBottleneck, pl_module.guide.bottleneck))  # type: ignore[union-attr]
        write_figures(trainer, "health", figures)
        finite = divergence[divergence.isfinite()]
        if trainer.is_global_zero and len(finite):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_histogram("health/kl", finite.float().cpu(), event_step(trainer))
        self._warn(float(divergence.mean()), figures["gate_mean"], trainer)

    @staticmethod
    @torch.no_grad()
    def figures(step: StepRecord, bottleneck: GaussianBottleneck) -> dict[str, float]:
        """Return the figures over the step's visual tokens, padding excluded."""
        posterior, mask = step.posterior, step.mask
        rms = {"visual": step.visual, "states": step.states, "latents": step.latents}
        return {
            "gate_mean": float(posterior.gate[mask].mean()),
            "dead_channels": float((channel_divergence(step, bottleneck) < DEAD_CHANNEL).float().mean()),
            **{f"rms_{name}": float(values[mask].float().square().mean().sqrt()) for name, values in rms.items()},
        }

    def _warn(self, divergence: float, gate: float, trainer: Trainer) -> None:
        """Warn at the beginning of an episode."""
        advice = ""
        if divergence < self.collapsed:
            advice = "has collapsed onto the prior: lower beta (end of BetaAnnealing), or lengthen its warm-up"
        elif divergence > self.exploded or not math.isfinite(divergence):
            advice = "explodes: lower the learning rate, clip gradients, or raise beta"
        elif gate < SATURATED[0]:
            advice = "has its gate closed for good: lower beta (end of BetaAnnealing)"
        elif gate > SATURATED[1] and gate <= 1.0:
            advice = "has its gate wide open, so it selects nothing: raise beta"
        if advice and advice != self._alarm:
            rank_zero_warn(
                f"at step {trainer.global_step} the posterior {advice} "
                f"(divergence per token {divergence:.3g}, gate {gate:.3g})"
            )
        self._alarm = advice

    def state_dict(self) -> dict[str, Any]:
        """Return the alarm of the current episode."""
        return {"alarm": self._alarm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not warn again of an episode that was reported."""
        self._alarm = state_dict["alarm"]


@torch.no_grad()
def channel_divergence(step: StepRecord, bottleneck: GaussianBottleneck) -> Tensor:
    """Return the mean divergence of each channel over the step's visual tokens (Eq. 2 before its mean): (d,)."""
    mean, log_variance = step.posterior.mean[step.mask], step.posterior.log_variance[step.mask]
    own = Normal(mean, (0.5 * log_variance).exp(), validate_args=False)
    prior_mean, prior_log_variance = whole(bottleneck.prior_mean), whole(bottleneck.prior_log_variance)
    spread = (0.5 * prior_log_variance.float()).exp()
    return kl_divergence(own, Normal(prior_mean.float(), spread, validate_args=False)).mean(dim=0)
