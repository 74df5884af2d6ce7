"""Carries a pruner's rewrites through the calls of a model, by hooks on it and on its decoder layers.

A prefill's state lives for one call; what decoding needs of it lies in the cache, so that several caches can go on, in
several threads. Calls of the model take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill_inputs import Announced
from pgp_lightning.prefill_state import PrefillState, pack
from pgp_lightning.pruner import Pruner
from pgp_lightning.vlm.decoder_call import Call, ModelCall, Rope, causal_mask, extended_output, recomputed_with_hooks
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.prompt_cache import PromptLayer, held_slots, keep_prompts, plain_cache, prompt_layers, take_slots

__all__ = ["Driver", "Run"]

Rewritten = tuple[tuple[Any, ...], dict[str, Any]] | None


@dataclass
class Run:
    """What the last prefill inside `pruned` looked like.

    Attributes:
        kept: by decoder layer, which visual tokens it saw: bool (B, M).
        slots: by decoder layer, how many prompt slots of each row it saw: int64 (B,).
        cached: by decoder layer, how many of them its cache holds: int64 (B,), fewer behind a cut at full depth.
    """

    kept: list[Tensor] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)
    cached: list[Tensor] = field(default_factory=list)


class Driver:
    """Prunes the prefills of a model while its hooks are attached.

    Args:
        vlm: the model.
        pruner: what to drop, and where.
        announced: what the model will be called with.

    Attributes:
        run: what the last prefill looked like.
        calls: how many calls ran the hooks, or were refused.
    """

    def __init__(self, vlm: VLM, pruner: Pruner, announced: Announced) -> None:
        self.vlm, self.pruner, self.announced = vlm, pruner, announced
        self.decoder, self.depth = vlm.decoder, len(vlm.decoder_layers)
        self.run, self.calls = Run(), 0
        self.turn = threading.RLock()
        self.running = self.closed = False
        self.guessing: dict[int, bool] = {}  # by thread
        self._forget()

    def _forget(self) -> None:
        """Keep no cache and no graph alive, nor what an exception left half done."""
        self.state: PrefillState | None = None
        self.cache: DynamicCache | None = None
        self.mask: Tensor | None = None
        self.tail: Tensor | None = None
        self.past: list[tuple[Tensor, Tensor | None]] = []
        self.masks: dict[tuple[int, torch.device], Tensor | None] = {}
        self.ropes: dict[tuple[int, torch.device], Rope] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks; a call that is running in another thread ends before they are taken away."""
        body = self.vlm.body
        handles = [
            body.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            body.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        for depth, layer in enumerate(self.vlm.decoder_layers):
            handles.append(layer.register_forward_pre_hook(partial(self._before, depth), with_kwargs=True))
        if self.announced.pixels is not None:
            # In front of hooks that leave tiles out.
            tower = self.vlm.vision_tower
            handles.append(tower.register_forward_pre_hook(self._see_picture, prepend=True, with_kwargs=True))
        try:
            yield
        finally:
            with self.turn:
                self.closed = True
                for handle in handles:
                    handle.remove()
            with suppress(RuntimeError):
                while True:  # what a call of this thread held when an interrupt broke it off
                    self.turn.release()

    def asked(self, config: Any, options: dict[str, Any]) -> None:  # noqa: ANN401 (transformers' class)
        """Look at how somebody generates: refuse what no hook could serve, before the first token.

        Raises:
            ConfigError: by name.
        """
        assistant = options.get("assistant_model")
        looked_up = options.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
        self.guessing[threading.get_ident()] = assistant is not None or bool(looked_up)
        if isinstance(assistant, nn.Module) and any(part is self.decoder for part in assistant.modules()):
            self.calls += 1
            raise ConfigError(
                "assistant_model is the pruned model itself, which cannot draft for itself: give a smaller model, or "
                "prompt_lookup_num_tokens"
            )
        if options.get("assistant_early_exit", getattr(config, "assistant_early_exit", None)):
            self.calls += 1
            raise ConfigError(
                "assistant_early_exit drafts with the first layers of the pruned model itself, which cannot be pruned "
                "apart from it: give another assistant_model, or prompt_lookup_num_tokens"
            )

    def _see_picture(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.announced.picture(ModelCall(tower, args, kwargs).pixels)

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rewritten:
        """Tell a prefill from what follows it, before the model embeds anything."""
        self.turn.acquire()
        if self.closed:
            self.turn.release()  # the hook that does so at the end is gone
            raise ConfigError("pruned() was left while a thread was calling the model: join the thread before that")
        self.calls += 1
        if any(recomputed_with_hooks(layer) for layer in self.vlm.decoder_layers):
            raise ConfigError(
                "this release of transformers runs hooks again when gradient checkpointing recomputes a layer, which "
                "would prune what is pruned already: switch it off, or take transformers 5.23 or later"
            )
        call = ModelCall(body, args, kwargs)
        self.first: Any = None
        self.seen, self.running = 0, True
        self.prefill = held_slots(call.cache) == 0
        if not self.prefill:
            self._continue(call)
            return None
        plain_cache(call.cache)
        behind = self.announced.behind(call)
        if behind and call.given.get("use_cache") is False:
            raise ConfigError(
                f"the model got {behind} slots behind the prompt and no cache: generation without a cache would prune "
                "the prompt anew for every token, and a known answer goes on from the prompt's; leave use_cache on"
            )
        self.announced.pictures(call)
        return self._in_two(body, call) if behind else None

    def _in_two(self, body: nn.Module, call: ModelCall) -> Rewritten:
        """Let the prompt run by itself, and the call go on with the slots that follow it.

        They are guesses of assisted decoding, or an answer that is already known. No pruner sees them: what it keeps
        does not depend on them, and is what plain decoding keeps.
        """
        head, tail = call.split(self.announced.visual.shape[1])
        first, rest = body(**head), ModelCall(body, (), tail)
        if not held_slots(rest.cache):
            raise ConfigError(
                "slots behind the prompt take a cache, and the model has filled none, as gradient checkpointing does: "
                "call it with the prompt alone, or switch checkpointing off"
            )
        self.first, self.seen, self.running, self.prefill = first, 0, True, False
        self._continue(rest)
        return (), tail

    def _continue(self, call: ModelCall) -> None:
        """Look at a call that goes on from a cache."""
        cache = call.cache
        layers = prompt_layers(cache)
        if layers is None:
            raise ConfigError(
                "the cache holds a prompt already: open pruned() before its prefill, and call the model without a "
                "cache (prefix tuning puts one there: it cannot be pruned)"
            )
        if call.pixels is not None or call.visual_tokens is not None:
            raise ConfigError(
                "the pictures of this cache are in it already, and a later turn cannot bring others: leave "
                "pixel_values and features out of calls that go on from a cache"
            )
        slots = call.slots
        if len(slots) != len(layers[0].prompt):
            raise ConfigError(f"the prefill had {len(layers[0].prompt)} rows, this step has {len(slots)}")
        # Guesses may hold anything, and the first token is the model's own.
        guessed = slots.shape[1] == 1 or self.guessing.get(threading.get_ident(), False)
        ids = None if guessed or self.announced.ids is None else call.ids
        if ids is not None and bool(self.vlm.visual_slots(ids[:, 1:]).any()):
            raise ConfigError(
                "placeholders of images follow a prompt that is in the cache, and no picture comes with them: a later "
                "turn is text alone, and the same prompt once more takes a cache of its own"
            )
        mask, length = call.mask, held_slots(cache) + slots.shape[1]
        if mask is not None and (getattr(mask, "ndim", None) != 2 or mask.shape[1] != length):
            raise ConfigError(
                f"the cache and this call make {length} slots, counted without a cut, and the attention_mask is "
                f"{tuple(getattr(mask, 'shape', ()))}: give one of ({len(slots)}, {length})"
            )
        # What follows the prompt may have padding of its own: answers of a batch that ended early.
        self.tail = None if mask is None else mask[:, layers[0].slots :].bool()

    def _leave(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        """Let the cache know what it holds, and look whether every layer asked."""
        try:
            if output is None:
                return None  # an exception is on its way
            self._look_at_hooks(self.depth)
            # Gradient checkpointing leaves a cache empty.
            if self.prefill and self.cache is not None and held_slots(self.cache):
                keep_prompts(self.cache, self.past, self.whole)
            return output if self.first is None else extended_output(self.first, output)
        finally:
            self.first, self.running = None, False
            self._forget()
            self.announced.encoded.discard(threading.get_ident())
            self.turn.release()

    def _before(self, depth: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rewritten:
        """Hand a decoder layer what it shall see."""
        if not self.running:
            self.calls += 1
            raise ConfigError("the decoder was called by itself inside pruned(): call the model around it")
        self._look_at_hooks(depth)
        call = Call(layer, args, kwargs)
        self.seen += 1
        if not self.prefill:
            return self._decode(depth, call)
        if depth == 0:
            self._begin(call)
        return self._prefill(depth, call)

    def _look_at_hooks(self, layers: int) -> None:
        if self.seen != layers:
            raise ConfigError(
                f"{self.seen} of the first {layers} decoder layers ran their hooks, so the prompt is not pruned as it "
                "should be: compiled or replaced layers do not run them; prune the model as transformers loads it"
            )

    def _begin(self, call: Call) -> None:
        hidden = call.hidden
        self.cache = plain_cache(call.cache)
        copies = len(hidden) // len(self.announced.visual)
        visual, self.whole = (
            part.to(hidden.device).repeat_interleave(copies, dim=0)
            for part in (self.announced.visual, self.announced.valid)
        )
        positions = call.positions.expand(visual.shape)
        for record in (self.run.kept, self.run.slots, self.run.cached):
            record.clear()
        cos, sin = call.rope
        self.state = PrefillState(
            hidden=hidden,
            token=(visual.cumsum(dim=1) - 1).masked_fill(~visual, -1),
            valid=self.whole,
            origin=torch.arange(visual.shape[1], device=hidden.device).expand(visual.shape),
            rope=(cos.expand(len(visual), -1, -1), sin.expand(len(visual), -1, -1)),
            counts=visual.sum(dim=1),
            next_position=positions.masked_fill(~self.whole, -1).max(dim=1).values + 1,
            rotary=self.decoder.rotary_emb,  # type: ignore[arg-type]
        )

    def _prefill(self, depth: int, call: Call) -> Rewritten:
        hidden = call.hidden
        assert self.state is not None
        before = replace(self.state, hidden=hidden).to(hidden.device)
        state = self.pruner.before_layer(depth, before)
        if state.behind is not None:
            if state.behind is not before.valid:
                self._cut_caches(before, state.behind, call.cache)
            state = replace(state, place=None, behind=None)
        self._record(before, state)
        self.state = state
        self.past.append((state.valid, state.shift))
        if state is before and state.valid is self.whole and state.shift is None:
            return None  # the whole prompt: the model's own mask and positions
        if state.valid is not before.valid or self.mask is None:
            # The two-dimensional mask is given always: without it gaps in positions would be read as packed sequences.
            self.mask = causal_mask(self.decoder, state.hidden, state.valid)
        mask = self.mask if self.mask is None else self.mask.to(hidden.device)
        return call.rewritten(hidden=state.hidden, mask=mask, rope=state.rope, positions=None)

    def _decode(self, depth: int, call: Call) -> Rewritten:
        layer: PromptLayer = call.cache.layers[depth]
        layer.expected = True
        if layer.whole:
            return None
        hidden = call.hidden
        new: dict[str, Any] = {"mask": self._mask(layer, hidden)}
        if layer.shift is not None:
            new["rope"] = self._rope(layer, call)
        return call.rewritten(**new)

    def _mask(self, layer: PromptLayer, hidden: Tensor) -> Tensor | None:
        """Return the mask of a layer's cache and this step's slots, made once for layers that hold the same."""
        key = id(layer.prompt), hidden.device
        if key not in self.masks:
            prompt = layer.prompt.to(hidden.device)
            tail = self.tail
            if tail is None:
                tail = prompt.new_ones(len(prompt), layer.generated + hidden.shape[1])
            valid = torch.cat([prompt, tail.to(hidden.device)], dim=1)
            self.masks[key] = causal_mask(self.decoder, hidden, valid)
        return self.masks[key]

    def _rope(self, layer: PromptLayer, call: Call) -> Rope:
        """Return the rotary positions of this step's slots, moved back by what was cut."""
        key = id(layer.shift), call.hidden.device
        if key not in self.ropes:
            assert layer.shift is not None
            positions = call.positions.to(call.hidden.device) - layer.shift.to(call.hidden.device)[:, None]
            self.ropes[key] = self.decoder.rotary_emb(call.hidden, positions)  # type: ignore[operator]
        return self.ropes[key]

    def _cut_caches(self, before: PrefillState, keep: Tensor, cache: DynamicCache | None) -> None:
        """Keep, bool (B, n) of the slots that this layer was handed, in the caches of the layers behind."""
        here = before.valid
        if any(valid.shape != here.shape or not torch.equal(valid.to(here.device), here) for valid, _ in self.past):
            raise ConfigError("full_depth needs layers behind that all saw what this one sees: prune at one depth")
        slots, valid = pack(keep)
        if cache is not None:
            take_slots(cache, len(self.past), slots)
        self.past = [(valid, shift) for _, shift in self.past]
        self.run.cached = [valid.sum(dim=1)] * len(self.past)

    def _record(self, before: PrefillState, state: PrefillState) -> None:
        same = bool(self.run.kept) and state.valid is before.valid
        self.run.kept.append(self.run.kept[-1] if same else state.kept)
        self.run.slots.append(self.run.slots[-1] if same else state.valid.sum(dim=1))
        self.run.cached.append(self.run.slots[-1])
