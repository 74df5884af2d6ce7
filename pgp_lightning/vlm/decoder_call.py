"""How transformers calls a model, its decoder layers and their attention: the one file that knows the names.

Keywords change between versions (5.24 calls `cache` what was `past_key_values`), and hooks see only the new name. A
keyword that is needed and there under none of its names is refused: absence is never read as "none". Other keywords
pass through untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from pgp_lightning.errors import ConfigError

__all__ = [
    "KNOWN_VERSIONS",
    "Call",
    "ModelCall",
    "Rope",
    "cache_keyword",
    "cache_of_output",
    "causal_mask",
    "decode_states",
    "extended_output",
    "held_keys",
    "recompute_layers",
    "recomputed_with_hooks",
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
# Of a model around the decoder, which may be called without any of them.
_MODEL_NAMES = {
    "ids": ("input_ids",),
    "embeddings": ("inputs_embeds",),
    "pixels": ("pixel_values",),
    "features": ("mm_encoder_outputs",),
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


class ModelCall:
    """One call of a model without its head: what embeds ids and pictures and runs the decoder.

    Args:
        module: the module that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Attributes:
        given: all of them by name.
        ids: int64 (B, N), or None.
        embeddings: (B, N, d) in place of ids, or None.
        mask: (B, N) marks padding by 0, or what a caller made of it, or None.
        pixels: normalised pixels (T, 3, S, S), or None.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        placed = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
        self.given: dict[str, Any] = {**placed, **kwargs}
        self.ids: Tensor | None = self._read("ids")
        self.embeddings: Tensor | None = self._read("embeddings")
        self.mask: Tensor | None = self._read("mask")
        self.pixels: Tensor | None = self._read("pixels")

    @property
    def cache(self) -> Any:  # noqa: ANN401 (transformers' classes)
        """The key-value cache; None without.

        Raises:
            ConfigError: if the model takes none under a known name.
        """
        cache_keyword(self.module)
        return self._read("cache")

    @property
    def slots(self) -> Tensor:
        """Ids (B, N) or embeddings (B, N, d)."""
        slots = self.embeddings if self.ids is None else self.ids
        assert slots is not None  # the model refuses to be called without
        return slots

    @property
    def visual_tokens(self) -> Any:  # noqa: ANN401 (a tensor, or a list by picture)
        """Visual tokens that come in place of pixels, None without."""
        image = (self._read("features") or {}).get("image")
        return None if image is None else image.pooler_output

    def split(self, slots: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return this call as two, with a cache that both share: the first slots with pictures, and those behind."""
        cache = DynamicCache() if self.cache is None else self.cache
        others = {
            name: value for name, value in self.given.items() if name not in _NAMES["cache"] + _MODEL_NAMES["features"]
        }
        others |= {cache_keyword(self.module): cache, "use_cache": True}
        head, tail = dict(others), dict(others)
        for name in _MODEL_NAMES["features"]:
            if name in self.given:
                head[name] = self.given[name]
        for name in _MODEL_NAMES["pixels"]:
            tail.pop(name, None)
        for name in _MODEL_NAMES["ids"] + _MODEL_NAMES["embeddings"]:
            if others.get(name) is not None:
                head[name], tail[name] = others[name][:, :slots], others[name][:, slots:]
        for name in _NAMES["positions"]:
            if others.get(name) is not None:
                head[name], tail[name] = others[name][..., :slots], others[name][..., slots:]
        for name in _NAMES["mask"]:
            if others.get(name) is not None:
                head[name] = others[name][:, :slots]
        return head, tail

    def _read(self, what: str) -> Any:  # noqa: ANN401
        given = (self.given.get(name) for name in (_NAMES | _MODEL_NAMES)[what])
        return next((value for value in given if value is not None), None)


def extended_output(first: Any, second: Any) -> Any:  # noqa: ANN401
    """Return the output of the second call of `ModelCall.split` with the states of the first in front of its own.

    Raises:
        ConfigError: if it holds states or attention by layer, which would be those of the second call alone.
    """
    if second.get("hidden_states") is not None or second.get("attentions") is not None:
        raise ConfigError(
            "states and attention by layer cannot be had of a prompt and what follows it in one call: leave "
            "output_hidden_states and output_attentions unset, or call the model with the prompt alone first"
        )
    second.last_hidden_state = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    return second


def held_keys(call: Call) -> Tensor | None:
    """Return the keys (B, G, K, head width) that an attention module's cache holds after its call, None without one."""
    layer: Any = call.module
    return None if call.cache is None else call.cache.layers[layer.layer_idx].keys


def causal_mask(
    decoder: Any,  # noqa: ANN401
    hidden: Tensor,
    valid: Tensor,
) -> Tensor | None:
    """Return the mask that the attention implementation takes, for the last Q of K slots.

    Args:
        decoder: the text model.
        hidden: the Q queries' hidden states (B, Q, d).
        valid: bool (B, K), what is no padding.
    """
    cache, before = None, valid.shape[1] - hidden.shape[1]
    if before:
        # A cache is asked for its length alone.
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.keys, layer.is_initialized = hidden.new_empty(1, 1, before, 1), True
        cache = DynamicCache()
        cache.layers = [layer]
    mask: Tensor | None = create_causal_mask(decoder.config, hidden, valid, cache)
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


def recompute_layers(decoder: nn.Module) -> None:
    """Let a text model's layers keep their input alone in training, and run again in the backward pass."""
    # The first name is newer than 5.20; where it is there, the other warns.
    enable: Any = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recomputed_with_hooks(layer: nn.Module) -> bool:
    """Return whether a backward pass would run a layer again, and the hooks on it too, as before transformers 5.23."""
    if not torch.is_grad_enabled():  # first: decoding asks this of every layer, in every step
        return False
    called: Any = type(layer).__call__
    return layer.training and getattr(layer, "gradient_checkpointing", False) and called is not nn.Module.__call__


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
    kind: Any = type(model)
    if name := _cache_keyword(kind):
        return name
    raise ConfigError(
        f"{type(model).__name__} of transformers {transformers.__version__} takes no cache under the names "
        f"{' or '.join(_NAMES['cache'])}"
    )


@cache
def _cache_keyword(kind: Any) -> str | None:  # noqa: ANN401 (a class)
    takes = inspect.signature(kind.forward).parameters
    return next((name for name in _NAMES["cache"] if name in takes), None)


def cache_of_output(output: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the cache that a model or `generate` gives back.

    Raises:
        ConfigError: if there is none.
    """
    for name in _NAMES["cache"]:
        if output.get(name) is not None:
            return output[name]
    raise ConfigError(f"there is no cache in the output, which has {', '.join(output)}: call with use_cache=True")
