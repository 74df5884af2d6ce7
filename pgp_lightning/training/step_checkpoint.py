"""Checkpoints that lie between optimiser steps, and folders of shards that are whole or not there."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from pgp_lightning.training.run import CONSOLIDATED, RunRecord
from pgp_lightning.training.sharded import whole_weights
from pgp_lightning.vlm.shard_files import sync_path

if TYPE_CHECKING:
    from pgp_lightning.data.collate import Batch

__all__ = ["StepCheckpoint"]


class StepCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves after optimiser steps only, never between the micro-batches of one.

    Lightning's own saves anew after the first micro-batch of a resumed run, since the number of optimiser steps is
    then still one at which to save. With gradient accumulation that checkpoint lies inside a step: the gradients of
    its first micro-batches are in no checkpoint, and the next resume would go on without them. For the same reason a
    validation between the micro-batches of a step saves nothing; an interval of micro-batches that leads there is
    refused where saving goes by validations, see `options.py`, but when one in time is over is not known beforehand.

    A strategy that shards the model writes a folder, file by file. It gets `consolidated.ckpt` as its last one: the
    weights that are saved, whole and in float32, with the run's record, as plain tensors and values. A folder without
    it was not finished and is no checkpoint.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Save if a step is complete and it is time."""
        if not _inside_step(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, which Lightning's own does only if nothing was saved before; say so where that fails."""
        if not self.save_last or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._should_skip_saving_checkpoint(trainer):
            self.save_now(trainer)
        if self._last_global_step_saved != trainer.global_step:
            rank_zero_warn(
                f"training stopped between the micro-batches of optimiser step {trainer.global_step + 1}: the last "
                f"checkpoint is of step {self._last_global_step_saved}"
            )

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return _inside_step(trainer) or super()._should_skip_saving_checkpoint(trainer)

    def save_now(self, trainer: Trainer) -> str:
        """Save the run's last checkpoint, unless it is of this step, and return where; called by all processes."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.last_model_path

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        whole = Path(filepath) / CONSOLIDATED
        if trainer.is_global_zero and whole.parent.is_dir():
            whole.unlink(missing_ok=True)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, filepath)
        if not trainer.strategy.broadcast(whole.parent.is_dir()):  # one answer, whatever a process's disk shows yet
            return
        # What a checkpoint of these weights holds beside the shards: the module and the run's record say.
        module = trainer.lightning_module
        names = dict.fromkeys(name for name, _ in chain(module.named_parameters(), module.named_buffers()))
        content: dict[str, Any] = {"global_step": trainer.global_step, "state_dict": names}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord):
                callback.on_save_checkpoint(trainer, module, content)
        module.on_save_checkpoint(content)
        content["state_dict"] = whole_weights(module, content["state_dict"])
        trainer.strategy.barrier()  # all shards are written
        if trainer.is_global_zero:
            _write(whole, content)
        trainer.strategy.barrier()


def _inside_step(trainer: Trainer) -> bool:
    """Return whether there are gradients of micro-batches that wait for others."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(batches % trainer.accumulate_grad_batches)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_path(path.parent)
