"""A callback that leaves a trace of every micro-batch in the run's folder, exact to the last bit."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pgp_lightning.data.collate import Batch
from pgp_lightning.objective import divergence_loss

__all__ = ["Slow", "Trace", "hold", "read_trace", "release"]

_HOLD = "hold"


def hold(root: Path, batch: int) -> None:
    """Let a run that is traced wait before this micro-batch, so that it has not ended before it can be disturbed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / _HOLD).write_text(str(batch))


def release(root: Path) -> None:
    """Let a run go on that was held."""
    (root / _HOLD).unlink()


class Trace(Callback):
    """Appends a line for every micro-batch to `trace-<rank>.jsonl`: its samples and loss; waits where it is held."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        with suppress(FileNotFoundError):
            while batch_idx >= int((Path(trainer.default_root_dir) / _HOLD).read_text()):
                if os.getppid() != self._parent:  # nobody is there any more to release it
                    break
                time.sleep(0.01)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        last: Any = pl_module.last
        line = {
            "batch": batch_idx,
            "samples": [list(one) for one in zip(batch.keys, batch.turns, batch.indices, strict=True)],
            "loss": float(outputs["loss"]).hex(),
            "kl": float(divergence_loss(last.divergence, last.mask)).hex(),
        }
        with (Path(trainer.default_root_dir) / f"trace-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class Slow(Callback):
    """Makes one process slow."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


def read_trace(root: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Read a run's trace; the last line may be half written if the process was killed."""
    path = root / f"trace-{rank}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
