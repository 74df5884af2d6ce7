"""Prompt slots: rows of text and visual tokens laid out for a decoder, with explicit masks and position ids.

Explicit, because transformers takes a gap in position ids without a mask for the border of packed sequences and
blocks attention across it; and dropped visual tokens leave gaps, since those that stay keep their original positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgp_lightning.vlm.processor import PromptIds

__all__ = ["Slots", "lay_out"]


@dataclass(frozen=True)
class Slots:
    """A batch of B rows of N prompt slots, padded on the right, with m visual slots each (padded too).

    Attributes:
        ids: int64 (B, N), 0 on visual and padding slots.
        mask: int64 (B, N), 1 on real slots.
        positions: int64 (B, N), original positions: dropped visual tokens leave gaps.
        visual: int64 (B, m), the prompt slot of each visual token, 0 on padding.
        visual_mask: bool (B, m), True on real visual tokens.
        rows: int64 (S,), the row of each supervised token.
        sources: int64 (S,), the prompt slot whose hidden state predicts it.
        targets: int64 (S,), the supervised tokens.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    visual: Tensor
    visual_mask: Tensor
    rows: Tensor
    sources: Tensor
    targets: Tensor

    def place(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        """Return the embeddings (B, N, d) with visual tokens (B, m, d) in their slots."""
        rows, columns = self.visual_mask.nonzero(as_tuple=True)
        return embeddings.index_put((rows, self.visual[rows, columns]), visual[rows, columns].to(embeddings.dtype))

    def gather(self, hidden: Tensor) -> Tensor:
        """Return the hidden states (B, m, d) at the visual slots; padding holds slot 0's."""
        return hidden.gather(1, self.visual[..., None].expand(-1, -1, hidden.shape[-1]))


def lay_out(
    prompts: list[PromptIds],
    counts: list[int],
    device: torch.device,
    *,
    kept: Tensor | None = None,
    kept_mask: Tensor | None = None,
    cut: bool = False,
) -> Slots:
    """Lay out one turn a row.

    Args:
        prompts: ids around the visual tokens.
        counts: number M of visual tokens of each row's image.
        device: where the tensors go.
        kept: int64 (B, m), which visual tokens are there, ascending; all by default.
        kept_mask: bool (B, m), False where `kept` is padding.
        cut: end each row at its last visual slot.

    Returns:
        The slots; supervised are the tokens of `PromptIds.answer`, whose last needs no slot of its own.
    """
    widest = max(counts)
    if kept is None:
        kept = torch.arange(widest).expand(len(counts), -1)
        kept_mask = kept < torch.tensor(counts)[:, None]
    kept = kept.cpu()
    kept_mask = torch.ones_like(kept, dtype=torch.bool) if kept_mask is None else kept_mask.cpu()
    sizes = kept_mask.sum(dim=1).tolist()
    tails = [[] if cut else [*prompt.after, *prompt.answer[:-1]] for prompt in prompts]
    lengths = [len(p.before) + size + len(tail) for p, size, tail in zip(prompts, sizes, tails, strict=True)]
    shape = (len(prompts), max(lengths))
    ids, mask, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    visual = torch.zeros_like(kept)
    rows: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for b, (prompt, tail, size, length) in enumerate(zip(prompts, tails, sizes, lengths, strict=True)):
        start, stop = len(prompt.before), len(prompt.before) + size
        ids[b, :start] = torch.tensor(prompt.before)
        ids[b, stop:length] = torch.tensor(tail, dtype=torch.int64)
        mask[b, :length] = 1
        positions[b, :start] = torch.arange(start)
        positions[b, start:stop] = start + kept[b, kept_mask[b]]
        positions[b, stop:] = start + counts[b] + torch.arange(shape[1] - stop)
        visual[b, kept_mask[b]] = torch.arange(start, stop)
        if not cut and prompt.answer:
            first = stop + len(prompt.after) - 1
            rows += [b] * len(prompt.answer)
            sources += range(first, first + len(prompt.answer))
            targets += prompt.answer
    supervised = (torch.tensor(numbers, dtype=torch.int64) for numbers in (rows, sources, targets))
    parts = (ids, mask, positions, visual, kept_mask, *supervised)
    return Slots(*(part.to(device, non_blocking=True) for part in parts))
