"""How fast training goes, on the slowest process too, and what was at hand when it stopped."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pgp_lightning.errors import lost_peer
from pgp_lightning.training.callbacks import _AfterStep, write_figures

if TYPE_CHECKING:
    from pgp_lightning.data.collate import Batch

__all__ = ["FailureReport", "Throughput"]


class Throughput(_AfterStep):
    """Logs how fast training goes, at the trainer's logging interval and as means over it.

    `throughput/samples_per_second` and `throughput/visual_tokens_per_second` over all processes,
    `throughput/data_wait_share`: the share of the time between micro-batches, `throughput/peak_memory_gib`: the
    greatest memory so far of a GPU or, without one, of a process, `throughput/tiles_mean` and `tiles_max` of an image.
    Pauses with a validation or a checkpoint in them do not count as time.

    Of several processes also: `throughput/data_wait_share_max`; and `throughput/slowest_rank`, the one with the most
    time of its own, with `throughput/slowest_rank_lag`, how much more than the mean that was. A process's own time is
    its loader's waiting and the forward passes: in the backward pass, and between micro-batches, all wait for the
    slowest. Where weights are sharded they do so in the forward passes, too, and the lag is no more than a hint.
    """

    def __init__(self) -> None:
        self._reset()
        self._ended: float | None = None  # when the last micro-batch ended; None if the pause since does not count
        self._began = 0.0
        self._waited = 0.0  # by the loader, when the last pause ended

    def _reset(self) -> None:
        self._samples = self._tokens = self._images = self._tiles = self._most_tiles = 0
        self._working = self._waiting = self._pausing = self._forward = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        super().on_train_start(trainer, pl_module)
        self._reset()
        self._ended = None
        self._waited = _waited(trainer) or 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Count the pause, and how much of it the data took."""
        self._began = time.perf_counter()
        waited = _waited(trainer)
        if self._ended is not None:
            pause = self._began - self._ended
            self._pausing += pause
            self._waiting += pause if waited is None else waited - self._waited
        self._waited = waited or 0.0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count the forward passes."""
        ended = getattr(pl_module, "passes_ended", None)
        self._forward += (time.perf_counter() if ended is None else ended) - self._began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Count the micro-batch."""
        now = time.perf_counter()
        self._working += now - self._began
        request = batch.request
        self._samples += len(request)
        self._tokens += sum(request.counts)
        self._images += len(request.grids)
        self._tiles += len(request.tiles)
        self._most_tiles = max(self._most_tiles, *(grid.tiles for grid in request.grids))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the pause out."""
        self._ended = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Leave the pause out."""
        self._ended = None

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means since the last time."""
        interval = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if interval == 0 or trainer.global_step % interval:
            return
        own = [self._samples, self._tokens, self._images, self._tiles, self._most_tiles, _peak_memory() / 2**30]
        own += [self._waiting, self._pausing + self._working, self._forward]
        mine = torch.tensor(own, dtype=torch.float64)
        ranks = [mine]
        if trainer.world_size > 1:
            mine = mine.to(pl_module.device)
            ranks = [torch.empty_like(mine) for _ in range(trainer.world_size)]
            dist.all_gather(ranks, mine)
        write_figures(trainer, "throughput", figures(torch.stack(ranks).cpu()))
        self._reset()


def figures(ranks: Tensor) -> dict[str, float]:
    """Return what is logged of float64 (ranks, 9).

    The columns: samples, visual tokens, images, tiles, the most tiles of an image, peak memory in GiB; seconds of
    waiting for data, of all, and of the forward passes.
    """
    samples, tokens, images, tiles, most, memory, waiting, seconds, forward = ranks.unbind(dim=1)
    seconds = seconds.clamp(min=1e-9)
    found = {
        "samples_per_second": samples.sum() / seconds.max(),
        "visual_tokens_per_second": tokens.sum() / seconds.max(),
        "data_wait_share": (waiting / seconds).mean(),
        "peak_memory_gib": memory.max(),
        "tiles_mean": tiles.sum() / images.sum().clamp(min=1),
        "tiles_max": most.max(),
    }
    if len(ranks) > 1:
        own = waiting + forward
        found["data_wait_share_max"] = (waiting / seconds).max()
        found["slowest_rank"] = own.argmax()
        found["slowest_rank_lag"] = own.max() / own.mean().clamp(min=1e-9) - 1
    return {name: float(value) for name, value in found.items()}


def _waited(trainer: Trainer) -> float | None:
    """Return the seconds that the loader has waited for batches, None of one that does not count them."""
    return getattr(trainer.train_dataloader, "waited", None)


def _peak_memory() -> int:
    """Return the greatest memory used so far in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class FailureReport(Callback):
    """Says on stderr, when a run breaks off with an error, which process it was and what batch it had."""

    _batch: Batch | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember the micro-batch."""
        self._batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Forget it."""
        self._batch = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Forget it."""
        self._batch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what was at hand."""
        described = getattr(self._batch, "described", None)  # the batches of other data may not know themselves
        if described is None or isinstance(exception, KeyboardInterrupt) or lost_peer(exception):
            return
        what = "ran out of memory" if isinstance(exception, torch.OutOfMemoryError) else "broke off"
        place = f"rank {trainer.global_rank} {what} at optimiser step {trainer.global_step}"
        sys.stderr.write(f"{place} on {described()}\n")
