"""Pruning by brute force: nothing is ever shortened, cached or hooked.

Every slot of the sequence runs through every decoder layer, and a mask of four dimensions says who may see whom. A
pruner is only what it leaves behind: which prompt slots each layer sees, and at which positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgp_lightning.vlm.family import VLM

Rewrite = Callable[[Tensor], Tensor]


@dataclass
class Masked:
    """What a pruner did to a prompt of P slots, layer by layer.

    Args:
        prefill: by layer, the slots that the prompt's own slots see: bool (B, P).
        decode: by layer, the slots that generated tokens see; those of prefill unless caches were cut behind.
        renumber: the layer from which positions count only what that layer's prefill kept.
        rewrites: by layer, what is done to the prompt's hidden states (B, P, d) in front of it.
    """

    prefill: Sequence[Tensor]
    decode: Sequence[Tensor] = ()
    renumber: int | None = None
    rewrites: Mapping[int, Rewrite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decode = self.decode or self.prefill

    def at(self, depth: int) -> tuple[Tensor, Tensor]:
        """Return what the prompt's slots and what generated tokens see in a layer."""
        return self.prefill[depth], self.decode[depth]


def embed(vlm: VLM, inputs: Mapping[str, Any]) -> Tensor:
    """Return the prompt's embeddings with visual tokens in their slots: (B, P, d)."""
    ids = inputs["input_ids"]
    hidden = vlm.model.get_input_embeddings()(ids)
    features = vlm.encode(inputs["pixel_values"])
    slots = (ids == vlm.model.config.image_token_id)[..., None].expand_as(hidden)
    return hidden.masked_scatter(slots, features.reshape(-1, features.shape[-1]))


def masked_states(vlm: VLM, embeddings: Tensor, valid: Tensor, masked: Masked) -> tuple[Tensor, list[Tensor]]:
    """Run the decoder over whole sequences.

    Args:
        vlm: the model.
        embeddings: (B, N, d), the prompt's P slots and what was generated so far.
        valid: bool (B, P), the prompt slots that are no padding.
        masked: what the pruner left.

    Returns:
        Logits (B, N, V), and the hidden states (B, N, d) in front of every layer.
    """
    decoder: Any = vlm.decoder
    rows, length, prompt = *embeddings.shape[:2], valid.shape[1]
    generated = torch.ones(rows, length - prompt, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    after = torch.arange(length)[:, None] >= prompt

    def counted(slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary positions that count these prompt slots alone."""
        positions = torch.cat([slots, generated], dim=1).long().cumsum(dim=1) - 1
        return decoder.rotary_emb(embeddings, positions.clamp(min=0))

    rope, hidden, before = counted(valid), embeddings, []
    for depth, layer in enumerate(vlm.decoder_layers):
        if depth in masked.rewrites:
            rewritten = masked.rewrites[depth](hidden[:, :prompt])
            hidden = torch.cat([rewritten, hidden[:, prompt:]], dim=1)
        if depth == masked.renumber:
            rope = counted(masked.prefill[depth])
        before.append(hidden)
        seen, later = (torch.cat([slots, generated], dim=1)[:, None] for slots in masked.at(depth))
        mask = (causal & torch.where(after, later, seen))[:, None]
        if decoder.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, use_cache=False)
    logits: Tensor = vlm.head(decoder.norm(hidden))
    return logits, before


@torch.no_grad()
def masked_greedy(vlm: VLM, inputs: Mapping[str, Any], masked: Masked, steps: int) -> tuple[Tensor, Tensor]:
    """Decode greedily by running whole sequences again: tokens (B, steps) and their logits (B, steps, V)."""
    hidden, valid = embed(vlm, inputs), inputs["attention_mask"].bool()
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(masked_states(vlm, hidden, valid, masked)[0][:, -1])
        tokens.append(logits[-1].argmax(dim=-1))
        hidden = torch.cat([hidden, vlm.model.get_input_embeddings()(tokens[-1])[:, None]], dim=1)
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)
