"""How transformers calls a text model, its decoder layers and their attention: the one file that knows the names.

Keywords change between versions (5.24 calls `cache` what was `past_key_values`), and hooks see only the new name. A
keyword that is needed and there under none of its names is refused: absence is never read as "none". Other keywords
pass through untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from pgp_lightning.errors import ConfigError

__all__ = [
    "KNOWN_VERSIONS",
    "Call",
    "Rope",
    "cache_keyword",
    "cache_of_output",
    "causal_mask",
    "decode_states",
    "held_keys",
    "held_slots",
    "plain_cache",
    "take_slots",
    "without_cache",
]

KNOWN_VERSIONS = ("5.20", "5.24")
"""The lowest and the newest minor of transformers whose calls are known here, those between included."""

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, (B, N, head width) each."""

# By what we call it: the names that transformers gives it, newest first.
_NAMES = {
    "hidden": ("hidden_states",),
    "cache": ("cache", "past_key_values"),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "rope": ("position_embeddings",),
}


class Call:
    """One call of a decoder layer or of an attention module, as a forward hook with keywords sees it.

    Args:
        module: the module that is called.
        args: its positional arguments; hidden states may be the first.
        kwargs: its keyword arguments.

    Raises:
        ConfigError: on reading or rewriting what transformers gives no known name.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs

    @property
    def hidden(self) -> Tensor:
        """Hidden states (B, N, d)."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs[self._name("hidden")]
        return hidden

    @property
    def cache(self) -> Any:  # noqa: ANN401 (transformers' classes)
        """The key-value cache of all layers; None if the model runs without."""
        return self.kwargs[self._name("cache")]

    @property
    def mask(self) -> Tensor | None:
        """The mask in the form of the attention implementation, None if it needs none."""
        mask: Tensor | None = self.kwargs[self._name("mask")]
        return mask

    @property
    def positions(self) -> Tensor:
        """Positions of the slots, int64 (B, N) or (1, N).

        Raises:
            ConfigError: if the model was called without.
        """
        positions: Tensor | None = self.kwargs[self._name("positions")]
        if positions is None:
            raise ConfigError(f"{type(self.module).__name__} was called without positions: give the model position_ids")
        return positions

    @property
    def rope(self) -> Rope:
        """Rotary positions of the slots."""
        rope: Rope = self.kwargs[self._name("rope")]
        return rope

    def rewritten(self, **new: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
        """Return positional and keyword arguments with other values of `hidden`, `mask`, `positions` or `rope`.

        A value goes where the call has it already: a layer would swallow a keyword that it does not know.
        """
        args = self.args
        if "hidden" in new and args:
            args = (new.pop("hidden"), *args[1:])
        return args, self.kwargs | {self._name(what): value for what, value in new.items()}

    def _name(self, what: str) -> str:
        for name in _NAMES[what]:
            if name in self.kwargs:
                return name
        lowest, newest = KNOWN_VERSIONS
        raise ConfigError(
            f"transformers {transformers.__version__} calls {type(self.module).__name__} with "
            f"{', '.join(sorted(self.kwargs)) or 'no keywords'}, and none of them is {' or '.join(_NAMES[what])}: this "
            f"release knows transformers {lowest} to {newest}; install one of these"
        )


def plain_cache(cache: Any) -> DynamicCache | None:  # noqa: ANN401
    """Return a cache whose layers may hold different numbers of slots; None stays None.

    Raises:
        ConfigError: if it is of another kind.
    """
    if cache is None:
        return None
    if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        return cache
    kinds = ", ".join(sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])}))
    raise ConfigError(
        "pruned layers hold prompts of different lengths, which takes a DynamicCache of plain layers; got "
        f"{type(cache).__name__} of {kinds or 'no layers'}: leave cache_implementation unset"
    )


def held_slots(cache: DynamicCache, layer: int) -> int:
    """Return how many slots a layer's cache holds."""
    return int(cache.get_seq_length(layer))


def held_keys(call: Call) -> Tensor | None:
    """Return the keys (B, G, K, head width) that an attention module's cache holds after its call, None without one."""
    layer: Any = call.module
    return None if call.cache is None else call.cache.layers[layer.layer_idx].keys


def take_slots(cache: DynamicCache, layers: int, slots: Tensor) -> None:
    """Leave only slots, int64 (B, n), in the caches of the first layers."""
    layer: Any
    for layer in cache.layers[:layers]:
        index = slots.to(layer.keys.device)[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def causal_mask(
    decoder: Any,  # noqa: ANN401
    hidden: Tensor,
    valid: Tensor,
    cache: DynamicCache | None = None,
    layer: int | None = None,
) -> Tensor | None:
    """Return the mask that the attention implementation takes, for queries (B, Q, d) and slots bool (B, K)."""
    mask: Tensor | None = create_causal_mask(decoder.config, hidden, valid, cache, layer_idx=layer)
    return mask


def decode_states(decoder: nn.Module, embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Run a text model without its head and without a cache.

    Args:
        decoder: the text model.
        embeddings: its input (B, N, d).
        mask: (B, N) marks padding by 0, or bool (B, 1, N, N). Always given: without one, gaps in the positions would be
            taken for borders of packed sequences.
        positions: int64 (B, N).

    Returns:
        Hidden states (B, N, d) after the final norm.
    """
    output: Any = decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's inputs for a pass that starts anew and keeps no cache.

    Positions are counted from the mask, as `generate` does, so that padding changes nothing.
    """
    mask = inputs.get("attention_mask")
    anew = {name: value for name, value in inputs.items() if name not in _NAMES["cache"]} | {"use_cache": False}
    if mask is not None and "position_ids" not in anew:
        anew["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return anew


def cache_keyword(model: nn.Module) -> str:
    """Return the keyword by which a model, and its `generate`, takes a cache.

    Raises:
        ConfigError: if it takes none that is known.
    """
    takes = inspect.signature(model.forward).parameters
    for name in _NAMES["cache"]:
        if name in takes:
            return name
    raise ConfigError(
        f"{type(model).__name__} of transformers {transformers.__version__} takes no cache under the names "
        f"{' or '.join(_NAMES['cache'])}"
    )


def cache_of_output(output: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the cache that a model or `generate` gives back.

    Raises:
        ConfigError: if there is none.
    """
    for name in _NAMES["cache"]:
        if output.get(name) is not None:
            return output[name]
    raise ConfigError(f"there is no cache in the output, which has {', '.join(output)}: call with use_cache=True")
