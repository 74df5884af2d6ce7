"""What finding out which tokens to keep costs, in FLOPs: guides, and pruners that run a pass of their own.

A guide or pruner of your own says so with `@guide_flops.register` or `@scoring_flops.register`. If it does not, and has
parameters, its costs are unknown: None.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from torch import nn
from transformers import LlavaConfig

from pgp_lightning.evaluation.flops import (
    Decoder,
    attention_flops,
    layer_flops,
    posterior_flops,
    projector_flops,
    vision_flops,
    vision_row_flops,
)
from pgp_lightning.guides.attention import AttentionGuide
from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion
from pgp_lightning.prefill import Pruner
from pgp_lightning.pruners.contextual import split_budget
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.selection import _CHUNK, equal_shares, keep_count
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import answer_lengths
from pgp_lightning.vlm.memory import tokens_per_tile
from pgp_lightning.vlm.request import Request

__all__ = ["guide_flops", "scoring_flops"]


@singledispatch
def scoring_flops(pruner: Pruner, vlm: VLM, request: Request, text: list[int]) -> list[int | None]:
    """Return the FLOPs that each row takes beside the answer model's own run, as if it came alone.

    Of a pruner that is not registered they are 0, or None, unknown, if it has parameters.

    Args:
        pruner: which has just pruned.
        vlm: the answer model.
        request: of B rows.
        text: slots of text in each row's prompt.
    """
    return _unregistered(pruner, request)


@scoring_flops.register
def _(pruner: Guided, vlm: VLM, request: Request, text: list[int]) -> list[int | None]:
    return guide_flops(pruner.guide, request)


@scoring_flops.register
def _(pruner: FastV, vlm: VLM, request: Request, text: list[int]) -> list[int | None]:
    config, found = vlm.model.config, list[int | None]()
    for slots, image in zip(text, request.images, strict=True):
        grid = request.grids[image]
        prompt = slots + grid.tokens
        cost = Decoder(config).rows(1 if pruner.query == "last" else prompt, prompt, project=True)
        if pruner.score_layer > pruner.layers[0]:
            # A pass of its own: the layers before the scoring one, behind the vision tower, once more.
            cost += layer_flops(config, prompt) * (pruner.score_layer - 1)
            cost += vision_flops(config, grid.tiles) + projector_flops(config, grid.tiles)
        found.append(cost)
    return found


@scoring_flops.register
def _(pruner: DivPrune, vlm: VLM, request: Request, text: list[int]) -> list[int | None]:
    width, found = Decoder(vlm.model.config).width, list[int | None]()
    for image in request.images:
        tokens = request.grids[image].tokens
        size = tokens if pruner.scope == "image" else request.grids[image].tokens_per_side ** 2
        # A pair's similarity once, up to blocks of rows; then a column for each token chosen, the last one apart.
        pairs = sum(min(_CHUNK, size - first) * (size - first) for first in range(0, size, _CHUNK))
        shares = [share for share in equal_shares(pruner.budget(tokens), tokens // size) if share]
        found.append(2 * width * sum(pairs + (share - 1) * size for share in shares))
    return found


@scoring_flops.register
def _(pruner: VisionZip, vlm: VLM, request: Request, text: list[int]) -> list[int | None]:
    config, found = vlm.model.config, list[int | None]()
    vision, tokens = config.vision_config, tokens_per_tile(config)
    whole = isinstance(config, LlavaConfig)  # a visual token is one patch, not a cell of them
    joined = 1 if whole else int(1 / config.downsample_ratio) ** 2
    heads = vision.hidden_size // vision.num_attention_heads
    by_class = pruner.score == "class" or (pruner.score is None and whole)
    at_input = pruner.merge_at == "input" or (pruner.merge_at is None and whole)
    width = joined * vision.hidden_size if at_input else Decoder(config).width
    for image in request.images:
        grid = request.grids[image]
        cost = vision_row_flops(config, grid.tiles, 1 if by_class else None)
        # Keys once more, to compare tokens by.
        cost += 2 * grid.tiles * tokens * joined * vision.hidden_size**2
        for share in equal_shares(keep_count(grid.tokens, pruner.keep_ratio), grid.tiles):
            dominant, contextual = split_budget(share, pruner.contextual_share)
            rest = tokens - dominant
            cost += 2 * min(contextual, rest) * (rest * heads + tokens * width)
        found.append(cost)
    return found


@singledispatch
def guide_flops(guide: Guide, request: Request) -> list[int | None]:
    """Return the FLOPs of each row's scores, as if it came alone.

    Of a guide that is not registered they are 0, or None, unknown, if it has parameters.

    Args:
        guide: which has just scored the request: what it generated counts.
        request: of B rows.
    """
    return _unregistered(guide, request)


@guide_flops.register
def _(guide: Remember, request: Request) -> list[int | None]:
    return guide_flops(guide.guide, request)


@guide_flops.register
def _(guide: AnotherQuestion, request: Request) -> list[int | None]:
    return guide_flops(guide.guide, replace(request, questions=request.other_questions or request.questions))


@guide_flops.register
def _(guide: PosteriorGuide, request: Request) -> list[int | None]:
    rank, depth = guide.arguments["lora_rank"], guide.arguments["head_layers"]
    return [
        posterior_flops(
            guide.vlm.model.config,
            request.grids[image].tiles,
            len(guide.vlm.processor.prompt(question, None, guide.bottleneck_order, system).before),
            lora_rank=rank,
            head_layers=depth,
        )
        for question, image, system in zip(request.questions, request.images, request.systems, strict=True)
    ]


@guide_flops.register
def _(guide: AttentionGuide, request: Request) -> list[int | None]:
    if guide.attended is None:
        raise RuntimeError("the guide has answered nothing yet")
    processor, found = guide.vlm.processor, list[int | None]()
    lengths = answer_lengths(guide.attended.tokens, processor.stop_id)
    rows_asked = zip(request.questions, request.systems, request.images, lengths, strict=True)
    for question, system, image, steps in rows_asked:
        prompt = processor.prompt(question, None, guide.order, system)
        rows = {"prompt": len(prompt.after) + 1, "prompt_after_image": len(prompt.after), "answer": 1}[guide.rows]
        text, tiles = len(prompt.before) + len(prompt.after), request.grids[image].tiles
        found.append(attention_flops(guide.vlm.model.config, tiles, text, new_tokens=steps, rows=rows))
    return found


def _unregistered(module: nn.Module, request: Request) -> list[int | None]:
    """Return what is said of a module that nothing is known of: without parameters it runs no model."""
    # Quantised weights are buffers.
    cost = None if module.state_dict() else 0
    return [cost] * len(request)
