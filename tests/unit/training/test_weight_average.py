"""The average of trained weights: its value, who sees it, and what a resumed run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.training.callbacks import BetaAnnealing, RandomState
from pgp_lightning.training.pgp import PGP
from pgp_lightning.training.step_checkpoint import StepCheckpoint
from pgp_lightning.training.weight_average import CURRENT, WeightAverage
from tests.unit.training.made import four

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(pl.Callback):
    """Notes the trained weights after every micro-batch and in every validation; saves or breaks one off if asked."""

    def __init__(self, breaks: bool = False, saves: Path | None = None) -> None:
        self.breaks, self.saves = breaks, saves
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.trained.append(weights(pl_module))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated.append(weights(pl_module))
        if self.saves is not None:
            trainer.save_checkpoint(self.saves, weights_only=False)
        if self.breaks:
            raise RuntimeError("power cut")


def weights(module: PGP) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(base: str, folder: Path, resumed: Path | None = None, **watch: Any) -> tuple[PGP, Watch]:
    """Train, two micro-batches a step, with a validation after steps 3 and 6, from the same beginning."""
    torch.manual_seed(2)
    module = PGP(PosteriorGuide(base, lora_rank=2), learning_rate=0.01)
    watcher = Watch(**watch)
    callbacks = [watcher, BetaAnnealing(), RandomState(), WeightAverage(decay=0.7)]
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=6, check_val_every_n_epoch=None,
        callbacks=[*callbacks, StepCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
    )  # fmt: skip
    batches = [four(indices=(10 * i, 10 * i + 1, 10 * i + 2, 10 * i)) for i in range(2 * STEPS)]
    done = 0 if resumed is None else 2 * torch.load(resumed, weights_only=True)["global_step"]
    loader: Any = DataLoader(batches[done:] + batches[:done], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, DataLoader(batches[:1], batch_size=None), ckpt_path=resumed, weights_only=True)  # type: ignore[arg-type]
    return module, watcher


def test_the_average_is_what_a_loop_makes_of_the_weights_and_goes_to_checkpoint_and_validation(
    tiny_base: str, tmp_path: Path
):
    module, seen = fit(tiny_base, tmp_path)
    steps = [{name: value.double() for name, value in one.items()} for one in seen.trained[1::2]]
    average: dict[int, dict[str, Tensor]] = {1: steps[0]}
    for number, one in enumerate(steps[1:], start=2):
        share = max(0.3, 1 / number)
        average[number] = {name: (1 - share) * value + share * one[name] for name, value in average[number - 1].items()}
    for step in (2, 4, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert same(checkpoint[CURRENT], seen.trained[2 * step - 1]), step  # of the trained weights alone
        assert set(checkpoint["state_dict"]) == set(checkpoint[CURRENT])
        for name, value in checkpoint["state_dict"].items():
            torch.testing.assert_close(value.double(), average[step][name], rtol=1e-5, atol=1e-7)
    for step, one in zip((3, 6), seen.validated, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value.double(), average[step][name], rtol=1e-5, atol=1e-7)
    assert not same(seen.validated[1], seen.trained[-1])
    assert same(weights(module), seen.trained[-1])  # training goes on with its own weights


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_undisturbed_one(tiny_base: str, tmp_path: Path, step: int):
    _, whole = fit(tiny_base, tmp_path / "whole")
    _, rest = fit(tiny_base, tmp_path / "rest", resumed=tmp_path / "whole" / f"step={step}.ckpt")
    assert len(rest.trained) == 2 * (STEPS - step)
    assert all(same(a, b) for a, b in zip(rest.trained, whole.trained[2 * step :], strict=True))
    assert same(rest.validated[-1], whole.validated[-1])
    mine, theirs = (torch.load(tmp_path / run / "step=6.ckpt", weights_only=True) for run in ("rest", "whole"))
    assert same(mine["state_dict"], theirs["state_dict"]) and same(mine[CURRENT], theirs[CURRENT])


def test_a_validation_that_breaks_off_leaves_the_weights_in_their_place(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    modules: list[PGP] = []
    monkeypatch.setattr(PGP, "on_fit_start", lambda self: modules.append(self))
    seen: list[Watch] = []
    monkeypatch.setattr(Watch, "setup", lambda self, *_, **__: seen.append(self), raising=False)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tiny_base, tmp_path, breaks=True)
    assert same(weights(modules[0]), seen[0].trained[-1]) and not same(seen[0].validated[0], seen[0].trained[-1])


def test_a_checkpoint_saved_during_a_validation_has_average_and_weights_where_they_belong(
    tiny_base: str, tmp_path: Path
):
    _, seen = fit(tiny_base, tmp_path, saves=tmp_path / "within.ckpt")
    checkpoint = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert same(checkpoint["state_dict"], seen.validated[-1]) and same(checkpoint[CURRENT], seen.trained[-1])
    assert not same(seen.validated[-1], seen.trained[-1])


def test_a_trainer_that_has_fitted_validates_and_saves_the_weights_of_another_checkpoint(
    tiny_base: str, tmp_path: Path
):
    module, seen = fit(tiny_base, tmp_path)
    other, batches = tmp_path / "step=2.ckpt", DataLoader([four()], batch_size=None)  # type: ignore[arg-type]
    average = torch.load(other, weights_only=True)["state_dict"]
    module.trainer.validate(module, batches, verbose=False)  # the module as it is
    module.trainer.validate(module, batches, ckpt_path=other, verbose=False, weights_only=True)
    assert same(seen.validated[2], seen.trained[-1])
    assert same(seen.validated[3], average) and same(weights(module), average)
    module.trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert same(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"], average)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_keeps_everything_or_less_than_nothing(decay: float):
    with pytest.raises(ConfigError, match=r"decay must be in \[0, 1\)"):
        WeightAverage(decay)
