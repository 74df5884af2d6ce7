"""One run = one folder: its checkpoints, the configuration they belong to, its events.

    runs/<name>/{config.yaml, events..., checkpoints/, report/}

A run continues in its own folder under the configuration it began with; what may change is named here.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from pgp_lightning.data.loader import FORMERLY
from pgp_lightning.errors import ConfigError

__all__ = ["RunRecord", "checkpoints", "differences", "last_checkpoint", "read_checkpoint", "read_record"]

RECORD = "run"
# Of a checkpoint that is a folder of shards: written last, so a folder without it was not finished.
CONSOLIDATED = "consolidated.ckpt"
# The trainer's options that change what is learned; all others (devices, logging, time limits ...) may change.
# Gradient accumulation is judged together with the number of processes, see RunRecord.
TRAINER_KEYS = (
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "overfit_batches",
    "precision",
)
# Data options that say how batches are made ready, not which.
FREE_DATA_KEYS = {
    "allow_pipe",
    "build_workers",
    "cache",
    "cache_gib",
    "limit_val_records",
    "root",
    "val_batch_size",
    "workers",
}
# Callbacks that only look on.
WATCHERS = {
    "DataIntake",
    "DeviceStatsMonitor",
    "FailureReport",
    "GlobalBatch",  # its records are data.batch_size times the micro-batches of a step, see RunRecord
    "ImportanceImages",
    "LearningRateMonitor",
    "LogLine",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "PosteriorHealth",
    "Preemption",
    "RichModelSummary",
    "StepCheckpoint",
    "RichProgressBar",
    "TQDMProgressBar",
    "Throughput",
    "ThroughputMonitor",
    "Timer",
}


class RunRecord(Callback):
    """Writes the configuration into every checkpoint, and takes replayed steps out of the events after a resume.

    Args:
        config: the run's configuration with every default filled in, of plain values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @staticmethod
    def micro_batches(trainer: Trainer) -> int:
        """Return the number of micro-batches in an optimiser step, over all processes."""
        return int(trainer.accumulate_grad_batches) * int(trainer.world_size)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the record; events up to the checkpoint reach the disk with it."""
        checkpoint[RECORD] = {
            "config": self.config,
            "micro_batches": self.micro_batches(trainer),
            "processes": int(trainer.world_size),
        }
        for logger in _event_loggers(trainer):
            logger.experiment.flush()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the validation's events to the disk: a run that is resumed does not repeat it."""
        for logger in _event_loggers(trainer):
            logger.experiment.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the events from this step on, which an earlier process may have written, as superseded."""
        if trainer.global_step == 0:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        for logger in _event_loggers(trainer):
            # Readers drop all they have read at or after the step of a session's start. SummaryWriter's purge_step
            # writes the same event but has to know the step before the checkpoint is loaded. Lightning numbers the
            # figures of the n-th step n - 1, so those of the next step are the first to be replaced.
            start = Event(step=trainer.global_step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(start, trainer.global_step)


def _event_loggers(trainer: Trainer) -> Iterator[TensorBoardLogger]:
    """Yield the loggers that write events, on the process that writes them."""
    if trainer.is_global_zero:
        yield from (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))


def checkpoints(root: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first; none if the folder does not exist, or what is there is not whole."""
    found = [path for path in (root / "checkpoints").glob("*.ckpt") if _readable(path).is_file()]
    return sorted(found, key=lambda path: (_readable(path).stat().st_mtime, path.name))


def _readable(checkpoint: Path) -> Path:
    """Return the file of a checkpoint that holds its record: itself, or one of its folder's."""
    return checkpoint / CONSOLIDATED if checkpoint.is_dir() else checkpoint


def last_checkpoint(root: Path) -> Path:
    """Return the checkpoint a run continues from: checkpoints/last.ckpt.

    Folders of shards take time to write: if the run died meanwhile, it is the newest that is whole.

    Raises:
        ConfigError: if there is none.
    """
    found = [path for path in checkpoints(root) if path.stem == "last" or path.stem.startswith("last-v")]
    if found:
        return found[-1]  # last-v1.ckpt is what ModelCheckpoint writes when it will not replace last.ckpt
    other = checkpoints(root)
    if other and other[-1].is_dir():
        rank_zero_warn(f"{root / 'checkpoints' / 'last.ckpt'} was not written to its end: going on from {other[-1]}")
        return other[-1]
    if other:
        remedy = f"continue from a file, e.g. --ckpt_path {other[-1]}, and let ModelCheckpoint have save_last: true"
    else:
        remedy = "leave --ckpt_path out to begin the run, or correct trainer.default_root_dir"
    raise ConfigError(f"expected {root / 'checkpoints' / 'last.ckpt'} to continue from, found none: {remedy}")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Read the record out of a checkpoint: `config` and `micro_batches`; None if the checkpoint has none.

    Raises:
        ConfigError: if the file is not a checkpoint, or the folder is one that was not finished.
    """
    content = read_checkpoint(checkpoint)
    record = content.get(RECORD)
    return record if isinstance(record, dict) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain tensors and values; tensors are mapped, not loaded.

    Of a folder of shards this is its consolidated file: weights and record, without the optimiser's state.

    Raises:
        ConfigError: if it is not a checkpoint, or one that was not finished.
    """
    if path.is_dir() and not _readable(path).is_file():
        raise ConfigError(f"{path} has no {CONSOLIDATED}, so it was not written to its end: take another checkpoint")
    path = _readable(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"expected a checkpoint of this program in {path}, could not read it: {error}") from error
    return content if isinstance(content, dict) else {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List how two configurations differ in what is learned, as "key old -> new"; empty if they do not.

    The model, the data (not how it is read), the seed, callbacks that act on training and part of the trainer count.
    """
    before, after = dict(_that_matters(old)), dict(_that_matters(new))
    # Compared as text: one of the two may have been through YAML, which reads 1e-05 as a string.
    return [
        f"{key} {_shown(before, key)} -> {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if _shown(before, key) != _shown(after, key)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    """Return a value as text; a key that is missing, as from an older version, counts as none."""
    value = values.get(key)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _that_matters(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all that decides what is learned."""
    yield "seed_everything", config.get("seed_everything")
    yield from _flat("model", config.get("model"))
    # Checkpoints from before these could be chosen go on; what is given below counts.
    yield from ((f"data.{key}", value) for key, value in FORMERLY.items())
    for key, value in _flat("data", config.get("data")):
        if key.removeprefix("data.") not in FREE_DATA_KEYS:
            yield key, value
    trainer = config.get("trainer") or {}
    for key in TRAINER_KEYS:
        yield f"trainer.{key}", trainer.get(key)
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(callback.get("class_path", "")).rpartition(".")[2]
        if name not in WATCHERS:
            yield f"callbacks.{name}", "present"
            yield from _flat(f"callbacks.{name}", callback.get("init_args"))


def _flat(key: str, value: object) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted keys; `init_args` is left out of a key."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from _flat(key if name == "init_args" else f"{key}.{name}", part)
