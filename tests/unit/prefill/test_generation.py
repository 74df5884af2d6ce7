"""Other ways to call a pruned model: beams, samples, embeddings, adapters, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import pruned
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.loading import as_vlm
from tests.masked_reference import embed, masked_greedy, masked_states
from tests.pairwise import pairwise
from tests.tiny import row_of
from tests.unit.prefill.made import (
    CLOSE,
    FAMILIES,
    LAYERS,
    NAMES,
    RECOMPUTED_WITH_HOOKS,
    STEPS,
    Masks,
    ask,
    build,
    masked_by,
    pruners,
    random_masks,
    reference,
    shared,
    slots_of,
    without_stop,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_have_the_probabilities_of_the_reference(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
    with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
        out = without_stop(vlm, inputs, **beams)
    assert len(run.slots[0]) == 9 and all(torch.equal(kept[::3], kept[1::3]) for kept in run.kept)
    assert [len(layer.keys) for layer in cache_of_output(out).layers] == [9] * LAYERS
    masked = reference(vlm, inputs, name, run, copies=3)
    tokens = out.sequences[:, -STEPS:].view(3, 2, STEPS)
    for beam in range(2):
        new = vlm.model.get_input_embeddings()(tokens[:, beam])
        whole = torch.cat([embed(vlm, inputs), new], dim=1)
        logits, _ = masked_states(vlm, whole, inputs["attention_mask"].bool(), masked)
        predicted = logits[:, -STEPS - 1 : -1].log_softmax(dim=-1).gather(2, tokens[:, beam, :, None])
        found = out.sequences_scores.view(3, 2)[:, beam]
        torch.testing.assert_close(predicted.sum(dim=(1, 2)), found, rtol=0, atol=5 * CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_several_samples_of_a_question(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request):
        greedy = without_stop(vlm, inputs).sequences
        # The likeliest token alone can be drawn: sampling is greedy then.
        sampled = without_stop(vlm, inputs, do_sample=True, top_k=1, num_return_sequences=3).sequences
        torch.manual_seed(0)
        free = without_stop(vlm, inputs, do_sample=True, top_k=0, temperature=3.0, num_return_sequences=3).sequences
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))
    assert free.shape == sampled.shape and not torch.equal(free, sampled)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_embeddings_in_place_of_ids(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request):
        expected = without_stop(vlm, inputs)
    visual = inputs["input_ids"] == vlm.model.config.image_token_id
    embedded = {"inputs_embeds": embed(vlm, inputs), "attention_mask": inputs["attention_mask"]}
    # What is said of padding does not count.
    visual |= inputs["attention_mask"] == 0
    with pruned(vlm, pruners(vlm, request)[name], embedded, request, visual=visual):
        out = without_stop(vlm, embedded)
    assert torch.equal(out.sequences[:, -STEPS:], expected.sequences[:, -STEPS:])
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_around_the_model(name: str, family: str):
    vlm = build(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request):
        bare = without_stop(vlm, inputs)
    torch.manual_seed(2)
    wrapped: Any = get_peft_model(vlm.model, LoraConfig(r=4, target_modules=vlm.adapter_targets))

    def both() -> tuple[Any, Tensor]:
        with pruned(wrapped, pruners(vlm, request)[name], inputs, request) as run:
            options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
            out = wrapped.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        masked = reference(vlm, inputs, name, run)
        return out, masked_greedy(as_vlm(wrapped), inputs, masked, STEPS)[1]

    fresh, _ = both()  # an adapter starts at zero
    torch.testing.assert_close(torch.stack(fresh.logits), torch.stack(bare.logits), rtol=0, atol=CLOSE)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.2)
    out, logits = both()
    assert not torch.allclose(torch.stack(out.logits), torch.stack(bare.logits), atol=0.01)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, rtol=0, atol=CLOSE)


def gradients(vlm: VLM, loss: Tensor) -> dict[str, Tensor]:
    vlm.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


def loss_of(logits: Tensor) -> Tensor:
    """Return a loss of the last three slots, which are text in every row."""
    targets = torch.arange(3).expand(len(logits), 3)
    return torch.nn.functional.cross_entropy(logits[:, -3:].flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name: str, family: str):
    vlm = build(family)
    vlm.model.train()
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        if checkpointing and RECOMPUTED_WITH_HOOKS:
            with (
                pruned(vlm, pruners(vlm, request)[name], inputs, request),
                pytest.raises(ConfigError, match=r"hooks again when gradient checkpointing.* 5\.23 or later"),
            ):
                vlm.model(**inputs, use_cache=False)
            break
        with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
            out = vlm.model(**inputs, use_cache=False, logits_to_keep=3)
            found.append(gradients(vlm, loss_of(out.logits)))
        assert out.logits.shape[1] == 3
    vlm.model.gradient_checkpointing_disable()
    masked = reference(vlm, inputs, name, run)
    logits, _ = masked_states(vlm, embed(vlm, inputs), inputs["attention_mask"].bool(), masked)
    torch.testing.assert_close(out.logits, logits[:, -3:], rtol=0, atol=CLOSE)
    expected = gradients(vlm, loss_of(logits))
    assert {"model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= set(expected)
    assert any("vision_tower" in key for key in expected)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for ours in found:
        assert ours.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_the_tail_are_aligned_right(name: str):
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
        everything = vlm.model(**inputs).logits
        tail = vlm.model(**inputs, logits_to_keep=3).logits
        one = vlm.model(**inputs, logits_to_keep=1, use_cache=False).logits
    assert everything.shape[1] == int(run.slots[-1].max())
    torch.testing.assert_close(everything[:, -3:], tail, rtol=0, atol=CLOSE)
    torch.testing.assert_close(everything[:, -1:], one, rtol=0, atol=CLOSE)
    masked = reference(vlm, inputs, name, run)
    logits, _ = masked_states(vlm, embed(vlm, inputs), inputs["attention_mask"].bool(), masked)
    torch.testing.assert_close(tail, logits[:, -3:], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gaps_in_positions_are_not_read_as_packed_sequences(family: str):
    vlm = shared(family)
    request = ask(vlm, ["what color is the square"])
    inputs = prompt_inputs(vlm, request)
    keep = random_masks(request, 0.4)
    slots = slots_of(vlm, inputs, keep)[0]
    assert bool((slots.nonzero().flatten().diff() > 1).any())
    short: dict[str, Any] = {
        "inputs_embeds": embed(vlm, inputs)[:, slots],
        "position_ids": slots.nonzero().flatten()[None],
        "use_cache": False,
    }
    # The trap: without cache and mask, transformers lets no slot look across a gap.
    trapped = vlm.head(vlm.decoder(**short).last_hidden_state)[:, -1]
    ones = torch.ones(1, int(slots.sum()), dtype=torch.long)
    right = vlm.head(vlm.decoder(**short, attention_mask=ones).last_hidden_state)[:, -1]
    assert bool((trapped - right).abs().max() > 0.1)
    unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
    for given in (inputs, unmasked):
        for cached in (False, True):
            with pruned(vlm, Masks({0: keep}), given):
                ours = vlm.model(**given, use_cache=cached).logits[:, -1]
            torch.testing.assert_close(ours, right, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_several_tokens_at_a_time(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    new = torch.arange(9).view(3, 3) + 20
    with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
        positions = inputs["attention_mask"].cumsum(dim=1) - 1
        cache = cache_of_output(vlm.model(**inputs, position_ids=positions.clamp(min=0)))
        out = vlm.model(
            input_ids=new,
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1),
            position_ids=positions[:, -1:] + torch.arange(1, 4),
            **{cache_keyword(vlm.model): cache},
        )
    whole = torch.cat([embed(vlm, inputs), vlm.model.get_input_embeddings()(new)], dim=1)
    logits, _ = masked_states(vlm, whole, inputs["attention_mask"].bool(), reference(vlm, inputs, name, run))
    torch.testing.assert_close(out.logits, logits[:, -3:], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["at 2", "renumbered"])
@torch.no_grad()
def test_padding_on_the_right_in_a_forward_pass(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    left = prompt_inputs(vlm, request)
    right = dict(left)
    for key in ("input_ids", "attention_mask"):
        rows = [row.roll(-int(n)) for row, n in zip(left[key], (left["attention_mask"] == 0).sum(dim=1), strict=True)]
        right[key] = torch.stack(rows)
    outputs = []
    for inputs in (left, right):
        with pruned(vlm, pruners(vlm, request)[name], inputs, request):
            outputs.append(vlm.model(**inputs, logits_to_keep=3).logits)
    # What is cut is padded on the left, whatever it was before.
    torch.testing.assert_close(*outputs, rtol=0, atol=CLOSE)


@pairwise(renumber=[False, True], depth=[0, 2], explicit=[False, True])
@torch.no_grad()
def test_a_decoding_loop_of_ones_own(renumber: bool, depth: int, explicit: bool):
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    pruner = Masks({depth: random_masks(request, 0.4)}, renumber=depth if renumber else None)
    logits = []
    with pruned(vlm, pruner, inputs, request) as run:
        out = vlm.model(**inputs)
        for step in range(STEPS):
            logits.append(out.logits[:, -1])
            # Without positions the model takes the length of its first layer's cache for them, which is shorter.
            place = {"position_ids": torch.tensor([[inputs["input_ids"].shape[1] + step]])} if explicit else {}
            token = logits[-1].argmax(dim=-1)[:, None]
            out = vlm.model(input_ids=token, **{cache_keyword(vlm.model): cache_of_output(out)}, **place)
    masked = masked_by(vlm, inputs, run, renumber=depth if renumber else None)
    expected = masked_greedy(vlm, inputs, masked, STEPS)[1]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("depth", [0, 2])
@torch.no_grad()
def test_renumbering_alone_closes_gaps_in_positions(depth: int):
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    gaps = {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None] * 2}
    with pruned(vlm, Masks({}, renumber=0), gaps, request):
        ours = without_stop(vlm, gaps)
    theirs, other = without_stop(vlm, inputs), without_stop(vlm, gaps)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=CLOSE)
    assert bool((ours.logits[0] - other.logits[0]).abs().max() > 0.01)
    keep = Masks({depth: random_masks(request, 0.4)}, renumber=0)
    outputs = []
    for given in (inputs, gaps):
        with pruned(vlm, keep, given, request):
            outputs.append(torch.stack(without_stop(vlm, given).logits))
    torch.testing.assert_close(*outputs, rtol=0, atol=CLOSE)
