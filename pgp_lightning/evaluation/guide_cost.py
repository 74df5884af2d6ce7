"""What finding out which tokens to keep costs, in FLOPs: guides, and pruners that run a pass of their own.

A guide or pruner of your own says so with `@guide_flops.register` or `@scoring_flops.register`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from pgp_lightning.evaluation.flops import (
    Decoder,
    attention_flops,
    layer_flops,
    posterior_flops,
    projector_flops,
    vision_flops,
)
from pgp_lightning.guides.attention import AttentionGuide
from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion
from pgp_lightning.prefill import Pruner
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.request import Request

__all__ = ["guide_flops", "scoring_flops"]


@singledispatch
def scoring_flops(pruner: Pruner, vlm: VLM, request: Request, text: list[int]) -> list[int]:
    """Return the FLOPs that each row takes beside the answer model's own run, as if it came alone; 0 by default.

    Args:
        pruner: which has just pruned.
        vlm: the answer model.
        request: of B rows.
        text: slots of text in each row's prompt.
    """
    return [0] * len(request)


@scoring_flops.register
def _(pruner: Guided, vlm: VLM, request: Request, text: list[int]) -> list[int]:
    return guide_flops(pruner.guide, request)


@scoring_flops.register
def _(pruner: FastV, vlm: VLM, request: Request, text: list[int]) -> list[int]:
    config, found = vlm.model.config, []
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


@singledispatch
def guide_flops(guide: Guide, request: Request) -> list[int]:
    """Return the FLOPs of each row's scores, as if it came alone; a guide that runs no model costs nothing.

    Args:
        guide: which has just scored the request: what it generated counts.
        request: of B rows.
    """
    return [0] * len(request)


@guide_flops.register
def _(guide: Remember, request: Request) -> list[int]:
    return guide_flops(guide.guide, request)


@guide_flops.register
def _(guide: AnotherQuestion, request: Request) -> list[int]:
    return guide_flops(guide.guide, replace(request, questions=request.other_questions or request.questions))


@guide_flops.register
def _(guide: PosteriorGuide, request: Request) -> list[int]:
    rank, depth = guide.arguments["lora_rank"], guide.arguments["head_layers"]
    return [
        posterior_flops(
            guide.vlm.model.config,
            request.grids[image].tiles,
            len(guide.vlm.processor.prompt(question, None, guide.bottleneck_order).before),
            lora_rank=rank,
            head_layers=depth,
        )
        for question, image in zip(request.questions, request.images, strict=True)
    ]


@guide_flops.register
def _(guide: AttentionGuide, request: Request) -> list[int]:
    if guide.attended is None:
        raise RuntimeError("the guide has answered nothing yet")
    processor, found = guide.vlm.processor, []
    for row, (question, image) in enumerate(zip(request.questions, request.images, strict=True)):
        prompt, ids = processor.prompt(question, None, guide.order), guide.attended.tokens[row].tolist()
        steps = ids.index(processor.stop_id) + 1 if processor.stop_id in ids else len(ids)
        rows = {"prompt": len(prompt.after) + 1, "prompt_after_image": len(prompt.after), "answer": 1}[guide.rows]
        text, tiles = len(prompt.before) + len(prompt.after), request.grids[image].tiles
        found.append(attention_flops(guide.vlm.model.config, tiles, text, new_tokens=steps, rows=rows))
    return found
