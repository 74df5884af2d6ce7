"""The training module's optimiser, and fits under a real trainer: what is learned, what a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from pgp_lightning.data.collate import Batch
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.training.callbacks import BetaAnnealing
from pgp_lightning.training.pgp import PGP
from tests.tiny import save_tiny, tiny_request
from tests.unit.training.made import cut, four, make

# Optimiser


def test_decay_on_matrices_only(tiny_base: str):
    module = make(tiny_base, weight_decay=0.5, learning_rate=1e-2)
    module.trainer.estimated_stepping_batches = 10
    optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index,assignment]
    names = {id(p): name for name, p in module.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == {f"guide.{name}" for name in module.guide.trainable()}
    for name, value in decay.items():
        matrix = "lora_" in name or name.endswith("weight")
        assert value == (0.5 if matrix else 0.0), name
    assert sum(value == 0 for value in decay.values()) == 2 + 4  # prior, and the heads' biases


@pytest.mark.parametrize("total", [40, 1])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(tiny_base: str, total: int):
    module = make(tiny_base, learning_rate=0.2, warmup_fraction=0.1, final_fraction=0.05)
    module.trainer.estimated_stepping_batches = total
    found: Any = module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert found["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if total == 40:
        assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
        for step in range(4, 41):
            progress = (step - 4) / 36
            expected = 0.2 * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
            assert rates[step] == pytest.approx(expected)
        assert rates[40] == pytest.approx(0.01)
    else:
        assert rates == pytest.approx([0.2, 0.01])


# Under a real trainer, and checkpoints


BATCHES = [four(indices=(10 * i, 10 * i + 1, 10 * i + 2, 10 * i)) for i in range(1, 9)]


def fit(
    module: PGP, folder: Path, steps: int = 2, batches: list[Batch] = BATCHES, *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[BetaAnnealing(), *callbacks], **options,
    )  # fmt: skip
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    torch.manual_seed(5)
    trainer.fit(module, loader)
    return trainer


def fresh(base: str, **options: Any) -> PGP:
    torch.manual_seed(2)
    return PGP(PosteriorGuide(base, **{"lora_rank": 4, **options}), learning_rate=0.01)


def test_a_fit_learns_and_its_checkpoint_holds_trained_weights_only(tiny_base: str, tmp_path: Path):
    module = fresh(tiny_base)
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    trainer = fit(module, tmp_path, accumulate_grad_batches=2)
    assert all(torch.equal(dict(module.named_parameters())[n], p) for n, p in frozen.items())
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert module.guide.vlm.decoder.layers[0].training and not module.guide.vlm.model.model.vision_tower.training
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"guide.{name}" for name in module.guide.trainable()}
    assert checkpoint["base_fingerprint"] == module.guide.base_fingerprint

    again = fresh(tiny_base)
    assert not torch.equal(again.guide.bottleneck.prior_mean, module.guide.bottleneck.prior_mean)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    request = tiny_request()
    assert torch.equal(again.eval().guide(request), module.eval().guide(request))

    with pytest.raises(ConfigError, match=r"the checkpoint is of another base model .*set model\.guide\.base"):
        fresh(save_tiny(tmp_path / "other", seed=3)).on_load_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match="of another base model"):
        again.on_load_checkpoint({"state_dict": {}})
    for options in ({"lora_rank": 8}, {"lora_rank": 0}, {"head_layers": 1}):
        other = fresh(tiny_base, **options)
        other.on_load_checkpoint(checkpoint)
        with pytest.raises(ConfigError, match=r"weights are not this guide's: guide\..*use the adapter and bottleneck"):
            other.load_state_dict(checkpoint["state_dict"])


class Gradients(pl.Callback):
    """Keeps the gradients that the optimiser gets, of everything that is trained."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        self.found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def test_gradient_accumulation_equals_the_larger_batch_under_sample_averages(tiny_base: str, tmp_path: Path):
    # Equal weights of samples: an optimiser step of four micro-batches of one is that of one micro-batch of four.
    batch, found = four(), []
    for batches in ([batch], [cut(batch, row) for row in range(4)]):
        module, gradients = make(tiny_base, {"lora_dropout": 0.0}, average="sample"), Gradients()
        fit(module, tmp_path, 1, batches, gradients, accumulate_grad_batches=len(batches))
        found.append(gradients.found)
    whole, accumulated = found
    assert whole.keys() == accumulated.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
