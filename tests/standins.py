"""A module and data as small as can be, with the faces that the command line and the callbacks look at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pgp_lightning.bottleneck import GaussianBottleneck
from pgp_lightning.errors import DataError
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid

GRID = TileGrid(columns=2, rows=1, tokens_per_side=2, thumbnail=True)
WIDTH = 4


@dataclass
class ToyBatch:
    """Two questions about two images."""

    request: Request
    answers: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ToyBatch:
        return replace(self, request=self.request.to(device))


def toy_batch(number: int, rows: int = 2) -> ToyBatch:
    generator = torch.Generator().manual_seed(number)
    tiles = torch.randint(0, 256, (rows * GRID.tiles, 3, 8, 8), generator=generator, dtype=torch.uint8)
    relevant = torch.zeros(rows, GRID.tokens, dtype=torch.bool)
    relevant[:, [0, 1, 9]] = True
    request = Request([f"what is {number}?"] * rows, tiles, [GRID] * rows, relevant=relevant)
    return ToyBatch(request, [str(number)] * rows)


class ToyLoader:
    """An endless stream of known length that remembers its place."""

    def __init__(self, length: int) -> None:
        self.length, self.place = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[ToyBatch]:
        for number in range(self.place, self.length):
            self.place = number + 1
            yield toy_batch(number)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class ToyData(LightningDataModule):
    """Data of small random tiles.

    Args:
        batch_size: only there to be changed.
        workers: likewise.
        broken: whether reading fails.
    """

    def __init__(self, batch_size: int = 2, workers: int = 0, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def train_dataloader(self) -> ToyLoader:
        if self.broken:
            raise DataError("shard x.tar ends early:\nwrite it again")
        return ToyLoader(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader[Any]:
        # A new iterator of a DataLoader draws from the global generator, as in real validation.
        return DataLoader([toy_batch(10_000 + i) for i in range(2)], batch_size=None, shuffle=True)

    test_dataloader = predict_dataloader = val_dataloader


class ToyGuide(nn.Module):
    """Scores each token by its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.bottleneck = GaussianBottleneck(WIDTH)

    def states(self, request: Request) -> Tensor:
        side = GRID.tokens_per_side
        pixels = request.tiles.float().div(255)
        cells = nn.functional.adaptive_avg_pool2d(pixels, side).flatten(2).transpose(1, 2)
        return nn.functional.pad(cells.reshape(len(request), -1, 3), (0, WIDTH - 3), value=1.0)

    def forward(self, request: Request) -> Tensor:
        return self.bottleneck.divergence(self.bottleneck(self.states(request)))


class ToyModule(LightningModule):
    """Trains a bottleneck, drawing from every generator there is.

    Args:
        lr: learning rate.
        hidden: width of nothing.
        options: something nested.
    """

    crash_at: int | None = None  # set by a test: the optimiser step at which training breaks

    def __init__(self, lr: float = 0.01, hidden: int = 3, options: dict[str, int] | None = None) -> None:
        super().__init__()
        if lr > 5:
            raise ValueError(f"lr must be at most 5,\ngot {lr}")
        self.save_hyperparameters()
        self.lr = lr
        self.guide = ToyGuide()
        self.out = nn.Linear(WIDTH, 1)
        self.drop = nn.Dropout(0.5)
        self.beta: float | None = None
        self.last: Any = None
        self.trace: list[tuple[int, float, float]] = []

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        if self.global_step == type(self).crash_at:
            raise RuntimeError("power cut")
        bottleneck, visual = self.guide.bottleneck, self.guide.states(batch.request)
        states = self.drop(visual)
        posterior = bottleneck(states)
        latents = bottleneck.sample(posterior, torch.randn_like(states))
        divergence = bottleneck.divergence(posterior)
        mask = torch.ones_like(divergence, dtype=torch.bool)
        noise = random.random() + float(np.random.rand())
        reconstruction = (self.out(latents).mean() - noise).square()
        loss = reconstruction + (self.beta or 0.0) * divergence.mean()
        self.last = SimpleNamespace(
            divergence=divergence.detach(), mask=mask, posterior=type(posterior)(*(p.detach() for p in posterior)),
            visual=visual, states=states.detach(), latents=latents.detach(), batch=batch,
        )  # fmt: skip
        self.trace.append((batch_idx, self.beta or 0.0, loss.item()))
        self.log_dict({"train/loss": loss, "train/kl": divergence.mean(), "train/reconstruction": reconstruction})
        self.log("train/beta", self.beta or 0.0)
        return loss

    def validation_step(self, batch: ToyBatch, batch_idx: int) -> None:
        torch.rand(3), random.random(), np.random.rand()  # what a careless validation does
        self.log("val/loss", self.guide(batch.request).mean())

    def test_step(self, batch: ToyBatch, batch_idx: int) -> None:
        self.log("test/loss", self.guide(batch.request).mean())

    def predict_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        return self.guide(batch.request)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
