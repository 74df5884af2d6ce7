"""What happens around training steps: the penalty's schedule, exact random numbers, throughput, lines for log files."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from pgp_lightning.errors import ConfigError
from pgp_lightning.objective import beta

if TYPE_CHECKING:
    from pgp_lightning.data.collate import Batch

__all__ = [
    "BetaAnnealing",
    "LogLine",
    "RandomState",
    "event_step",
    "total_steps",
    "write_figures",
]


def total_steps(trainer: Trainer) -> int:
    """Return how many optimiser steps a run has.

    Raises:
        ConfigError: if the configuration sets no end.
    """
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    if steps in (-1, float("inf")):
        raise ConfigError("expected a run of known length, got an endless one: set trainer.max_steps")
    return int(steps)


def event_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs figures now: it numbers the n-th optimiser step n - 1."""
    return max(0, trainer.global_step - 1)


def write_figures(trainer: Trainer, group: str, figures: Mapping[str, float]) -> None:
    """Write figures to the loggers as group/name, now; those that are not finite are left out.

    LightningModule.log would write a figure again at every logging step until there is a new one.
    """
    finite = {f"{group}/{name}": value for name, value in figures.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        logger.log_metrics(finite, step=event_step(trainer))


class _AfterStep(Callback):
    """Calls `after_step` after each optimiser step, once, however many micro-batches it takes."""

    _steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, also after a resume."""
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Notice that the optimiser stepped."""
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.after_step(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is to be done after an optimiser step."""
        raise NotImplementedError


class BetaAnnealing(Callback):
    """Sets `pl_module.beta` before every step: linear from start to end, then constant (PGP, supplement, Table T1).

    The paper's text lets the penalty rise, its formula lets it fall; exchange start and end for the latter. The value
    depends on the number of optimiser steps alone, so a resumed run has the same.

    Args:
        start: weight of the divergence at step 0.
        end: weight after the warm-up.
        warmup_fraction: share of all optimiser steps that the way from start to end takes, 0.2 in the paper.

    Raises:
        ConfigError: if a weight is negative or the share is not in [0, 1].
    """

    def __init__(self, start: float = 0.2, end: float = 0.5, warmup_fraction: float = 0.2) -> None:
        if not (0 <= start < float("inf") and 0 <= end < float("inf")):
            raise ConfigError(f"start and end of beta must be finite and not negative, got {start} and {end}")
        if not 0 <= warmup_fraction <= 1:
            raise ConfigError(f"warmup_fraction must be in [0, 1], got {warmup_fraction}")
        self.start, self.end, self.warmup_fraction = start, end, warmup_fraction
        self._warmup_steps = 0
        self._current: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the length of the warm-up."""
        self._warmup_steps = round(self.warmup_fraction * total_steps(trainer))
        self._set(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Set the weight for the step this micro-batch belongs to."""
        self._set(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of training, weigh as the checkpoint did."""
        if self._current is not None:
            pl_module.beta = self._current  # type: ignore[assignment]

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._current = beta(trainer.global_step, self.start, self.end, self._warmup_steps)
        pl_module.beta = self._current  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """Return the current weight, for validation alone: training computes it anew."""
        return {} if self._current is None else {"beta": self._current}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weight of the checkpoint."""
        self._current = state_dict.get("beta")


class RandomState(Callback):
    """Makes the random numbers of training steps one stream of its own, and keeps it in checkpoints.

    The generators of torch (CPU and this process's GPU), numpy and Python are noted when a step ends and set back when
    the next one begins. Whatever draws in between (validation, a loader's new iterator, other callbacks, all that a
    resume does) leaves no trace, so a resumed step is bitwise the step of an undisturbed run. Every process's state
    is in the checkpoint, as tensors and numbers only.
    """

    def __init__(self) -> None:
        self._between: dict[str, Any] | None = None  # the state noted at a step's end; None inside a step
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take this process's state out of the checkpoint."""
        if self._loaded is None:
            return
        if trainer.world_size != len(self._loaded):
            rank_zero_warn(
                f"the checkpoint holds random states of {len(self._loaded)} processes, now there are "
                f"{trainer.world_size}: dropout will differ from an undisturbed run"
            )
        if trainer.global_rank < len(self._loaded):
            self._between = self._loaded[trainer.global_rank]
        self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Go on where the last step stopped."""
        if self._between is not None:
            _set_random_state(self._between)
            self._between = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note where the step stopped."""
        self._between = _random_state()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes; a collective call when there are several."""
        own = self._between if self._between is not None else _random_state()
        states: list[Any] = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._loaded = state_dict["processes"]


def _random_state() -> dict[str, Any]:
    """Return the state of all generators as tensors and numbers."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    """Set all generators."""
    torch.set_rng_state(state["torch"].cpu())
    python, keys = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = keys["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, keys["position"], keys["has_gauss"], keys["cached"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class LogLine(_AfterStep):
    """Prints a plain line now and then, for runs whose output is a file; silent on a terminal, which has a bar.

    Args:
        every_n_steps: optimiser steps from line to line.

    Raises:
        ConfigError: if every_n_steps is less than 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._silent = True
        self._samples = self._first = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        super().on_train_start(trainer, pl_module)
        self._silent = sys.stdout.isatty() or not trainer.is_global_zero
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._samples, self._first, self._since = 0, trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Count the samples."""
        self._samples += len(batch.request) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line when it is due."""
        total = trainer.max_steps if trainer.max_steps > 0 else None
        step = trainer.global_step
        if self._silent or (step % self.every_n_steps and step != total):
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        words = [f"step {step}" if total is None else f"step {step}/{total}"]
        words += _figures(trainer, ("train/loss", "train/kl", "train/reconstruction", "train/beta"))
        words.append(f"{self._samples / seconds:.1f} samples/s")
        if total is not None:
            words.append(f"eta {_clock((total - step) * seconds / max(1, step - self._first))}")
        print("  ".join(words), flush=True)
        self._restart(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's figures."""
        if self._silent or trainer.sanity_checking:
            return
        names = tuple(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
        print("  ".join([f"validation at step {trainer.global_step}", *_figures(trainer, names, "")]), flush=True)


def _figures(trainer: Trainer, names: tuple[str, ...], prefix: str = "train/") -> list[str]:
    """Return "name value" of those metrics that exist."""
    metrics = trainer.callback_metrics
    return [f"{name.removeprefix(prefix)} {float(metrics[name]):.4g}" for name in names if name in metrics]


def _clock(seconds: float) -> str:
    """Return a time span as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
