"""What the data let through: epochs, and records that could not be used, by source and reason."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from pgp_lightning.training.callbacks import _AfterStep, write_figures

if TYPE_CHECKING:
    from pgp_lightning.data.collate import Batch

__all__ = ["DataIntake"]


class DataIntake(_AfterStep):
    """Logs `data/epoch` and `data/rejected/<source>/<reason>`, this process's count, at the trainer's interval.

    The first record of each source and reason also gives a warning, and the end of training the totals: nothing is
    left out unnoticed. The data module fails the run when a source has too many.
    """

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self._epoch = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Count."""
        self._count(batch)
        self._epoch = batch.epoch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Warn, but do not count: every validation meets the same records."""
        for key in batch.rejected:
            rank_zero_warn(f"validation leaves out {batch.rejected[key]} record(s) of {key}")

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log at the trainer's interval."""
        interval = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            figures = {f"rejected/{key}": float(number) for key, number in self.rejected.items()}
            write_figures(trainer, "data", {"epoch": float(self._epoch), **figures})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many records were left out."""
        if self.rejected and trainer.is_global_zero:
            listed = ", ".join(f"{key} {number}" for key, number in sorted(self.rejected.items()))
            print(f"{self.rejected.total()} records could not be used and were replaced: {listed}")

    def _count(self, batch: Batch) -> None:
        for key, number in batch.rejected.items():
            if key not in self.rejected:
                rank_zero_warn(f"a record of {key} cannot be used; another of its source takes its place")
            self.rejected[key] += number

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a resumed run's totals are those of the whole run."""
        return dict(self.rejected)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.rejected = Counter(state_dict)
