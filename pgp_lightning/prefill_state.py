"""What a decoder layer is about to see of a prompt, and the ways in which a pruner may rewrite it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pgp_lightning.vlm.decoder_call import Rope

__all__ = ["PrefillState", "pack", "take"]


@dataclass(frozen=True)
class PrefillState:
    """What a decoder layer is about to see of the prompt: B rows of N slots.

    Attributes:
        hidden: (B, N, d), the coming layer's input.
        token: int64 (B, N), which of its row's visual tokens a slot holds, -1 for text and padding.
        valid: bool (B, N), False on padding.
        origin: int64 (B, N), the slot in the original prompt, -1 for an appended token.
        rope: cosines and sines of the slots' positions, (B, N, head width) each.
        counts: int64 (B,), number of visual tokens in each row's original prompt.
        next_position: int64 (B,), the position of the first generated token in the model's own numbering.
        rotary: the decoder's module of rotary positions.
        shift: int64 (B,), how far positions of generated tokens move back because of `renumber`, or None.
        place: int64 (B, N), which of the n slots that the layer was handed a slot is, -1 if it was appended since; None
            while they are all there.
        behind: bool (B, n), which of those n slots the caches of the layers behind keep; None while they are all there.
    """

    hidden: Tensor
    token: Tensor
    valid: Tensor
    origin: Tensor
    rope: Rope
    counts: Tensor
    next_position: Tensor
    rotary: nn.Module
    shift: Tensor | None = None
    place: Tensor | None = None
    behind: Tensor | None = None

    @property
    def visual(self) -> Tensor:
        """Which slots hold visual tokens: bool (B, N)."""
        return self.token >= 0

    @property
    def kept(self) -> Tensor:
        """Which visual tokens are there: bool (B, M)."""
        return self.to_tokens(torch.zeros_like(self.token, dtype=torch.float32)) == 0

    def to_tokens(self, scores: Tensor) -> Tensor:
        """Bring scores of slots (B, N) into the order of visual tokens: float32 (B, M), -inf where there is none."""
        rows, slots = self.visual.nonzero(as_tuple=True)
        found = scores.new_full((len(scores), int(self.counts.max())), -torch.inf, dtype=torch.float32)
        return found.index_put((rows, self.token[rows, slots]), scores[rows, slots].float())

    def expand(self, values: Tensor) -> Tensor:
        """Repeat values of the requests' rows for beams and returned sequences: (b, ...) to (B, ...)."""
        return values.to(self.hidden.device).repeat_interleave(len(self.hidden) // len(values), dim=0)

    def keep_tokens(self, keep: Tensor, full_depth: bool = False) -> PrefillState:
        """Drop visual tokens: those not in the keep mask, bool (B, M); text always stays."""
        return self.keep(~self.visual | keep.gather(1, self.token.clamp(min=0)), full_depth)

    def keep(self, mask: Tensor, full_depth: bool = False) -> PrefillState:
        """Drop slots.

        Args:
            mask: bool (B, N), the slots that stay.
            full_depth: drop them from the caches of the layers behind as well.
        """
        mask = mask & self.valid
        if torch.equal(mask, self.valid):
            return self
        place, behind = self._handed()
        if full_depth:
            rows, gone = (self.valid & ~mask & (place >= 0)).nonzero(as_tuple=True)
            if len(rows):  # none of those that went was handed: the same object says that nothing is to be cut
                behind = behind.index_put((rows, place[rows, gone]), torch.zeros_like(behind[0, 0]))
        slots, valid = pack(mask)
        return replace(
            self,
            hidden=take(self.hidden, slots),
            token=take(self.token, slots).masked_fill(~valid, -1),
            valid=valid,
            origin=take(self.origin, slots),
            rope=(take(self.rope[0], slots), take(self.rope[1], slots)),
            place=take(place, slots),
            behind=behind,
        )

    def replace(self, hidden: Tensor) -> PrefillState:
        """Put other hidden states (B, N, d) into the slots, e.g. merged tokens."""
        return replace(self, hidden=hidden.to(self.hidden.dtype))

    def append(self, token: Tensor, position: Tensor) -> PrefillState:
        """Append a token to every row: its hidden states (B, d), at positions int64 (B,).

        What is appended has to be dropped again before the last layer, or the model reads its answer from it.
        """
        hidden = torch.cat([self.hidden, token[:, None].to(self.hidden.dtype)], dim=1)
        cos, sin = self.rotary(hidden[:, -1:], position[:, None])
        rope = (torch.cat([self.rope[0], cos], dim=1), torch.cat([self.rope[1], sin], dim=1))
        none = torch.full_like(self.token[:, :1], -1)
        place, behind = self._handed()
        return replace(
            self,
            hidden=hidden,
            token=torch.cat([self.token, none], dim=1),
            valid=torch.cat([self.valid, torch.ones_like(self.valid[:, :1])], dim=1),
            origin=torch.cat([self.origin, none], dim=1),
            rope=rope,
            place=torch.cat([place, none], dim=1),
            behind=behind,
        )

    def renumber(self) -> PrefillState:
        """Count positions again, 0 to n - 1 over each row's slots; generated tokens go on from n."""
        position = (self.valid.cumsum(dim=1) - 1).clamp(min=0)
        cos, sin = self.rotary(self.hidden, position)
        return replace(self, rope=(cos, sin), shift=self.next_position - self.valid.sum(dim=1))

    def to(self, device: torch.device) -> PrefillState:
        """Return the state on a device: a model's layers may lie on several."""
        if self.token.device == device:
            return self
        parts: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, rope=(self.rope[0].to(device), self.rope[1].to(device)), **parts)

    def _handed(self) -> tuple[Tensor, Tensor]:
        """Return `place` and `behind`, also while they are None."""
        if self.place is not None and self.behind is not None:
            return self.place, self.behind
        return torch.arange(self.valid.shape[1], device=self.valid.device).expand(self.valid.shape), self.valid


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots of a mask (B, N) in order, padded on the left: int64 (B, n), and which are no padding: bool."""
    count = mask.sum(dim=1)
    width = int(count.max())
    slots = mask.int().argsort(dim=1, stable=True)[:, mask.shape[1] - width :]
    return slots, torch.arange(width, device=mask.device) >= (width - count)[:, None]


def take(values: Tensor, slots: Tensor) -> Tensor:
    """Gather slots, int64 (B, n), of values (B, N, ...): (B, n, ...)."""
    index = slots.view(*slots.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*slots.shape, *values.shape[2:]))
