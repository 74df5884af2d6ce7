"""From a request to what a model is called with, and from what it generates to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.processor import PromptOrder
from pgp_lightning.vlm.request import Request

__all__ = ["answer_lengths", "generate", "next_turn", "prompt_inputs", "read_answers"]


def prompt_inputs(
    vlm: VLM, request: Request, order: PromptOrder = "image_first", features: Tensor | None = None
) -> dict[str, Any]:
    """Build prompts that end where the answers begin, for `generate` or a forward pass.

    Args:
        vlm: the model.
        request: B questions; a row gets its own image's tiles.
        order: of question and image in the prompt; a family's own is `image_first`.
        features: visual tokens (T, n, d) of the request's tiles if they are there already; the vision tower then does
            not run.

    Returns:
        `input_ids` and `attention_mask`, int64 (B, N), padded on the left, and pixels or features of each row.

    Raises:
        ConfigError: if the request was tiled by another rule, a question holds a placeholder of images, or a prompt is
            longer than the model was made for.
    """
    rule = vlm.processor.rule
    size, side = request.tiles.shape[-1], {grid.tokens_per_side for grid in request.grids}
    if size != rule.tile_size or side != {rule.tokens_per_side}:
        raise ConfigError(
            f"{vlm.base} takes tiles of {rule.tile_size} pixels and {rule.tokens_per_side} tokens a side, the request "
            f"has {size} and {sorted(side)}: tile the images by the answer model's rule, and pair it with a guide of "
            "its family"
        )
    context, pad = vlm.processor.context_id, vlm.processor.stop_id
    asked = zip(request.questions, request.systems, strict=True)
    prompts = [vlm.processor.prompt(question, None, order, system) for question, system in asked]
    rows = [[*p.before, *[context] * n, *p.after] for p, n in zip(prompts, request.counts, strict=True)]
    width = max(map(len, rows))
    vlm.processor.check_length(width)
    device = request.tiles.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    tiles = tiles_of_rows(request)
    if features is None:
        return inputs | {"pixel_values": vlm.normalise(request.tiles[tiles], vlm.model.dtype)}
    pooled = vlm.as_features(features[tiles])
    # A new object every time: `generate` repeats what is in it for beams.
    return inputs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def tiles_of_rows(request: Request) -> Tensor:
    """Return the tiles of every row's image, one row after the other: int64 indices into the request's tiles."""
    starts = [0]
    for grid in request.grids:
        starts.append(starts[-1] + grid.tiles)
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in request.images]).to(request.tiles.device)


def next_turn(
    vlm: VLM, inputs: Mapping[str, Any], output: Mapping[str, Any], questions: Sequence[str]
) -> dict[str, Any]:
    """Build the next turn of a chat, behind what `generate` answered; the prompt stays in the cache.

        with pruned(model, pruner, inputs, request):
            first = model.generate(**inputs, return_dict_in_generate=True)
            second = model.generate(**next_turn(vlm, inputs, first, ["and the other one?"]))

    Args:
        vlm: the model.
        inputs: what the prompt was, from `prompt_inputs`, or from `next_turn` for a third turn.
        output: what `generate` returned with `return_dict_in_generate=True`.
        questions: one for each row of it.

    Returns:
        `input_ids` and `attention_mask` of the whole conversation, int64 (B, N), and the cache. What stands behind an
        answer that ended before others is padding.

    Raises:
        ConfigError: if the output has no cache or comes from beam search, a question holds a placeholder of images, or
            the conversation is longer than the model was made for.
    """
    processor, ids, prompt = vlm.processor, output["sequences"], inputs["attention_mask"].shape[1]
    if output.get("beam_indices") is not None:
        raise ConfigError(
            "beam search leaves a cache of its beams, which are not the sequences that it returns: answer with "
            "num_beams=1 where a next turn is to follow"
        )
    if len(questions) != len(ids):
        raise ConfigError(f"{len(ids)} answers take as many questions, got {len(questions)}")
    answers, stop = ids[:, prompt:], processor.stop_id
    ended = answers == stop
    mask = inputs["attention_mask"].repeat_interleave(len(ids) // len(inputs["attention_mask"]), dim=0)
    # The first stop token belongs to the answer; an answer that was broken off gets its own now.
    kept = ended.cumsum(dim=1) - ended.long() == 0
    broken = (~ended.any(dim=1)).tolist()
    turns = [[stop] * cut + processor.next_turn(question) for cut, question in zip(broken, questions, strict=True)]
    width = max(map(len, turns))
    new = ids.new_tensor([[stop] * (width - len(turn)) + turn for turn in turns])
    there = mask.new_tensor([[0] * (width - len(turn)) + [1] * len(turn) for turn in turns])
    mask = torch.cat([mask, kept.to(mask), there], dim=1)
    processor.check_length(int(mask.sum(dim=1).max()), "the conversation")
    return {
        "input_ids": torch.cat([ids, new], dim=1),
        "attention_mask": mask,
        cache_keyword(vlm.model): cache_of_output(output),
    }


@torch.no_grad()
def generate(vlm: VLM, inputs: dict[str, Any], max_new_tokens: int = 16) -> Tensor:
    """Generate greedily: int64 (B, n) new tokens; a row goes on with stop tokens after its first."""
    stop, prompt = vlm.processor.stop_id, inputs["input_ids"].shape[1]
    tokens: Tensor = vlm.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=stop, pad_token_id=stop
    )
    return tokens[:, prompt:]


def answer_lengths(tokens: Tensor, stop: int) -> list[int]:
    """Return how many of a row's generated tokens (B, n) are its answer, its first stop token included."""
    return [row.index(stop) + 1 if stop in row else len(row) for row in tokens.tolist()]


def read_answers(vlm: VLM, tokens: Tensor) -> list[str]:
    """Return the text of each row (B, n) up to its stop token."""
    stop, answers = vlm.processor.stop_id, []
    for row, length in zip(tokens.tolist(), answer_lengths(tokens, stop), strict=True):
        ids = [token for token in row[:length] if token != stop]
        answers.append(str(vlm.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return answers
