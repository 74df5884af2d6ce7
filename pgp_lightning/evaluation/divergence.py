"""What a trained posterior guide does: where its divergence lies, and what it can read from its latents.

A divergence that is about the question lies on what the question is about. It could lie elsewhere all the same: on
whatever shows an object, or on the last visual slots, which have seen all others and could carry the answer by
themselves. What is read from Z without the question is the least that Z carries of the answer: a guide that was not
trained so (`PGP.question_blind`) has never met such a prompt, and may fail at it whatever Z holds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.data.collate import Batch
from pgp_lightning.guides.base import evaluating
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.selection import recall
from pgp_lightning.training.pgp import PGP, RATIOS
from pgp_lightning.vlm.request import Request

__all__ = ["guide_figures"]

_THUMBNAIL, _PADDING = -1, -2


@torch.no_grad()
def guide_figures(
    guide: PosteriorGuide,
    batches: Iterable[Batch],
    objects: Callable[[Request], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a guide on all questions of some batches, in evaluation mode and with all visual tokens.

    - `kl`, `gate`: mean over questions of the mean over visual tokens (and channels).
    - `accuracy`, `accuracy_blind`: share of answers whose every supervised token is the argmax of the second pass, with
      the question in it and without, from the same Z.
    - `recall@5`, `recall@11`, `recall@20`: mean over questions with relevant tokens.
    - `mass/PART` beside `tokens/PART`: share of the divergence, summed over tokens and questions, that lies on a part
      of the tokens, and the part's share of the tokens, so the former if all had the same. Parts are `tile_0` onwards
      in raster order and `thumbnail`; `last_tenth`, the last tenth of each row's visual slots, rounded up; and, of the
      questions with relevant tokens only, `relevant` and `rest`, or `relevant`, `other_objects` and `neither`.

    Left out are figures that do not exist: those of relevant tokens where no question has any, and of `mass/PART` where
    there is no divergence at all.

    Args:
        guide: stays as it is.
        batches: turns with answers, e.g. of `InstructionData.sample`.
        objects: says which tokens show any object, bool (B, M), e.g. `ObjectMap.objects`.
        seed: of the latents' noise.

    Raises:
        ValueError: if there is no question.
    """
    module = PGP(guide, seed=seed)
    device = guide.bottleneck.prior_mean.device
    values: dict[str, list[Tensor]] = defaultdict(list)
    places, kinds = _Shares(), _Shares()
    with evaluating(guide):
        for batch in (one.to(device) for one in batches):
            request = batch.request
            found, predicted = module.passes(batch, None, blind=False)
            assert module.last is not None
            blind = guide.reconstruction_pass(request, batch.answers, module.last.latents, blind=True)
            values["kl"].append(_row_means(found.divergence, found.mask))
            values["gate"].append(_row_means(found.posterior.gate.mean(dim=-1), found.mask))
            values["accuracy"].append(predicted.right(len(batch)))
            values["accuracy_blind"].append(blind.right(len(batch)))
            places.update(found.divergence, found.mask, _places(request, device))
            if request.relevant is not None:
                importance = found.divergence.masked_fill(~found.mask, -torch.inf)
                asked = request.relevant.any(dim=1)
                for p in RATIOS:
                    values[f"recall@{p}"].append(recall(importance, request.relevant, p / 100)[asked])
                shown = None if objects is None else objects(request).to(device)
                kinds.update(found.divergence, found.mask & asked[:, None], _kinds(request.relevant, shown))
    if not values:
        raise ValueError("expected batches with at least one question, got none")
    flat = {name: torch.cat(parts).double() for name, parts in values.items()}
    return {name: float(rows.mean()) for name, rows in flat.items() if len(rows)} | kinds.compute() | places.compute()


class _Shares:
    """Sums, over batches, of divergence and of tokens by part; parts may overlap and come and go."""

    def __init__(self) -> None:
        self.mass: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, float] = defaultdict(float)
        self.total = [0.0, 0.0]

    def update(self, divergence: Tensor, among: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Take in a batch: divergence (B, M), the tokens that count, and the parts, bool (B, M)."""
        self.total[0] += float(divergence[among].sum(dtype=torch.float64))
        self.total[1] += float(among.sum())
        for name, part in parts.items():
            self.mass[name] += float(divergence[part & among].sum(dtype=torch.float64))
            self.tokens[name] += float((part & among).sum())

    def compute(self) -> dict[str, float]:
        """Return every part's share of both, as far as there is something to share."""
        found = {}
        for title, sums, total in zip(("mass", "tokens"), (self.mass, self.tokens), self.total, strict=True):
            found.update({f"{title}/{name}": part / total for name, part in sums.items() if total > 0})
        return found


def _row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean over its visual tokens: (B, M) to (B,)."""
    return x.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)


def _kinds(relevant: Tensor, shown: Tensor | None) -> dict[str, Tensor]:
    """Part visual tokens by what they show: bool (B, M) each; what is relevant is no other object."""
    if shown is None:
        return {"relevant": relevant, "rest": ~relevant}
    return {"relevant": relevant, "other_objects": shown & ~relevant, "neither": ~(shown | relevant)}


def _places(request: Request, device: torch.device) -> dict[str, Tensor]:
    """Part visual tokens by tile, beside the last tenth of each row: bool (B, M) each, False on padding."""
    tiles, last = [], []
    for grid in (request.grids[image] for image in request.images):
        numbers = [*range(grid.columns * grid.rows), *([_THUMBNAIL] if grid.thumbnail else [])]
        tiles.append(torch.tensor(numbers, device=device).repeat_interleave(grid.tokens_per_side**2))
        first = grid.tokens - math.ceil(grid.tokens / 10)
        last.append(torch.arange(grid.tokens, device=device) >= first)
    number = pad_sequence(tiles, batch_first=True, padding_value=_PADDING)
    found = {f"tile_{tile}": number == tile for tile in range(int(number.max()) + 1)}
    found["thumbnail"] = number == _THUMBNAIL
    found["last_tenth"] = pad_sequence(last, batch_first=True)
    return found
