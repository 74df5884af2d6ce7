"""The inputs that `pruned` was given, recognised by what they hold when the model is called.

A pruner's scores belong to one batch. Ids and masks are compared once in a prefill, and pictures once where they are
encoded; each waits for the device once, layers and decoding never. What differs is refused by name, since a cut by
another batch's scores looks like any answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.decoder_call import ModelCall
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["Announced"]

_ANOTHER = "other inputs than pruned() was given"
_REMEDY = "scores belong to one batch, so open pruned() anew for every batch"


class Announced:
    """What a model will be called with.

    Args:
        vlm: the model.
        inputs: its inputs.
        request: the questions and tiles that they were made of.
        visual: bool (B, N), the slots of visual tokens, where `inputs` holds embeddings in place of ids.

    Attributes:
        visual: bool (B, N), the slots of visual tokens.
        valid: bool (B, N), the slots that are no padding.

    Raises:
        ConfigError: if it cannot be told which slots are visual, or inputs and request do not fit each other.
    """

    def __init__(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None, visual: Tensor | None) -> None:
        call = ModelCall(vlm.body, (), dict(inputs))
        ids, embeddings = call.ids, call.embeddings
        if visual is None:
            if ids is None:
                raise ConfigError(
                    "inputs without input_ids do not say where visual tokens are: pass visual=, bool (B, N)"
                )
            visual = vlm.visual_slots(ids)
        mask = call.mask
        valid = torch.ones_like(visual) if mask is None else mask.to(visual.device, torch.bool, copy=True)
        if valid.shape != visual.shape:
            raise ConfigError(
                f"the prompt has {tuple(visual.shape)} slots and the attention mask is {tuple(valid.shape)}: pass a "
                "mask of the prompt alone; pruning cannot go on from a cache"
            )
        visual = visual & valid
        counts = visual.sum(dim=1).tolist()
        if 0 in counts:
            raise ConfigError(f"row {counts.index(0)} has no visual token: there is nothing to prune; leave it out")
        if request is not None and counts != request.counts:
            raise ConfigError(
                f"the prompts hold {counts} visual tokens and the request's images {request.counts}: tile the images "
                "by one rule for both, or give the request that these inputs were made of"
            )
        self.visual, self.valid, self.counts, self.padded = visual, valid, counts, not bool(valid.all())
        # Copies, since whoever reuses a buffer for the next batch would be compared with himself.
        self.ids, self.embeddings, self.pixels = (
            None if part is None else part.detach().clone() for part in (ids, embeddings, call.pixels)
        )
        features = call.visual_tokens
        self.features = None if features is None else [part.detach().clone() for part in features]
        self.encoded: set[int] = set()

    def behind(self, call: ModelCall) -> int:
        """Return how many slots of a prefill follow the prompt, which has to be the one that was announced.

        Raises:
            ConfigError: if it is another one, or only a part of it.
        """
        slots, rows = self._slots(call)
        copies, width, given = len(rows) // len(self.visual), self.visual.shape[1], rows.shape[1]
        part = min(width, given)
        mask = self._mask(call, len(rows), given)
        alike = torch.stack([(rows[copy::copies, :part] == slots[:, :part]).all() for copy in range(copies)]).all()
        padding = None if mask is None else _repeated(self.valid, copies, mask)[:, :part] == mask[:, :part].bool()
        if not bool(alike if padding is None else alike & padding.all()):
            raise ConfigError(self._difference(bool(alike)))
        if given < width:
            raise ConfigError(
                f"the prompt of {width} slots comes in parts, the first of {given}: a pruner has to see all of it; "
                "leave prefill_chunk_size unset, or call the model with the whole prompt first"
            )
        return given - width

    def _slots(self, call: ModelCall) -> tuple[Tensor, Tensor]:
        """Return what stands in the announced slots, and what the model got, on its device."""
        for name, announced in (("ids", self.ids), ("embeddings", self.embeddings)):
            given = getattr(call, name)
            if given is not None and announced is not None:
                if len(given) % len(announced):
                    raise ConfigError(
                        f"{_ANOTHER}: it got {len(announced)} prompts and the model {len(given)}; {_REMEDY}"
                    )
                return announced.to(given.device), given.detach()
        kinds = {"ids": "input_ids", "embeddings": "inputs_embeds"}
        got = kinds["embeddings" if call.ids is None else "ids"]
        raise ConfigError(
            f"the model is called with {got}, which pruned() was not given, so nobody knows whether it is the same "
            "prompt: give pruned() what the model will be called with"
            + (" (prompt tuning turns ids into embeddings: it cannot be pruned)" if got == kinds["embeddings"] else "")
        )

    def _mask(self, call: ModelCall, rows: int, width: int) -> Tensor | None:
        mask: Tensor | None = call.mask
        if mask is None:
            # transformers drops a mask of ones.
            return torch.ones(rows, width, device=self.valid.device) if self.padded else None
        if getattr(mask, "ndim", None) != 2 or mask.shape != (rows, width):
            raise ConfigError(
                f"a prefill of {rows} rows and {width} slots takes an attention_mask of that shape, got "
                f"{tuple(getattr(mask, 'shape', ()))}: give the mask of padding, not one of who sees whom"
            )
        return mask

    def _difference(self, alike: bool) -> str:
        if alike:
            return (
                f"{_ANOTHER}: the attention_mask is another one; give pruned() and the model the same (where there is "
                "none, `generate` may make one up of pad tokens in the prompt)"
            )
        kind = "input_ids" if self.ids is not None else "inputs_embeds"
        return f"{_ANOTHER}: {kind} of the same kind and another content; {_REMEDY}"

    def pictures(self, call: ModelCall) -> None:
        """Compare features; pixels are compared where the vision tower gets them, which may have been before.

        Raises:
            ConfigError: if they are others, or missing, or of another kind.
        """
        features, pixels = call.visual_tokens, call.pixels
        if call.embeddings is not None and pixels is None and features is None:
            return  # pictures are in the embeddings
        encoded_now = pixels is not None or (features is not None and threading.get_ident() in self.encoded)
        known = "pixel_values" if encoded_now else "no picture" if features is None else "features of pictures"
        wanted = "no picture" if self.pixels is None else "pixel_values"
        wanted = wanted if self.features is None else "features of pictures"
        if known != wanted:
            raise ConfigError(
                f"pruned() was given {wanted} and the model is called with {known}: give pruned() everything that the "
                "model will be called with, pictures too"
            )
        if self.features is not None and not self._same_features(features, len(call.slots) // len(self.visual)):
            raise ConfigError(f"{_ANOTHER}: features of another picture; {_REMEDY}")

    def _same_features(self, given: Any, copies: int) -> bool:  # noqa: ANN401
        assert self.features is not None
        ours, theirs = (torch.cat([part.flatten(0, -2) for part in pooled]) for pooled in (self.features, given))
        if copies * len(ours) != len(theirs) or len(ours) != sum(self.counts):
            return False
        # A prompt's pictures are repeated together.
        repeated = [row for row in ours.to(theirs.device).split(self.counts) for _ in range(copies)]
        return torch.equal(torch.cat(repeated), theirs)

    def picture(self, pixels: Tensor | None) -> None:
        """Compare what the vision tower gets with the announced picture.

        Raises:
            ConfigError: if it is another one.
        """
        assert self.pixels is not None and pixels is not None
        if pixels.shape != self.pixels.shape:
            shapes = f"{tuple(self.pixels.shape)} were announced and the vision tower gets {tuple(pixels.shape)}"
            raise ConfigError(f"{_ANOTHER}: pixel_values of {shapes}; {_REMEDY}")
        if not torch.equal(self.pixels.to(pixels.device, pixels.dtype), pixels):
            raise ConfigError(f"{_ANOTHER}: pixel_values of another picture; {_REMEDY}")
        self.encoded.add(threading.get_ident())


def _repeated(values: Tensor, copies: int, like: Tensor) -> Tensor:
    return values.to(like.device).repeat_interleave(copies, dim=0)
