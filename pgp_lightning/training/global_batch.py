"""The records of an optimiser step, the same for any number of processes."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pgp_lightning.errors import ConfigError

__all__ = ["GlobalBatch", "micro_batches"]


def micro_batches(records: int, processes: int, batch_size: int) -> int:
    """Return how many micro-batches of each process make an optimiser step of so many records.

    Args:
        records: of an optimiser step, over all processes.
        processes: that share them.
        batch_size: records of a micro-batch.

    Raises:
        ConfigError: if the records cannot be dealt to the processes, or not in such micro-batches.
    """
    each, rest = divmod(records, processes)
    if rest:
        fitting = ", ".join(str(n) for n in range(1, records + 1) if records % n == 0)
        raise ConfigError(
            f"{records} records per optimiser step cannot be dealt to {processes} processes: use one of {fitting} "
            "processes, or change the records of GlobalBatch"
        )
    if each % batch_size:
        fitting = ", ".join(str(n) for n in range(1, each + 1) if each % n == 0)
        raise ConfigError(
            f"{records} records per optimiser step are {each} for each of {processes} processes, which "
            f"data.batch_size {batch_size} does not divide: set data.batch_size to one of {fitting}"
        )
    return each // batch_size


class GlobalBatch(Callback):
    """Sets `trainer.accumulate_grad_batches` so that an optimiser step takes a given number of records.

    Args:
        records: per optimiser step, over all processes; 176 in the paper.

    Raises:
        ConfigError: if records is less than 1.
    """

    def __init__(self, records: int = 176) -> None:
        if records < 1:
            raise ConfigError(f"GlobalBatch.records must be at least 1, got {records}")
        self.records = records
        self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the accumulation before data and strategy ask for it."""
        if stage == "fit":
            self.settle(trainer, trainer.datamodule)  # type: ignore[attr-defined]

    def settle(self, trainer: Trainer, data: object) -> None:
        """Set the accumulation for the micro-batches of a data module, and say what came out.

        Raises:
            ConfigError: if the records cannot be dealt to the processes, or the trainer was told otherwise.
        """
        batch_size = getattr(data, "batch_size", None)
        if not isinstance(batch_size, int):
            raise ConfigError(f"GlobalBatch needs data with a batch_size, and {type(data).__name__} has none")
        wanted = micro_batches(self.records, max(1, int(trainer.world_size)), batch_size)
        given = int(trainer.accumulate_grad_batches)
        if given not in (1, wanted):
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {given}, for {self.records} records per optimiser step it has to "
                f"be {wanted}: leave it out, or change the records of GlobalBatch"
            )
        trainer.accumulate_grad_batches = wanted
        if not self._told:
            rank_zero_info(self.told(trainer, batch_size))
            self._told = True

    def told(self, trainer: Trainer, batch_size: int) -> str:
        """Say what an optimiser step is made of."""
        parts = f"{max(1, int(trainer.world_size))} processes x {batch_size} records"
        return f"{self.records} records per optimiser step = {parts} x {trainer.accumulate_grad_batches} micro-batches"
