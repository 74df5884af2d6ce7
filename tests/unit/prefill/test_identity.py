"""Pruning nothing changes no bit; pruning before the first layer is what shortened inputs give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pgp_lightning.attention import watch_attention
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from tests.pairwise import pairwise
from tests.tiny import QUESTIONS, row_of
from tests.unit.prefill.made import (
    FAMILIES,
    LAYERS,
    STEPS,
    Given,
    Masks,
    ask,
    flashing,
    random_masks,
    shared,
    slots_of,
    without_stop,
)

NOTHING = {
    "keeps all": KeepAll,
    "the default": Pruner,
    "all at 0": lambda: Guided(Given(), 0, 1.0),
    "all at 2": lambda: Guided(Given(), 2, 1.0),
    "masks of all": lambda: Masks({0: torch.ones(1, 20).bool(), 3: torch.ones(1, 20).bool()}),
}


def same(ours: Any, theirs: Any) -> bool:
    """Say whether two outputs of `generate` are equal to the bit: tokens, logits and caches."""
    pairs = [(ours.sequences, theirs.sequences), *zip(ours.logits, theirs.logits, strict=True)]
    for a, b in zip(cache_of_output(ours).layers, cache_of_output(theirs).layers, strict=True):
        pairs += [(a.keys, b.keys), (a.values, b.values)]
    return all(torch.equal(a, b) for a, b in pairs)


@pairwise(name=NOTHING, family=FAMILIES, rows=[1, 3], attention=["sdpa", "eager"])
def test_pruning_nothing_changes_no_bit(name: str, family: str, rows: int, attention: str):
    vlm = shared(family, attention)
    request = ask(vlm) if rows == 3 else row_of(ask(vlm), 0)
    inputs = prompt_inputs(vlm, request)
    pruner = NOTHING[name]()
    if isinstance(pruner, Masks):
        pruner.masks = {depth: mask.expand(rows, -1) for depth, mask in pruner.masks.items()}
    with pruned(vlm, pruner, inputs, request) as run:
        ours = without_stop(vlm, inputs)
    assert same(ours, without_stop(vlm, inputs))
    assert [kept.sum(dim=1).tolist() for kept in run.kept] == [request.counts] * LAYERS
    assert [slots.tolist() for slots in run.slots] == [inputs["attention_mask"].sum(dim=1).tolist()] * LAYERS


def shortened(vlm: VLM, inputs: dict[str, Any], keep: Tensor, positions: bool) -> dict[str, Any]:
    """Build inputs that never held what is not kept, bool (B, M), row by row, padded on the left."""
    slots = slots_of(vlm, inputs, keep)
    counts = slots.sum(dim=1).tolist()
    width, numbers = max(counts), inputs["attention_mask"].cumsum(dim=1) - 1
    short = {
        "input_ids": torch.full((len(slots), width), vlm.processor.stop_id),
        "attention_mask": torch.zeros(len(slots), width, dtype=torch.long),
        "position_ids": torch.zeros(len(slots), width, dtype=torch.long),
    }
    for row, count in enumerate(counts):
        for name, source in (("input_ids", inputs["input_ids"]), ("position_ids", numbers)):
            short[name][row, width - count :] = source[row, slots[row]]
        short["attention_mask"][row, width - count :] = 1
    features = vlm.encode(inputs["pixel_values"]).flatten(0, 1)
    visual = inputs["input_ids"] == vlm.model.config.image_token_id
    pooled = vlm.as_features(features[slots[visual]][None])
    short["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}
    return short if positions else {k: v for k, v in short.items() if k != "position_ids"}


@pairwise(family=FAMILIES, renumber=[False, True], rows=[1, 4])
@torch.no_grad()
def test_pruning_before_the_first_layer_equals_shortened_inputs(family: str, renumber: bool, rows: int):
    vlm = shared(family)
    request = ask(vlm, QUESTIONS, images=(0, 1, 2, 0))
    request = row_of(request, 2) if rows == 1 else request
    inputs, keep = prompt_inputs(vlm, request), random_masks(request, 0.5)
    assert rows == 1 or len(set(keep.sum(dim=1).tolist())) > 1
    with pruned(vlm, Masks({0: keep}, renumber=0 if renumber else None), inputs, request):
        ours = without_stop(vlm, inputs)
    short = shortened(vlm, inputs, keep, positions=not renumber)
    theirs = without_stop(vlm, short)
    assert torch.equal(ours.sequences[:, -STEPS:], theirs.sequences[:, -STEPS:])
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=2e-6)
    # The other numbering is another model: the comparison can tell them apart.
    other = without_stop(vlm, shortened(vlm, inputs, keep, positions=renumber))
    assert bool((ours.logits[0] - other.logits[0]).abs().max() > 0.01)


@torch.no_grad()
def test_shortened_embeddings_with_positions_are_the_same_again():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs, keep = prompt_inputs(vlm, request), random_masks(request, 0.5)
    with pruned(vlm, Masks({0: keep}), inputs, request):
        ours = without_stop(vlm, inputs)
    short = shortened(vlm, inputs, keep, positions=True)
    ids = short.pop("input_ids")
    embeddings = vlm.model.get_input_embeddings()(ids)
    embeddings[ids == vlm.model.config.image_token_id] = short.pop("mm_encoder_outputs")["image"].pooler_output[0]
    theirs = without_stop(vlm, {**short, "inputs_embeds": embeddings})
    assert torch.equal(ours.sequences[:, -STEPS:], theirs.sequences[:, -STEPS:])
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@torch.no_grad()
def test_attention_in_a_layer_with_a_cut_prompt_is_that_of_shortened_inputs(
    attention: str, rows: int, flash_kernels: None
):
    vlm = flashing("llava") if attention == "flash_attention_2" else shared("llava", attention)
    request = ask(vlm, QUESTIONS, images=(0, 1, 2, 0))
    request = row_of(request, 2) if rows == 1 else request
    inputs, keep = prompt_inputs(vlm, request), random_masks(request, 0.5)
    seen: list[Tensor] = []
    with (
        pruned(vlm, Masks({0: keep}), inputs, request),
        watch_attention(vlm.decoder_layers[2].self_attn, seen.append),
    ):
        without_stop(vlm, inputs)
    eager = shared("llava", "eager")
    paid = without_stop(eager, shortened(eager, inputs, keep, positions=True), output_attentions=True).attentions
    assert len(seen) == len(paid) == STEPS
    for ours, theirs in zip(seen, paid, strict=True):
        torch.testing.assert_close(ours, theirs[2][:, :, -1:], rtol=0, atol=1e-6)
