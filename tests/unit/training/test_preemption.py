"""A warned run stops, whatever else it was to reach first."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from pgp_lightning.training.preemption import Preemption
from pgp_lightning.training.step_checkpoint import StepCheckpoint
from tests.standins import ToyData, ToyModule


class Warn(Callback):
    """Sends the warning in the third optimiser step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("least", [{"min_steps": 9}, {"min_epochs": 1}])
def test_a_warned_run_stops_before_its_least_number_of_steps(tmp_path: Path, least: dict[str, int]) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=9, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[Warn(), StepCheckpoint(tmp_path, save_last=True), Preemption(requeue=())],
        **least,
    )  # fmt: skip
    before = signal.getsignal(signal.SIGUSR1)
    try:
        trainer.fit(ToyModule(), ToyData())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert trainer.global_step == 3
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
