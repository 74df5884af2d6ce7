"""An exponential moving average of what is trained, which validation, checkpoints and the exported guide use."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.training.callbacks import _AfterStep

__all__ = ["WeightAverage"]

CURRENT = "current_weights"


class WeightAverage(_AfterStep):
    """Averages the trained weights over the optimiser steps; the frozen base is not copied.

    After step n the average moves by max(1 - decay, 1 / n) of the way to the weights: at first it is the mean of all
    weights so far, so that where training began is soon forgotten. Validation within a fit sees the average, and a
    checkpoint's `state_dict` is the average, so `lightning validate`, `test` and `pgp export` take it. The weights that
    training goes on with are in the checkpoint, too, and a resumed run is bitwise the undisturbed one.

    Strategies that deal weights to processes are refused, see `options.py`.

    Args:
        decay: share of the average that a step leaves, in the long run.

    Raises:
        ConfigError: if decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"WeightAverage.decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._updates = 0
        # By the name in the module; the weights themselves while they are swapped.
        self._average: dict[str, Tensor] = {}
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average."""
        self._average = {
            name: self._average.get(name, weight).detach().to(weight, copy=True)
            for name, weight in _trained(pl_module).items()
        }

    @torch.no_grad()
    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average."""
        self._updates += 1
        share = max(1 - self.decay, 1 / self._updates)
        weights = _trained(pl_module)
        torch._foreach_lerp_(list(self._average.values()), [weights[name].detach() for name in self._average], share)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place; after a fit, the trainer may validate the weights of another run."""
        if trainer.state.fn == TrainerFn.FITTING and not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back."""
        self.on_validation_end(trainer, pl_module)

    @torch.no_grad()
    def _swap(self, module: LightningModule) -> None:
        for name, weight in _trained(module).items():
            kept = weight.clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(kept)
        self._swapped = not self._swapped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the average the checkpoint's weights, and keep those that training goes on with."""
        if not self._average:
            return
        weights = {name: weight.detach() for name, weight in _trained(pl_module).items()}
        average, current = (weights, self._average) if self._swapped else (self._average, weights)
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint[CURRENT] = dict(current)

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take average and weights of a checkpoint apart, to train on; the module has the average by now."""
        if not trainer.training:
            self._average = {}  # it is of weights that are no longer the module's
            return
        if CURRENT not in checkpoint:
            return
        trained = _trained(pl_module)
        self._average = {name: checkpoint["state_dict"][name] for name in trained}
        for name, weight in trained.items():
            weight.copy_(checkpoint[CURRENT][name])

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps are in the average."""
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._updates = state_dict["updates"]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
