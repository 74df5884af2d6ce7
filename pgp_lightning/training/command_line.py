"""LightningCLI for runs: one folder each, terse errors, a checkpoint that never overrides the configuration."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import transformers
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from pgp_lightning import warning_signal
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.training import (  # noqa: F401 (a config may name their classes alone)
    callbacks,
    global_batch,
    health,
    images,
    intake,
    options,
    preemption,
    step_checkpoint,
    throughput,
    weight_average,
)
from pgp_lightning.training.global_batch import GlobalBatch
from pgp_lightning.training.preemption import Preemption
from pgp_lightning.training.run import RunRecord, checkpoints, differences, last_checkpoint, read_record

__all__ = ["RunCLI", "SaveRunConfig", "TerseParser", "quieten", "reason_of", "terse"]


class TerseParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2; raise instead if the parser must not exit."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        hint = "arguments are required" in message
        remedy = " (give a configuration, e.g. --config configs/pgp.yaml)" if hint else ""
        sys.stderr.write(f"error: {terse(message)}{remedy}\n")
        sys.exit(2)


def terse(message: str) -> str:
    """Reduce the parser's account of every type it tried to what the user got wrong."""
    noise = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "Expected a <class 'NoneType'>",
        "Expected a path but",
    )
    unprintable = tuple(f"Given value: {start}" for start in ("NestedArg(", "Namespace(", "{", "["))
    kept: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if text and text not in kept and not text.startswith((*noise, *unprintable, "Given value type:")):
            kept.append(text)
    return " ".join(kept)


def reason_of(error: BaseException) -> str:
    """Return what went wrong in a constructor; the parser wraps that in an account of every type it tried."""
    while not isinstance(error, ConfigError | DataError) and error.__cause__ is not None:
        error = error.__cause__
    readable = isinstance(error, ValueError | OSError | ImportError | MisconfigurationException)
    return str(error) if readable else f"{type(error).__name__}: {error}"


def _latest(given: list[Callback]) -> list[Callback]:
    """Keep the last of several callbacks of one class of ours: what an overlay's `callbacks+` gives anew replaces.

    Foreign callbacks and checkpoints stay as they are, since several of them have a use.
    """

    def kind(one: Callback) -> object:
        own = type(one).__module__.partition(".")[0] == __name__.partition(".")[0]
        return type(one) if own and not isinstance(one, ModelCheckpoint) else one

    return list({kind(one): one for one in given}.values())


def quieten() -> None:
    """Drop what libraries say at every start of a run and no user can act on."""
    for noise in (
        ".*is_gradient_checkpointing.*",  # peft asks transformers by an old name
        ".*isinstance.treespec, LeafSpec.*",  # lightning asks torch by an old name
        ".*Couldn't infer the batch indices.*",  # batches know their own keys
        ".*module.s. in eval mode at the start of training.*",  # the frozen vision tower is meant to be
        ".*sync_dist=True.*",  # means are summed over processes before they are logged
    ):
        warnings.filterwarnings("ignore", message=noise)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda line: "litlogger" not in line.msg)


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration as config.yaml in the run's folder, for fit only: looking at a run must not change it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration before training."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class RunCLI(LightningCLI):
    """`lightning fit|validate|test|predict` on any LightningModule and LightningDataModule.

    `--ckpt_path last` continues the run in trainer.default_root_dir; `--ckpt_path FILE` takes the weights and the
    training state of a file. In either case the configuration is the one given now.
    """

    checkpoint: str | None = None

    @classmethod
    def run(cls, args: list[str], debug: bool = False) -> RunCLI:
        """Parse the arguments and do what they say.

        Raises:
            ConfigError: if the set-up cannot work.
        """
        quieten()
        # Not an option of the parser, since it has to be known before parsing; so it is told to --help here.
        common = {"epilog": "--debug shows the traceback of an error.", "exit_on_error": not debug}
        return cls(
            LightningModule,
            LightningDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=TerseParser,
            parser_kwargs={"prog": "lightning", **common, **{name: dict(common) for name in cls.subcommands()}},
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 (Lightning's type)
        """Parse the arguments (LightningCLI would warn that they were handed over)."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do not merge the checkpoint's hyper-parameters over the configuration, as LightningCLI does."""

    def before_instantiate_classes(self) -> None:
        """Settle which checkpoint to take, before anything costly happens.

        Raises:
            ConfigError: if the run's folder and the arguments contradict each other.
        """
        config = self.config[self._name]
        # The wish is taken out, so that the saved configuration begins a run when it is used again.
        wish, config.ckpt_path = config.ckpt_path, None
        try:
            self.plain = json.loads(self.parser.dump(self.config, format="json"))[self._name]
        except ValueError as error:  # e.g. of Lightning's Timer, some of whose defaults are no plain values
            raise ConfigError(f"a value of the configuration cannot be written down: {terse(str(error))}") from error
        self.trainer_defaults = {"callbacks": [RunRecord(self.plain)]}
        fitting = self._name == "fit"
        if fitting and config.trainer.fast_dev_run:
            self.checkpoint = self._existing(wish)
            return
        root = None if config.trainer.default_root_dir is None else Path(config.trainer.default_root_dir)
        if root is None and (fitting or wish == "last"):
            raise ConfigError("expected a folder for the run, got none: set trainer.default_root_dir, e.g. to runs/pgp")
        self.checkpoint = str(last_checkpoint(root)) if root is not None and wish == "last" else self._existing(wish)
        if root is not None and fitting:
            self._check_folder(root)
        elif self.checkpoint is not None:
            self._warn_of_differences()

    @property
    def _name(self) -> str:
        """Return the subcommand."""
        return str(self.subcommand)

    def _existing(self, wish: str | None) -> str | None:
        """Return the wanted checkpoint, refusing one that is not there; addresses and Lightning's "hpc" pass."""
        if wish in {"best", "last"}:
            raise ConfigError(
                f"expected --ckpt_path last or a file, got {wish!r}: name the file in the checkpoints folder"
            )
        if wish is not None and wish != "hpc" and "://" not in wish and not Path(wish).exists():
            raise FileNotFoundError(f"expected a checkpoint at {wish}, found nothing: correct --ckpt_path")
        return wish

    def _check_folder(self, root: Path) -> None:
        """Refuse to mix two runs in one folder."""
        own = checkpoints(root)
        if self.checkpoint is None or Path(self.checkpoint).resolve() not in [path.resolve() for path in own]:
            if own and self.checkpoint != "hpc":
                raise ConfigError(
                    f"{root} already holds a run ({own[-1]}): continue it with --ckpt_path last, "
                    "or give this run another folder with --trainer.default_root_dir"
                )
            self._warn_of_differences()
            return
        record = read_record(Path(self.checkpoint)) or {}
        changed = differences(record.get("config", self.plain), self.plain)
        if changed:
            raise ConfigError(
                f"the run in {root} has another configuration than is given now: {', '.join(changed)}; undo that, or "
                f"begin a new run with --trainer.default_root_dir NEW --ckpt_path {self.checkpoint}"
            )
        self.own_record = record

    own_record: dict[str, Any] | None = None

    def _warn_of_differences(self) -> None:
        """Say how the configuration of a checkpoint that is not the run's own differs; the one given now holds."""
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return
        record = read_record(Path(self.checkpoint)) or {}
        changed = differences(record.get("config", self.plain), self.plain)
        if self._name != "fit":
            changed = [change for change in changed if change.startswith("model.")]
        if changed:
            rank_zero_warn(f"{self.checkpoint} was made under another configuration: {', '.join(changed)}")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            ConfigError: with the reason, whatever goes wrong.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            raise ConfigError(reason_of(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401 (Lightning's type)
        """Build the trainer; events go right into the run's folder unless the configuration names a logger."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        config.callbacks = _latest([one for one in given if one is not None])
        if config.fast_dev_run:
            # ModelCheckpoint would write last.ckpt all the same, and the folder would seem to hold a run.
            config.callbacks = [one for one in config.callbacks if not isinstance(one, Checkpoint)]
            kwargs["enable_checkpointing"] = False
        if config.logger in (None, True):
            # Only fit writes events: validate would add points at step 0 to the run's curves.
            root, fitting = config.default_root_dir, self._name == "fit" and config.default_root_dir is not None
            kwargs["logger"] = fitting and TensorBoardLogger(
                root, name="", version="", default_hp_metric=False, flush_secs=10
            )
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint to the trainer; it is read as plain tensors and values, nothing is executed."""
        self.config_init[self._name].ckpt_path = self.checkpoint
        self.config_init[self._name].weights_only = True

    def before_fit(self) -> None:
        """Settle the records of an optimiser step, and refuse to continue a run with another number of them.

        Raises:
            ConfigError: if they cannot be dealt to the processes, or gradient accumulation and processes multiply to
                something else than before, or an option of the trainer would be void or wrong.
        """
        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in given:
            if isinstance(callback, GlobalBatch):
                callback.settle(self.trainer, self.datamodule)
        options.check_fit(self.trainer, self.datamodule)
        if not any(isinstance(callback, Preemption) for callback in given):
            warning_signal.release()
        self._check_strategy()
        before, now = (self.own_record or {}).get("micro_batches"), RunRecord.micro_batches(self.trainer)
        if before is not None and before != now:
            raise ConfigError(
                f"the run took {before} micro-batches per optimiser step, now it would take {now}: let "
                "trainer.accumulate_grad_batches times the number of processes be the same"
            )

    def before_validate(self) -> None:
        """Refuse a checkpoint that the strategy cannot read, and a precision that rounds what was trained."""
        options.check_precision(self.trainer)
        self._check_strategy()

    before_test = before_predict = before_validate

    def _check_strategy(self) -> None:
        """Refuse a checkpoint that the strategy cannot read.

        Raises:
            ConfigError: if it is of another strategy or, of DeepSpeed, of another number of processes.
        """
        path, strategy = Path(self.checkpoint or ""), self.trainer.strategy
        if self.checkpoint is None or not path.exists():
            return
        # What DeepSpeed and torch's distributed checkpoints write into their folders.
        of_deepspeed, of_torch = (path / "latest").is_file(), (path / ".metadata").is_file()
        name = type(strategy).__name__
        if isinstance(strategy, DeepSpeedStrategy):
            fits = of_deepspeed
        else:
            fits = path.is_file() or (of_torch and isinstance(strategy, ModelParallelStrategy))
        if not fits:
            what = "a folder of shards" if path.is_dir() else "one file"
            raise ConfigError(
                f"{path} is {what}, from which {name} cannot continue: take the strategy that wrote it; `pgp export` "
                "makes a guide of either"
            )
        before = (read_record(path) or {}).get("processes")
        if of_deepspeed and before not in (None, self.trainer.world_size):
            raise ConfigError(
                f"{path} was written by {before} processes of DeepSpeed, and {self.trainer.world_size} cannot continue "
                f"from it: use {before} again"
            )

    @rank_zero_only
    def after_fit(self) -> None:
        """Print where the run lies and the last validation's figures; a trial (fast_dev_run) has neither."""
        if self.config_init[self._name].trainer.fast_dev_run:
            return
        figures = {
            name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")
        }
        width = max(map(len, figures), default=0)
        print(f"run {self.trainer.default_root_dir} stopped after {self.trainer.global_step} optimiser steps")
        for name, value in sorted(figures.items()):
            print(f"  {name:<{width}}  {value:.4f}")
        # Of what came before a checkpoint nothing is known here.
        if self.checkpoint is None and not figures and self.trainer.limit_val_batches:
            print("  it was never validated: trainer.val_check_interval is longer, or the data has no val split")
        if self.trainer.checkpoint_callback is not None:
            print(f"  continue with --ckpt_path last, watch with tensorboard --logdir {self.trainer.default_root_dir}")
