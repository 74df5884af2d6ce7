"""VisionZip: the vision tower's own attention says which visual tokens dominate; of the others some absorb the rest.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025), Sec. 3. In every tile the tokens
with the most attention in one layer of the tower are *dominant*. Of the others some, evenly spaced, become targets, and
each remaining one is merged into the target whose key is most like its own: *contextual* tokens. All of it happens in
the tower, so the question has no say.

Where a visual token is one patch (LLaVA), scores are the class token's attention and merging happens on the projector's
input, as released. Where it is a cell of patches (InternVL, for which there is no release), scores are column means
pooled over the cell and merging happens on the projector's output, as in the authors' port to Qwen2.5-VL and in
EffiVLM-Bench's to InternVL; that port averages logits where we average attention.

We differ: the release sends the class token along as one of its dominant tokens and appends contextual tokens behind
them. Here k tokens are k patches (or cells), each at its place in the image, so budgets compare; positions are original
unless `renumber`. And an image's budget is exact, split among its tiles, where ports round down twice in every tile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.contextual import Choice, merge, select, split_budget
from pgp_lightning.pruners.vision_attention import by_row, class_attention, column_means, mean_keys, pool_cells
from pgp_lightning.selection import equal_shares, keep_count
from pgp_lightning.vlm.decoder_call import Call
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["VisionZip"]


class VisionZip(Pruner):
    """Keeps what the vision tower attends to, and a summary of the rest.

    Args:
        keep_ratio: share of each image's visual tokens that stay, dominant and contextual; tiles get equal shares.
        contextual_share: how much of that is contextual; 0 leaves merging out.
        layer: whose attention counts, by its index in the vision tower; -2 is also where LLaVA's features come from.
        score: `class` for the attention that the class token pays, `column` for the mean over all queries. By default
            the class token's where a visual token is one patch.
        merge_at: `input` or `output` of the projector. By default its input where a visual token is one patch.
        renumber: count positions again after the cut, as the release does.

    Raises:
        ConfigError: if an argument is out of range.
    """

    reads_vision_tower = True

    def __init__(
        self,
        keep_ratio: float = 0.2,
        contextual_share: float = 1 / 6.4,
        layer: int = -2,
        score: Literal["class", "column"] | None = None,
        merge_at: Literal["input", "output"] | None = None,
        renumber: bool = False,
    ) -> None:
        super().__init__()
        self._check_ratio(keep_ratio)
        if not 0 <= contextual_share < 1:
            raise ConfigError(f"contextual_share must be in [0, 1), got {contextual_share}")
        if score not in ("class", "column", None) or merge_at not in ("input", "output", None):
            raise ConfigError(f"score is class or column, merge_at input or output; got {score!r} and {merge_at!r}")
        self.layers, self.keep_ratio = (0,), keep_ratio
        self.contextual_share, self.layer, self.renumber = contextual_share, layer, renumber
        self.score, self.merge_at = score, merge_at
        self.keep: Tensor | None = None
        self._choices: list[Choice] = []
        self._merge_now = "output"

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        """Watch the vision tower's layer, and merge in front of the projector or behind it."""
        if inputs.get("pixel_values") is None or inputs.get("input_ids") is None:
            raise ConfigError("VisionZip looks into the vision tower: it needs pixel_values and input_ids, no features")
        counts = vlm.visual_slots(inputs["input_ids"]).sum(dim=1).tolist()
        attention = vlm.vision_attention(self.layer)
        self.keep = None
        seen = threading.local()  # several threads may encode the picture at once

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.hidden = Call(module, args, kwargs).hidden

        def before(projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._choose(attention, vars(seen).pop("hidden"), args[0].shape[1], counts)
            return (self._merge(args[0], "input"), *args[1:])

        def after(projector: nn.Module, args: object, output: Tensor) -> Tensor:
            return self._merge(output, "output")

        hooks = (
            attention.register_forward_pre_hook(look, with_kwargs=True),
            vlm.projector.register_forward_pre_hook(before),
            vlm.projector.register_forward_hook(after),
        )
        try:
            yield
        finally:
            self._choices = []
            for hook in hooks:
                hook.remove()

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Drop what is neither dominant nor contextual, before the first layer."""
        if depth != 0:
            return state
        if self.keep is None:
            raise ConfigError("the vision tower did not run: call the model with the pixel_values given to pruned()")
        kept = state.keep_tokens(state.expand(self.keep))
        return kept.renumber() if self.renumber else kept

    @torch.no_grad()
    def _choose(self, attention: nn.Module, hidden: Tensor, tokens: int, counts: list[int]) -> None:
        """Choose in all tiles, given the watched layer's input (T, 1 + P, C)."""
        if sum(counts) != len(hidden) * tokens:
            raise ConfigError(f"{len(hidden)} tiles came for {counts} visual tokens: use the inputs given to pruned()")
        patches = hidden.shape[1] - 1
        by_class = self.score == "class" or (self.score is None and patches == tokens)
        scores = pool_cells((class_attention if by_class else column_means)(attention, hidden), tokens)
        keys = pool_cells(mean_keys(attention, hidden), tokens)
        shares = [k for n in counts for k in equal_shares(keep_count(n, self.keep_ratio), n // tokens)]
        splits = [split_budget(share, self.contextual_share) for share in shares]
        self._choices = [select(score, key, *split) for score, key, split in zip(scores, keys, splits, strict=True)]
        self._merge_now = self.merge_at or ("input" if patches == tokens else "output")
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for tile, choice in zip(keep, self._choices, strict=True):
            tile[choice.dominant] = tile[choice.targets] = True
        self.keep, self.importance = by_row(keep, counts, False), by_row(scores, counts, -torch.inf)

    def _merge(self, tokens: Tensor, where: str) -> Tensor:
        """Merge tiles (T, n, C), if this is where it is done."""
        if where != self._merge_now:
            return tokens
        choices = [Choice(*(part.to(tokens.device) for part in choice)) for choice in self._choices]
        return torch.stack([merge(tile, choice) for tile, choice in zip(tokens, choices, strict=True)])
