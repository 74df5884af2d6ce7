"""Checkpoints lie between optimiser steps, also the first of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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


class Stop(Callback):
    """Stops training after a number of micro-batches, as a time limit does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx + 1 == self.after


def fit(
    folder: Path,
    kind: type[ModelCheckpoint],
    steps: int,
    checkpoint: Path | None = None,
    stop: int = 0,
    interval: int = 100,
    **options: Any,
) -> list[tuple[int, int]]:
    saves = Saves()
    options = {"every_n_train_steps": 2, "save_last": True, "enable_version_counter": False, **options}
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=interval, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        callbacks=[saves, Stop(stop), kind(folder, **options)],
    )  # fmt: skip
    trainer.fit(ToyModule(), ToyData(), ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    return saves.at


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_does_not_save_inside_a_step(tmp_path: Path) -> None:
    first = set(fit(tmp_path, StepCheckpoint, 2))
    assert first == {(2, 4)}
    resumed = set(fit(tmp_path, StepCheckpoint, 5, tmp_path / "last.ckpt"))
    assert resumed == {(4, 8), (5, 10)}


@pytest.mark.filterwarnings("ignore")
def test_the_last_step_is_saved_and_a_longer_run_goes_on_from_it(tmp_path: Path) -> None:
    assert set(fit(tmp_path, StepCheckpoint, 3)) == {(2, 4), (3, 6)}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert set(fit(tmp_path, StepCheckpoint, 7, tmp_path / "last.ckpt")) == {(4, 8), (6, 12), (7, 14)}
    # Stopped before its end: the step is saved, and the run goes on with the next micro-batch.
    assert set(fit(tmp_path / "cut", StepCheckpoint, 7, stop=6)) == {(2, 4), (3, 6)}
    assert set(fit(tmp_path / "cut", StepCheckpoint, 7, tmp_path / "cut" / "last.ckpt")) == {(4, 8), (6, 12), (7, 14)}


@pytest.mark.filterwarnings("ignore:(?!training stopped)")
def test_a_run_that_stops_inside_a_step_says_what_is_saved(tmp_path: Path) -> None:
    words = r"between the micro-batches of optimiser step 4: the last checkpoint is of step 2"
    with pytest.warns(UserWarning, match=words):
        assert set(fit(tmp_path, StepCheckpoint, 9, stop=7)) == {(2, 4)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"monitor": "val/loss"}, {"every_n_train_steps": 0}])
def test_a_validation_inside_a_step_saves_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = fit(tmp_path, StepCheckpoint, 8, interval=5, **options)  # after micro-batches 5, 10 and 15
    assert all(batches == 2 * step for step, batches in saved), saved
    assert saved[-1] == (8, 16)
