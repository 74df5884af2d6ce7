"""FastV: visual tokens that the last token of the prompt hardly attends to are dropped before decoder layer K.

"An Image is Worth 1/2 Tokens After Layer 2", Sec. 4. The importance is the attention of layer K - 1, averaged over
heads; original positions are kept, and tokens are dropped once, in the prefill, as in the release that has a key-value
cache (the first release prunes anew for every generated token). The paper averages attention over all queries, its code
takes the last query alone: `query` has both. Kept are max(1, int(ratio * M)) tokens; the release rounds the count of
LLaVA's 576 half to even.

Before the first layer nothing has been attended to. The release's K = 0 therefore drops tokens at random, which here is
`Guided` with a `RandomGuide`. Ours scores in a pass of its own up to the scoring layer and prunes the run after it: the
vision tower and `score_layer - 1` decoder layers run twice. Papers with rows at L = 0 do not say how they score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgp_lightning.attention import coming_parts, coming_rows
from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.decoder_call import Call, Rope, without_cache
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["FastV", "attention_received"]

Query = Literal["last", "all"]
# Attention weights that are in memory at a time.
_AT_ONCE = 2**24


class FastV(Pruner):
    """Keeps the visual tokens that get the most attention in an early layer.

    Args:
        layer: K, the decoder layer before which the others are dropped; 0 takes a pass of its own to score.
        keep_ratio: share of each row's visual tokens that stay.
        query: whose attention counts: that of the prompt's last token (the code), or the mean of all (the paper).
        score_layer: the attention of the layer before this one counts; K by default, and 2 for K = 0. If it is beyond
            K, scores come from a pass of their own.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self, layer: int = 2, keep_ratio: float = 0.5, query: Query = "last", score_layer: int | None = None
    ) -> None:
        super().__init__()
        self._check_ratio(keep_ratio)
        self.score_layer = (layer or 2) if score_layer is None else score_layer
        if layer < 0 or self.score_layer < 1:
            raise ConfigError(f"layer must be at least 0 and score_layer at least 1, got {layer} and {score_layer}")
        if query not in ("last", "all"):
            raise ConfigError(f"query must be last or all, got {query!r}")
        self.layers, self.keep_ratio, self.query = (layer,), keep_ratio, query
        self._score: Callable[[Tensor, Rope, Tensor], Tensor] | None = None
        self._scores: Tensor | None = None
        self._rows = 1

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        """Look at the scoring layer, before the run if its attention comes too late."""
        if self.score_layer > len(vlm.decoder_layers):
            raise ConfigError(f"score_layer is {self.score_layer}, the model has {len(vlm.decoder_layers)} layers")
        score = partial(attention_received, vlm.decoder_layers[self.score_layer - 1], query=self.query)
        self._scores = None
        self._rows = len(inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"])
        try:
            if self.score_layer > self.layers[0]:
                self._scores = _score_alone(vlm, self.score_layer - 1, inputs, score)
            else:
                self._score = score
            yield
        finally:
            self._score = None

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Score before the scoring layer, drop before layer K."""
        # Beams and returned sequences of a row are alike until the first token.
        one = slice(None, None, len(state.hidden) // self._rows)
        if self._score is not None and depth == self.score_layer - 1:
            self._scores = self._score(state.hidden[one], (state.rope[0][one], state.rope[1][one]), state.valid[one])
        if (depth,) != self.layers:
            return state
        assert self._scores is not None
        importance = state.to_tokens(state.expand(self._scores))
        self.importance = importance[one]
        return state.keep_tokens(keep_top(importance, self.keep_ratio))


@torch.no_grad()
def attention_received(layer: Any, hidden: Tensor, rope: Rope, valid: Tensor, query: Query = "last") -> Tensor:  # noqa: ANN401
    """Return the attention that slots are about to get in a decoder layer, averaged over heads.

    Args:
        layer: the decoder layer.
        hidden: its input (B, N, d).
        rope: the slots' rotary positions.
        valid: bool (B, N), False on padding, which lies on the left.
        query: `last` for the attention of the last slot, `all` for the mean over all.

    Returns:
        Float32 (B, N).

    Raises:
        ConfigError: if a row ends with padding.
    """
    if not bool(valid[:, -1].all()):
        raise ConfigError("the last slot of a row is padding, so no query is there to ask: pad prompts on the left")
    if query == "last":
        return coming_rows(layer, hidden, rope, valid)[:, :, 0].mean(dim=1)
    parts = coming_parts(layer, hidden, rope, valid, valid.shape[1], _AT_ONCE)
    total = torch.stack([rows.mean(dim=1).sum(dim=1) for rows in parts]).sum(dim=0)
    return total / valid.sum(dim=1, keepdim=True).to(total.device)


class _EnoughError(Exception):
    """Ends the scoring pass: all it was for is known."""


@torch.no_grad()
def _score_alone(vlm: VLM, depth: int, inputs: Mapping[str, Any], score: Callable[..., Tensor]) -> Tensor:
    """Run the model up to a layer and return the slots' scores there, (B, N)."""
    mask = inputs.get("attention_mask")
    found = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(layer, args, kwargs)
        valid = torch.ones(call.hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        found.append(score(call.hidden, call.rope, valid.to(call.hidden.device)))
        raise _EnoughError

    handle = vlm.decoder_layers[depth].register_forward_pre_hook(look, with_kwargs=True)
    try:
        vlm.model(**without_cache({name: value for name, value in inputs.items() if name != "labels"}))
    except _EnoughError:
        pass
    finally:
        handle.remove()
    return found[0]
