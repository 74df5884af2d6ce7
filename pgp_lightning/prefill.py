"""Pruning an unmodified model: a pruner rewrites the decoder's prefill state before a layer, and hooks carry it out.

From the first layer whose prompt was cut, each decoder layer gets the remaining slots, their rotary positions and a
mask of its own; layers that see the whole prompt are left to the model, so that pruning nothing changes no bit. Each
layer's key-value cache then holds its own prompt. During decoding, a layer with a cut prompt gets a mask that suits
its own cache. Rows that keep different counts are padded on the left, so the last slot stays the last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill_state import PrefillState, pack
from pgp_lightning.vlm.decoder_call import Call, Rope, causal_mask, held_slots, plain_cache, take_slots
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.loading import as_vlm
from pgp_lightning.vlm.request import Request

__all__ = ["KeepAll", "Pruner", "Run", "pruned"]


class Pruner(nn.Module):
    """Rewrites the prefill state before decoder layers; this one leaves it alone.

    Attributes:
        keep_ratio: share of each row's visual tokens that stay after the last of `layers`.
        layers: the depths at which the state is rewritten; 0 is before the first decoder layer.
        importance: float32 (B, M), what the last run ranked visual tokens by, -inf on padding; None if it ranks none.
        reads_vision_tower: whether the vision tower has to run inside `pruned`, so that features computed before do not
            do.
        skip_tiles: whether tiles without a kept token pass the vision tower by.
    """

    keep_ratio: float = 1.0
    layers: tuple[int, ...] = ()
    importance: Tensor | None = None
    reads_vision_tower: bool = False
    skip_tiles: bool = False

    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> AbstractContextManager[object]:
        """Prepare a run, and take back afterwards what was attached to the model.

        Args:
            vlm: the answer model.
            inputs: what it will be called with.
            request: the questions and tiles that they were made of.
        """
        return nullcontext()

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Return what decoder layer `depth` shall see."""
        return state

    def at(self, keep_ratio: float) -> Pruner:
        """Return this pruner with another budget; both share their modules."""
        self._check_ratio(keep_ratio)
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.keep_ratio = keep_ratio
        return other

    @staticmethod
    def _check_ratio(keep_ratio: float) -> None:
        if not 0 < keep_ratio <= 1:
            raise ConfigError(f"keep_ratio, the share of visual tokens to keep, must be in (0, 1], got {keep_ratio}")


class KeepAll(Pruner):
    """Keeps every visual token: the full model."""


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


@contextmanager
def pruned(
    model: Any,  # noqa: ANN401 (transformers' classes, peft's, ours)
    pruner: Pruner,
    inputs: Mapping[str, Any],
    request: Request | None = None,
    visual: Tensor | None = None,
) -> Iterator[Run]:
    """While open, calls of the model, `generate` among them, prune these inputs; the model itself stays as it is.

        with pruned(model, pruner, inputs, request):
            model.generate(**inputs)

    Args:
        model: a `VLM`, transformers' InternVL or LLaVA, or a `PeftModel` around one.
        pruner: what to drop, and where.
        inputs: what the model will be called with: `input_ids` and `attention_mask`, padded on the left to generate.
        request: the same questions as strings and tiles, for pruners whose guide reads them.
        visual: bool (B, N), the slots of visual tokens, where `inputs` holds embeddings in place of ids.

    Yields:
        A `Run`, filled by every prefill.

    Raises:
        ConfigError: if the model cannot be pruned in this way, or inputs, request and pruner do not fit each other.
    """
    vlm = model if isinstance(model, VLM) else as_vlm(model)
    layers = vlm.decoder_layers
    config: Any = vlm.decoder.config
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"pruning needs full attention in every decoder layer, got {', '.join(sorted(kinds))}")
    if beyond := [depth for depth in pruner.layers if not 0 <= depth < len(layers)]:
        raise ConfigError(f"cannot prune before layer {beyond[0]}: the model has the layers 0 to {len(layers) - 1}")
    driver = _Driver(vlm, pruner, *_rows(vlm, inputs, request, visual))
    with pruner.attached(vlm, inputs, request):
        hooks = [
            layer.register_forward_pre_hook(partial(driver.before, depth), with_kwargs=True)
            for depth, layer in enumerate(layers)
        ]
        try:
            yield driver.run
        finally:
            for hook in hooks:
                hook.remove()


def _rows(vlm: VLM, inputs: Mapping[str, Any], request: Request | None, visual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which slots hold visual tokens and which are no padding: bool (B, N) each.

    Raises:
        ConfigError: if they cannot be told, or do not fit the request.
    """
    if visual is None:
        if inputs.get("input_ids") is None:
            raise ConfigError("inputs without input_ids do not say where visual tokens are: pass visual=, bool (B, N)")
        visual = vlm.visual_slots(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(visual) if mask is None else mask.to(visual.device)
    if valid.shape != visual.shape:
        raise ConfigError(
            f"the prompt has {tuple(visual.shape)} slots and the attention mask is {tuple(valid.shape)}: pass a mask "
            "of the prompt alone; pruning cannot go on from a cache"
        )
    visual, counts = visual & valid.bool(), (visual & valid.bool()).sum(dim=1).tolist()
    if 0 in counts:
        raise ConfigError(f"row {counts.index(0)} has no visual token: there is nothing to prune; leave it out")
    if request is not None and counts != request.counts:
        raise ConfigError(
            f"the prompts hold {counts} visual tokens and the request's images {request.counts}: tile the images by "
            "one rule for both, or give the request that these inputs were made of"
        )
    return visual, valid.bool()


class _Driver:
    """Carries a pruner's rewrites through the calls of a model."""

    def __init__(self, vlm: VLM, pruner: Pruner, visual: Tensor, valid: Tensor) -> None:
        self.decoder, self.pruner = vlm.decoder, pruner
        self.visual, self.valid = visual, valid
        self.run = Run()
        self.prefill = True
        self.past: list[tuple[Tensor, Tensor | None]] = []

    def before(
        self, depth: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand a decoder layer what it shall see."""
        call = Call(layer, args, kwargs)
        cache = call.cache
        if depth == 0:
            self.ropes: dict[tuple[int, torch.device], Rope] = {}
            self.prefill = cache is None or held_slots(cache, 0) == 0
            if self.prefill:
                self._begin(call)
            elif not self.past:
                raise ConfigError("the cache holds a prompt already: open pruned() before its prefill")
        return self._prefill(depth, call) if self.prefill else self._decode(depth, call)

    def _begin(self, call: Call) -> None:
        plain_cache(call.cache)
        hidden = call.hidden
        copies = len(hidden) // len(self.visual)
        visual = self.visual.to(hidden.device).repeat_interleave(copies, dim=0)
        if visual.shape != hidden.shape[:2]:
            raise ConfigError(
                f"the prompt has {tuple(self.visual.shape)} slots and the decoder got {tuple(hidden.shape[:2])}: "
                "prefill in chunks, generation without a cache and other inputs than pruned() was given do not work"
            )
        self.whole = self.valid.to(hidden.device).repeat_interleave(copies, dim=0)
        positions = call.positions.expand(visual.shape)
        self.past = []
        for record in (self.run.kept, self.run.slots, self.run.cached):
            record.clear()
        self.mask: Tensor | None = None
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

    def _prefill(self, depth: int, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = call.hidden
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

    def _decode(self, depth: int, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt, shift = self.past[depth]
        if prompt is self.whole and shift is None:
            return None
        hidden, cache = call.hidden, call.cache
        new = held_slots(cache, depth) + hidden.shape[1] - prompt.shape[1]
        if len(prompt) != len(hidden):
            raise ConfigError(f"the prefill had {len(prompt)} rows, this step has {len(hidden)}")
        prompt = prompt.to(hidden.device)
        valid = torch.cat([prompt, prompt.new_ones(len(prompt), new)], dim=1)
        mask = causal_mask(self.decoder, hidden, valid, cache, depth)
        if shift is None and self.past[0][0] is self.whole:
            return call.rewritten(mask=mask)
        return call.rewritten(mask=mask, rope=self._rope(hidden, new, shift))

    def _rope(self, hidden: Tensor, new: int, shift: Tensor | None) -> Rope:
        """Return the rotary positions of this step's tokens, the last of `new` ones behind the prompt.

        Called without positions, a model takes the length of its first layer's cache for them, which may be cut.
        """
        key = id(shift), hidden.device
        if key not in self.ropes:
            first = self.state.next_position if shift is None else self.state.next_position - shift
            steps = torch.arange(new - hidden.shape[1], new, device=hidden.device)
            positions = first.to(hidden.device)[:, None] + steps
            self.ropes[key] = self.decoder.rotary_emb(hidden, positions)  # type: ignore[operator]
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
