"""Checkpoints lie between optimiser steps, also the first of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pgp_lightning.training.step_checkpoint import StepCheckpoint
from tests.standins import ToyData, ToyModule


class Saves(Callback):
    """Notes at which optimiser step and after how many micro-batches checkpoints were made."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.at.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))


def fit(folder: Path, kind: type[ModelCheckpoint], steps: int, checkpoint: Path | None = None) -> list[tuple[int, int]]:
    saves = Saves()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=100, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        callbacks=[saves, kind(folder, every_n_train_steps=2, save_last=True, enable_version_counter=False)],
    )  # fmt: skip
    trainer.fit(ToyModule(), ToyData(), ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    return saves.at


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_does_not_save_inside_a_step(tmp_path: Path) -> None:
    first = set(fit(tmp_path, StepCheckpoint, 2))
    assert first == {(2, 4)}
    resumed = set(fit(tmp_path, StepCheckpoint, 5, tmp_path / "last.ckpt"))
    assert resumed == {(4, 8)}
