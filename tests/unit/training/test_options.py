"""Options of the trainer that would be void or wrong: each is named, with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins import (
    AsyncCheckpointIO,
    BitsandbytesPrecision,
    HalfPrecision,
    Precision,
    TransformerEnginePrecision,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError
from pgp_lightning.training.global_batch import GlobalBatch
from pgp_lightning.training.options import PRECISIONS, check_fit, check_precision, refusals
from pgp_lightning.training.preemption import Preemption
from pgp_lightning.training.step_checkpoint import StepCheckpoint
from pgp_lightning.training.weight_average import WeightAverage
from tests.standins import ToyData

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(**options: Any) -> Trainer:
    """Return a trainer as configs/pgp.yaml has it, but for some options."""
    usual = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 8, "accumulate_grad_batches": 2}
    usual |= {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    return Trainer(**{**usual, "callbacks": [StepCheckpoint(save_last=True)], **options})


@pytest.fixture
def data() -> InstructionData:
    return InstructionData("somewhere.yaml", "embedded:guide")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16-true"}, ("trainer.precision bf16-true", "bf16-mixed", "dtype: bfloat16")),
        ({"precision": "16-true"}, ("trainer.precision 16-true",)),
        ({"plugins": [HalfPrecision("bf16-true")]}, ("trainer.precision bf16-true",)),
        ({"strategy": "ddp_spawn"}, ("ddp_spawn", "use ddp")),
        ({"limit_train_batches": 3}, ("limit_train_batches 3", "trainer.max_steps", "trainer.overfit_batches")),
        ({"limit_train_batches": 4}, ("limit_train_batches 4",)),
        ({"limit_train_batches": 0.5}, ("limit_train_batches 0.5",)),
        ({"limit_train_batches": 0}, ("limit_train_batches 0",)),
        ({"overfit_batches": 0.5}, ("overfit_batches 0.5", "a number of micro-batches")),
        ({"overfit_batches": 1.0}, ("overfit_batches 1.0",)),
        ({"accumulate_grad_batches": 0}, ("accumulate_grad_batches must be at least 1, got 0",)),
        ({"max_steps": -1, "max_epochs": 1}, ("max_steps must say how long training is, got -1",)),
        ({"max_epochs": 0}, ("max_epochs 0 trains nothing",)),
        ({"min_epochs": 2}, ("min_epochs 2", "trainer.min_steps")),
        ({"min_steps": 9}, ("min_steps 9", "max_steps 8")),
        ({"reload_dataloaders_every_n_epochs": 1}, ("reload_dataloaders_every_n_epochs",)),
        ({"check_val_every_n_epoch": 2}, ("check_val_every_n_epoch 2 never validates", "val_check_interval")),
        ({"check_val_every_n_epoch": 1, "val_check_interval": 17}, ("val_check_interval 17", "16 micro-batches")),
    ],
)
def test_an_option_that_would_be_void_or_wrong(data: InstructionData, options: dict[str, Any], words: tuple[str, ...]):
    (found,) = refusals(trainer(**options), data)
    assert all(word in found for word in words), found
    with pytest.raises(ConfigError) as caught:
        check_fit(trainer(**options), data)
    assert str(caught.value) == found


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (StochasticWeightAveraging(1e-3), "replaces the learning-rate schedule"),
        (WeightAveraging(), "averages the frozen base as well"),
        (EMAWeightAveraging(), "averages the frozen base as well"),
        (GradientAccumulationScheduler({0: 2}), "GlobalBatch"),
        (LearningRateFinder(), "pgp sweep"),
        (BatchSizeFinder(), "pgp doctor"),
        (BackboneFinetuning(), "model.guide says what is trained"),
        (ModelPruning("l1_unstructured"), "prunes weights"),
        (SpikeDetection(), "gradient_clip_val"),
        (ModelCheckpoint(), "take StepCheckpoint"),
        (StepCheckpoint(every_n_train_steps=3, save_on_exception=True), "save_on_exception of StepCheckpoint"),
        (StepCheckpoint(every_n_train_steps=3, save_weights_only=True), "leaves out the run's record"),
        (OnExceptionCheckpoint("."), "let StepCheckpoint save more often"),
    ],
)
def test_a_callback_that_would_do_something_else(data: InstructionData, callback: Any, words: str):
    (found,) = refusals(trainer(callbacks=[StepCheckpoint(), callback]), data)
    assert type(callback).__name__ in found and words in found, found


@pytest.mark.parametrize("saving", [{}, {"monitor": "val/loss"}, {"every_n_epochs": 1}])
@pytest.mark.parametrize(
    "options", [{"val_check_interval": 5}, {"check_val_every_n_epoch": 1, "val_check_interval": 0.2}]
)
def test_validations_at_which_nothing_could_be_saved(
    data: InstructionData, saving: dict[str, Any], options: dict[str, Any]
):
    (found,) = refusals(trainer(callbacks=[StepCheckpoint(**saving)], **options), data)
    assert found.startswith("the callback StepCheckpoint without every_n_train_steps saves at validations")
    assert f"val_check_interval {options['val_check_interval']} " in found and "a multiple of 2" in found


def test_validations_are_held_against_the_accumulation_that_records_of_a_step_give(data: InstructionData):
    callbacks = [GlobalBatch(3 * data.batch_size), StepCheckpoint()]
    given = trainer(accumulate_grad_batches=1, callbacks=callbacks)
    assert not list(refusals(given, data))
    callbacks[0].settle(given, data)
    (found,) = refusals(given, data)
    assert "val_check_interval 4 puts between the 3 micro-batches" in found


def test_all_of_them_are_named(data: InstructionData):
    with pytest.raises(ConfigError, match=r"the callback BatchSizeFinder .*; trainer\.limit_train_batches 3"):
        check_fit(trainer(limit_train_batches=3, callbacks=[StepCheckpoint(), BatchSizeFinder()]), data)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(BitsandbytesPrecision, "BitsandbytesPrecision"), (TransformerEnginePrecision, "transformer-engine")],
)
def test_the_precision_of_plugins_whose_library_is_not_here(
    monkeypatch: pytest.MonkeyPatch, kind: type[Precision], name: str
):
    given = trainer()
    monkeypatch.setattr(given.strategy, "_precision_plugin", kind.__new__(kind))  # constructors want the library
    with pytest.raises(ConfigError, match=f"precision {name} keeps adapter, bottleneck and prior in less"):
        check_precision(given)


def test_checkpoints_that_are_written_beside_training(data: InstructionData):
    plugins = {"plugins": [AsyncCheckpointIO()]}
    assert not list(refusals(trainer(**plugins), data))
    (found,) = refusals(trainer(**plugins, callbacks=[StepCheckpoint(), Preemption()]), data)
    assert "AsyncCheckpointIO may still be writing" in found


@pytest.mark.parametrize("precision", [*PRECISIONS, "bf16", "64", None])
def test_precisions_that_leave_trained_weights_alone(data: InstructionData, precision: Any):
    check_precision(trainer(precision=precision))
    assert not list(refusals(trainer(precision=precision), data))


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 3},
        {"limit_train_batches": 1.0, "limit_val_batches": 1},
        {"fast_dev_run": 3},
        {"max_epochs": 3, "min_steps": 8},
        {"max_time": "00:01:00:00"},
        {"check_val_every_n_epoch": 1, "val_check_interval": 0.5},
        {"check_val_every_n_epoch": 1, "val_check_interval": 17, "limit_val_batches": 0},
        {"val_check_interval": "00:01:00:00"},
        {"strategy": "ddp"},
        {"callbacks": [StepCheckpoint(), EarlyStopping("val/loss"), Timer("00:01:00:00")]},
        {"val_check_interval": 5, "callbacks": [StepCheckpoint(every_n_train_steps=2, monitor="val/loss")]},
        {"val_check_interval": 5, "callbacks": [StepCheckpoint(save_on_train_epoch_end=True)]},
        {"val_check_interval": 5, "limit_val_batches": 0},
        {"val_check_interval": 5, "accumulate_grad_batches": 1},
        {"check_val_every_n_epoch": 1, "val_check_interval": 0.25},  # after every fourth of 16
        {"callbacks": [ModelCheckpoint(), OnExceptionCheckpoint(".")], "accumulate_grad_batches": 1},
    ],
)
def test_what_does_what_it_says(data: InstructionData, options: dict[str, Any], tmp_path: Path):
    assert not list(refusals(trainer(default_root_dir=tmp_path, **options), data))


def test_an_average_of_weights_that_are_dealt_out(data: InstructionData, monkeypatch: pytest.MonkeyPatch):
    given = trainer(callbacks=[StepCheckpoint(), WeightAverage()])
    assert not list(refusals(given, data))
    monkeypatch.setattr(given._accelerator_connector, "strategy", ModelParallelStrategy())
    monkeypatch.setattr(given.strategy, "_precision_plugin", trainer().precision_plugin)
    (found,) = refusals(given, data)
    assert found.startswith("WeightAverage needs whole weights, and ModelParallelStrategy deals them"), found


def test_data_with_epochs_of_its_own_may_be_cut():
    assert not list(refusals(trainer(limit_train_batches=3, callbacks=[ModelCheckpoint()]), ToyData()))
