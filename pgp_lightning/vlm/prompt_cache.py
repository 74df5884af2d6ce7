"""What a cache is asked for and told, and the cache of a layer whose prompt may have been cut.

`decoder_call.py` reads a cache out of a call; this file is the only one that knows what is in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pgp_lightning.errors import ConfigError

__all__ = ["PromptLayer", "held_slots", "keep_prompts", "plain_cache", "prompt_layers", "take_slots"]


class PromptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's cache behind a prefill inside `pruned`: it knows what it holds of the prompt, and of how long a prompt.

    Args:
        layer: the cache as the prefill left it.
        prompt: bool (B, n), which of the prompt slots that it holds are no padding.
        slots: how many slots the prompt counts as. transformers asks the first layer for the length of a conversation,
            to count positions, masks and the ids of a next turn by: there it is N of the whole prompt.
        whole: whether they are all there and the layer runs as if there were no pruning.
        shift: int64 (B,), how far positions of what follows move back, or None.
        cut: whether some layer of this cache is not whole, so that the model must not run on it by itself.
    """

    def __init__(self, layer: object, prompt: Tensor, slots: int, whole: bool, shift: Tensor | None, cut: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        vars(self).update(vars(layer))
        self.prompt, self.slots, self.whole, self.shift, self.cut = prompt, slots, whole, shift, cut
        self.expected = False

    @property
    def held(self) -> int:
        """How many slots are really there."""
        return super().get_seq_length()

    @property
    def generated(self) -> int:
        """How many of them follow the prompt."""
        return self.held - self.prompt.shape[1]

    def get_seq_length(self) -> int:
        """Return how many slots transformers shall count."""
        return self.slots + self.generated if self.held else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Take in new slots, if whoever calls knows what was cut.

        Raises:
            ConfigError: if it does not.
        """
        if self.cut and not self.expected:
            raise ConfigError(
                "this cache holds a prompt that pruned() has cut, and the model cannot go on from it by itself: "
                "generate, and ask the next turn, inside the same `with pruned(...)`, and leave it when that is done"
            )
        self.expected = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last slots, given as a negative number.

        Raises:
            ConfigError: if that reaches into the prompt.
        """
        if not -self.generated <= tokens_to_remove <= 0:
            raise ConfigError(
                f"{self.generated} slots follow the prompt in this cache, and crop({tokens_to_remove}) asks for "
                "others: the prompt cannot be shortened; give a negative number of slots to take back"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, the prompt too."""
        super().reset()
        self.prompt, self.slots, self.whole, self.shift, self.cut = self.prompt[:, :0], 0, True, None, False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._take_rows(torch.arange(len(self.prompt)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def _take_rows(self, rows: Tensor) -> None:
        # `reorder_cache` needs none of it: beams of a row are alike.
        self.prompt = self.prompt[rows.to(self.prompt.device)]
        self.shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]


def keep_prompts(cache: DynamicCache, prompts: list[tuple[Tensor, Tensor | None]], whole: Tensor) -> None:
    """Let a cache know what its layers hold of a prompt.

    Args:
        cache: as the prefill left it.
        prompts: by layer, bool (B, n) of the slots that it holds, and how far positions move back.
        whole: bool (B, N), the same object for layers of which nothing was cut.
    """
    untouched = [held is whole and shift is None for held, shift in prompts]
    cut = not all(untouched)
    cache.layers = [
        PromptLayer(layer, held, (held if depth else whole).shape[1], same, shift, cut)
        for depth, (layer, (held, shift), same) in enumerate(zip(cache.layers, prompts, untouched, strict=True))
    ]


def prompt_layers(cache: Any) -> list[PromptLayer] | None:  # noqa: ANN401
    """Return the layers of a cache that `keep_prompts` was called with, None of any other."""
    layers = list(getattr(cache, "layers", []))
    return layers if layers and all(isinstance(layer, PromptLayer) for layer in layers) else None


def plain_cache(cache: Any) -> DynamicCache | None:  # noqa: ANN401
    """Return a cache whose layers may hold different numbers of slots; None stays None.

    Raises:
        ConfigError: if it is of another kind.
    """
    if cache is None:
        return None
    if isinstance(cache, DynamicCache) and all(type(layer) in (DynamicLayer, PromptLayer) for layer in cache.layers):
        return cache
    kinds = ", ".join(sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])}))
    raise ConfigError(
        "pruned layers hold prompts of different lengths, which takes a DynamicCache of plain layers; got "
        f"{type(cache).__name__} of {kinds or 'no layers'}: leave cache_implementation unset"
    )


def held_slots(cache: Any) -> int:  # noqa: ANN401
    """Return how many slots a conversation in a cache has, those that were cut included; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def take_slots(cache: DynamicCache, layers: int, slots: Tensor) -> None:
    """Leave only slots, int64 (B, n), in the caches of the first layers."""
    layer: Any
    for layer in cache.layers[:layers]:
        index = slots.to(layer.keys.device)[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
