"""Giving a machine back in time: checkpoint at the exact sample, stop, requeue."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pgp_lightning import warning_signal
from pgp_lightning.errors import ConfigError
from pgp_lightning.training.callbacks import _AfterStep
from pgp_lightning.training.step_checkpoint import StepCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

__all__ = ["Preemption"]


class Preemption(_AfterStep, Checkpoint):
    """Ends a run on SIGUSR1 after the optimiser step at hand: saves, stops, and asks SLURM to requeue the job.

    The signal only sets a flag. Whether it came to any process is settled by all of them together after each step, so
    none is left waiting for another, as happens when a handler saves at once. The checkpoint is the run's last one,
    from which `--ckpt_path last` goes on. Lightning calls it after all that keep state of a step, since it saves.

    SIGTERM, after which SLURM kills, is no warning: it does while training what it did before the trainer, which is to
    end the process at once.

    Args:
        requeue: command that puts the job back into the queue; `{job}` stands for its id. Without a SLURM job, or with
            an empty command, the run only saves and stops.

    Raises:
        ConfigError: by `setup`, without a StepCheckpoint that keeps the last checkpoint.
    """

    _saved = False
    _sigterm: Callable[[int, FrameType | None], object] | int | None = None

    def __init__(self, requeue: Sequence[str] = ("scontrol", "requeue", "{job}")) -> None:
        self.requeue = tuple(requeue)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen, before Lightning installs a handler that saves at once, and know what saves."""
        if stage == "fit":
            self._saving(trainer)
            warning_signal.listen()
            self._sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose teardown does so too.

        Its handler broadcasts from wherever the process is just then. A process that is elsewhere takes that for a
        part of what it is doing itself: it waits for ever, or aborts, or trains on sums that belong to nothing.
        """
        if self._sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._sigterm)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a process was warned."""
        if self._saved or not trainer.strategy.reduce_boolean_decision(warning_signal.warned(), all=False):
            return
        path = self._saving(trainer).save_now(trainer)
        trainer.should_stop = self._saved = True
        # Lightning goes on until these are reached, and the machine would be gone by then.
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        # Lightning validates before it stops. A validation that is due now is not made up for after a resume; any other
        # would be a point of its own in the curves, and take time that may not be left.
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % (trainer.val_check_batch or math.inf):
            trainer.limit_val_batches = 0
        rank_zero_info(f"warned by SIGUSR1: saved {path} at optimiser step {trainer.global_step} and stop")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Requeue the job, which SLURM then ends at once: no process waits for another any more, events are written."""
        acted, self._saved = self._saved, False
        job = _job()
        if not acted:
            return
        warning_signal.forget()
        if not (job and self.requeue):
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            command = [part.format(job=job) for part in self.requeue]
            try:
                subprocess.run(command, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
                rank_zero_warn(f"{' '.join(command)} failed ({reason}): submit the job again to go on")

    @staticmethod
    def _saving(trainer: Trainer) -> StepCheckpoint:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepCheckpoint) and callback.save_last is True:
                return callback
        raise ConfigError("Preemption saves by a StepCheckpoint with save_last: true; add one to trainer.callbacks")


def _job() -> str | None:
    """Return the id of the SLURM job that this is, None outside of one; a task of an array has one of its own."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
