"""FLOPs of a training step of the posterior guide, part by part, as closed forms of the configuration.

They equal what torch's counter counts, counted as in `flops.py`. The base is frozen, and a frozen linear layer has no
weight gradient: its backward pass costs as much as its forward pass, and nothing where its input needs no gradient
either. That is so in the tower, and in the first layer's q, k and v of the bottleneck pass, since embeddings and visual
tokens are constants there.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgp_lightning.evaluation.flops import Decoder, head_flops, layer_flops, projector_flops, vision_flops
from pgp_lightning.vlm.memory import Config

__all__ = ["PARTS", "WIDE_PARTS", "Flops", "Shape", "training_flops"]

WIDE_PARTS = ("adapter", "bottleneck")
"""What is computed in float32 also beside a base in half precision."""
PARTS = ("tower", "projector", "decoder, pass 1", "decoder, pass 2", "adapter", "head", "bottleneck")
Flops = dict[str, tuple[int, int]]
"""Forward and backward FLOPs of every part."""


@dataclass(frozen=True)
class Shape:
    """The lengths of a step on one sample.

    Attributes:
        tiles: tiles of the image.
        towers: how often the vision tower runs.
        visual: visual tokens.
        first: prompt slots of the bottleneck pass.
        second: prompt slots of the reconstruction pass.
        first_logits: prompt slots of the bottleneck pass that get logits; nothing reads them.
        second_logits: prompt slots of the reconstruction pass that get logits.
        checkpointing: whether decoder layers run again in the backward pass.
    """

    tiles: int
    towers: int
    visual: int
    first: int
    second: int
    first_logits: int
    second_logits: int
    checkpointing: bool = False


def training_flops(config: Config, rank: int, shape: Shape) -> Flops:
    """Compute the FLOPs of a step with a frozen base, an adapter of some rank and a two-layer bottleneck."""
    decoder = Decoder(config)
    width, layers = decoder.width, decoder.depth

    def one_pass(slots: int, constant_input: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (forward, backward) of the frozen base with attention, and of the adapter."""
        forward = layers * layer_flops(config, slots)
        # Two products of attention forward; backward, the scores again and the gradients of scores, values, queries
        # and keys: six for every four.
        backward = forward + layers * 6 * slots**2 * decoder.queries
        adapter = layers * slots * decoder.adapter(rank)
        adapter_backward = 2 * adapter
        if constant_input:
            backward -= 2 * slots * width * (decoder.queries + 2 * decoder.keys)
            adapter_backward -= 3 * 2 * slots * width * rank
        if shape.checkpointing:
            backward += forward
            # Recomputing a layer stops at the last tensor that was saved: the input of its last product.
            adapter_backward += adapter - layers * 2 * slots * rank * width
        return (forward, backward), (adapter, adapter_backward)

    # Under checkpointing, transformers and peft have embeddings ask for gradients (reentrant checkpoints need it).
    first, first_adapter = one_pass(shape.first, constant_input=not shape.checkpointing)
    second, second_adapter = one_pass(shape.second, constant_input=False)
    heads = 4 * 2 * shape.visual * width**2
    logits = shape.first_logits + shape.second_logits
    return {
        "tower": (shape.towers * vision_flops(config, shape.tiles), 0),
        "projector": (shape.towers * projector_flops(config, shape.tiles), 0),
        "decoder, pass 1": first,
        "decoder, pass 2": second,
        "adapter": (first_adapter[0] + second_adapter[0], first_adapter[1] + second_adapter[1]),
        "head": (head_flops(config, logits), head_flops(config, shape.second_logits)),
        "bottleneck": (heads, 2 * heads),
    }
