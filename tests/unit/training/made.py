"""Modules on a tiny random base, as a trainer would have set them up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pgp_lightning.data.collate import Batch
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.training.pgp import PGP
from tests.tiny import QUESTIONS, row_of, tiny_batch, tiny_request


def make(base: str, guide: dict[str, Any] | None = None, **options: Any) -> PGP:
    """Return a module with a guide that is not at its start, as a trainer would have set it up, in evaluation mode."""
    torch.manual_seed(1)
    module = PGP(PosteriorGuide(base, **{"lora_rank": 4, "lora_alpha": 8, **(guide or {})}), **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name or "prior" in name:
                parameter.normal_(0, 0.2)
    splits = {"train": ["a", "b", "never"], "val": ["a", "b"], "test": ["a", "b"]}
    data = SimpleNamespace(source_names=splits.__getitem__, reader=None)
    module.trainer = SimpleNamespace(datamodule=data, accumulate_grad_batches=1, global_step=7, global_rank=0)  # type: ignore[assignment]
    module.setup("fit")
    module.beta = 0.3
    module.logged = {}  # type: ignore[assignment]
    module.log = lambda name, value, **_: module.logged.__setitem__(name, float(value))  # type: ignore[assignment,operator,union-attr]
    return module.eval()


def four(**changes: Any) -> Batch:
    """Return four turns about three images; rows 0 and 3 are turns 0 and 1 of one record."""
    keys = {"indices": (10, 11, 12, 10), "turns": (0, 0, 0, 1), "sources": ("a", "b", "a", "a")}
    return tiny_batch(tiny_request(QUESTIONS, images=(0, 1, 2, 0)), **{**keys, **changes})


def cut(batch: Batch, row: int) -> Batch:
    """Return one row of a batch as a batch of its own."""
    answers, sources = (batch.answers[row],), (batch.sources[row],)
    return tiny_batch(row_of(batch.request, row), answers, sources, (batch.indices[row],), (batch.turns[row],))
