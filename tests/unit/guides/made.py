"""Guides on a tiny random base, and how tests look into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pgp_lightning.guides.posterior import PosteriorGuide, Reconstruction, Subset
from pgp_lightning.vlm.request import Request
from tests.tiny import ANSWERS

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def make(base: str, **options: Any) -> PosteriorGuide:
    """Return a guide in evaluation mode whose adapter and prior do something."""
    torch.manual_seed(1)
    guide = PosteriorGuide(base, **{"lora_rank": 4, "lora_alpha": 8, **options})
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        guide.bottleneck.prior_mean.normal_(0, 0.5)
        guide.bottleneck.prior_log_variance.normal_(0, 0.5)
    return guide.eval()


@contextmanager
def watched(module: nn.Module, look: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Collect what `look` makes of the first argument, or else the keywords, of every call of a module."""
    seen: list[Any] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(look(args[0] if args else kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def some(request: Request) -> Subset:
    """Return a share of each row's tokens, with gaps; rows keep different numbers."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randperm(n, generator=generator)[: max(2, n // 2)].sort().values for n in request.counts]
    rows[0] = torch.tensor([0, 3, 4, 9])
    kept = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return Subset(kept, mask)


def both_passes(
    guide: PosteriorGuide, request: Request, subset: Subset | None = None, **options: Any
) -> tuple[Any, Reconstruction]:
    """Run both passes without noise."""
    found = guide.bottleneck_pass(request, guide.visual_tokens(request), subset)
    return found, guide.reconstruction_pass(
        request, list(ANSWERS[: len(request)]), found.posterior.mean, subset, **options
    )
