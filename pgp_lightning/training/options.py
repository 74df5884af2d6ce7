"""Options of Lightning's trainer that would be void or wrong here; each is refused by name before the first step.

`lightning` and `pgp doctor` ask here, and nowhere else; docs/troubleshooting.md says why, and what to use instead.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError
from pgp_lightning.training.preemption import Preemption
from pgp_lightning.training.step_checkpoint import StepCheckpoint
from pgp_lightning.training.weight_average import WeightAverage

__all__ = ["check_fit", "check_precision", "refusals"]

# Those that leave trained weights in float32, or wider.
PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)

CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: (
        "replaces the learning-rate schedule, and its average reaches no checkpoint: take WeightAverage"
    ),
    WeightAveraging: "averages the frozen base as well, and its runs cannot be resumed: take WeightAverage",
    GradientAccumulationScheduler: (
        "goes by epochs, and training is a single one: set trainer.accumulate_grad_batches, or add GlobalBatch"
    ),
    LearningRateFinder: (
        "trains before beta, schedule and data are set up: compare short runs by `pgp sweep` with a row for each "
        "model.learning_rate"
    ),
    BatchSizeFinder: (
        "trains before beta, schedule and data are set up: `pgp doctor` predicts the memory of data.batch_size, and "
        "GlobalBatch keeps the records of an optimiser step"
    ),
    BackboneFinetuning: "freezes and thaws a `backbone`, which a guide has not: model.guide says what is trained",
    ModelPruning: "prunes weights, those of the frozen base among them, and its checkpoints are no guide's",
    SpikeDetection: (
        "lists batches for the next run to leave out, and the data order leaves none out: set "
        "trainer.gradient_clip_val, or leave records out of the manifest"
    ),
}


def check_fit(trainer: Trainer, data: object) -> None:
    """Refuse to train under options that would be void or wrong.

    Raises:
        ConfigError: names each of them and says what to do instead.
    """
    if found := list(refusals(trainer, data)):
        raise ConfigError("; ".join(found))


def check_precision(trainer: Trainer) -> None:
    """Refuse a precision that rounds trained weights.

    Raises:
        ConfigError: says which precisions do not.
    """
    if found := list(_precision(trainer)):
        raise ConfigError(found[0])


def refusals(trainer: Trainer, data: object) -> Iterator[str]:
    """Yield what a fit of this trainer on this data module would do wrong, an option each."""
    yield from _precision(trainer)
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        yield (
            "trainer.strategy starts its processes from this one (ddp_spawn, ddp_fork, ddp_notebook), which then knows "
            "neither steps nor figures: use ddp"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, reason in CALLBACKS.items():
            if isinstance(callback, kind):
                yield f"the callback {type(callback).__name__} {reason}"
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
            yield (
                f"save_weights_only of {type(callback).__name__} leaves out the run's record, what WeightAverage does "
                "and what a run is resumed from: leave it out, checkpoints are without frozen weights anyway"
            )
        if isinstance(callback, WeightAverage) and isinstance(trainer.strategy, SHARDING):
            strategy = type(trainer.strategy).__name__
            yield f"WeightAverage needs whole weights, and {strategy} deals them to the processes: use ddp"
    asynchronous = isinstance(getattr(trainer.strategy, "_checkpoint_io", None), AsyncCheckpointIO)
    if asynchronous and any(isinstance(callback, Preemption) for callback in callbacks):
        yield "the plugin AsyncCheckpointIO may still be writing when Preemption gives the job back: leave one out"
    # A trial of some batches leaves nothing behind.
    if isinstance(data, InstructionData) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield from _stream(trainer)
        if trainer.accumulate_grad_batches > 1:
            yield from _inside_steps(callbacks)
            yield from _validations(trainer, callbacks)


def _precision(trainer: Trainer) -> Iterator[str]:
    plugin = trainer.precision_plugin
    # bitsandbytes' plugin does not name a precision of its own.
    name = type(plugin).__name__ if isinstance(plugin, BitsandbytesPrecision) else str(plugin.precision)
    if name not in PRECISIONS:
        yield (
            f"trainer.precision {name} keeps adapter, bottleneck and prior in less than float32, where most steps of "
            "an optimiser round to nothing: use bf16-mixed, or 32-true with dtype: bfloat16 for the frozen model alone"
        )


def _stream(trainer: Trainer) -> Iterator[str]:
    """Yield what contradicts training data that is one stream of max_steps optimiser steps, a single epoch."""
    steps, accumulated = trainer.max_steps, trainer.accumulate_grad_batches
    if accumulated < 1:
        yield f"trainer.accumulate_grad_batches must be at least 1, got {accumulated}"
    if steps < 1:
        yield f"trainer.max_steps must say how long training is, got {steps}"
        return
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit and not isinstance(overfit, int):
        yield (
            f"trainer.overfit_batches {overfit} is a share of an endless stream: give a number of micro-batches, "
            "e.g. 2, which then come over and over"
        )
    if not overfit and trainer.limit_train_batches != 1.0:
        yield (
            f"trainer.limit_train_batches {trainer.limit_train_batches} would cut the stream into epochs, whose last "
            "optimiser step may lack micro-batches: set trainer.max_steps to train less, or trainer.overfit_batches "
            "to see the same micro-batches over and over"
        )
    if trainer.max_epochs == 0:
        yield "trainer.max_epochs 0 trains nothing: leave it out, trainer.max_steps says how long training is"
    if (trainer.min_epochs or 0) > 1:
        yield f"trainer.min_epochs {trainer.min_epochs} has no effect in a single epoch: set trainer.min_steps"
    if (trainer.min_steps or 0) > steps:
        yield f"trainer.min_steps {trainer.min_steps} is more than trainer.max_steps {steps}, which ends the run"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        yield "trainer.reload_dataloaders_every_n_epochs has no effect, training is a single epoch: leave it out"
    every = trainer.check_val_every_n_epoch
    if every not in (None, 1):
        yield (
            f"trainer.check_val_every_n_epoch {every} never validates, training is a single epoch: set it to null and "
            "trainer.val_check_interval to a number of micro-batches"
        )
    interval = getattr(trainer, "val_check_interval", None)  # there is none of an interval in time
    if every == 1 and isinstance(interval, int) and interval > steps * accumulated and trainer.limit_val_batches:
        yield (
            f"trainer.val_check_interval {interval} is more than the run's {steps * accumulated} micro-batches: lower "
            "it, or set trainer.limit_val_batches to 0"
        )


def _inside_steps(callbacks: list[Callback]) -> Iterator[str]:
    """Yield the callbacks that save between the micro-batches of a step, whose gradients are in no checkpoint."""
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            yield f"save_on_exception of {name} may save inside an optimiser step: leave it out, or save more often"
        elif isinstance(callback, ModelCheckpoint) and not isinstance(callback, StepCheckpoint):
            yield f"the callback {name} saves inside optimiser steps: take StepCheckpoint, which has the same options"
        elif isinstance(callback, OnExceptionCheckpoint):
            yield f"the callback {name} may save inside an optimiser step: let StepCheckpoint save more often"


def _validations(trainer: Trainer, callbacks: list[Callback]) -> Iterator[str]:
    """Yield the callbacks that save at validations, should these lie between the micro-batches of a step."""
    accumulated, batches = trainer.accumulate_grad_batches, trainer.max_steps * trainer.accumulate_grad_batches
    interval = getattr(trainer, "val_check_interval", None)  # when one in time is over is not known yet
    if interval is None or not trainer.limit_val_batches:
        return
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    if every > batches or every % accumulated == 0:
        return
    for callback in callbacks:
        if (
            isinstance(callback, StepCheckpoint)
            and callback.every_n_epochs == 1
            and not callback._save_on_train_epoch_end
        ):
            yield (
                f"the callback {type(callback).__name__} without every_n_train_steps saves at validations, some of "
                f"which trainer.val_check_interval {interval} puts between the {accumulated} micro-batches of an "
                f"optimiser step, where nothing can be saved: set it to a multiple of {accumulated}"
            )
