"""Prompts for a batch of questions, and answers out of what was generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import generate, prompt_inputs, read_answers
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import Llava
from pgp_lightning.vlm.loading import as_vlm, load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid
from tests.tiny import GRIDS, QUESTIONS, row_of, tiny_request

SQUARE = TileGrid(1, 1, 4, False)


@pytest.fixture(scope="module")
def internvl(tiny_base: str) -> VLM:
    return load_vlm(tiny_base)


@pytest.fixture(scope="module")
def llava(llava_base: str) -> VLM:
    return load_vlm(llava_base)


@pytest.fixture(params=["internvl", "llava"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    found: VLM = request.getfixturevalue(request.param)
    return found


def ask(vlm: VLM, images: tuple[int, ...] = (0, 1, 2, 0)) -> Request:
    """Return four questions about three images; two share one."""
    if isinstance(vlm, InternVL):
        return tiny_request(QUESTIONS, images=images)
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Request(list(QUESTIONS), tiles, [SQUARE] * 3, list(images))


@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_rows_are_prompts_padded_on_the_left(vlm: VLM, order: Any):
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request, order)
    ids, mask, processor = inputs["input_ids"], inputs["attention_mask"], vlm.processor
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
    for row, question in enumerate(QUESTIONS):
        prompt = processor.prompt(question, None, order)
        expected = [*prompt.before, *[processor.context_id] * request.counts[row], *prompt.after]
        assert ids[row, -len(expected) :].tolist() == expected
        assert mask[row].tolist() == [0] * (ids.shape[1] - len(expected)) + [1] * len(expected)
        assert not (ids[row, : -len(expected)] == processor.context_id).any()
        # The question stands where the order says.
        asked, context = processor.encode(question), expected.index(processor.context_id)
        text = expected[:context] if order == "question_first" else expected[context:]
        assert any(text[i : i + len(asked)] == asked for i in range(len(text)))
    assert bool((mask.sum(dim=1) == mask.shape[1]).any()) and not bool(mask.all())
    assert vlm.visual_slots(ids).sum(dim=1).tolist() == request.counts


@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_a_row_gets_its_own_system_text(vlm: VLM, order: Any):
    request = replace(ask(vlm), systems=["what is", None, "", "red"])
    ids, processor = prompt_inputs(vlm, request, order)["input_ids"], vlm.processor
    for row, (question, system) in enumerate(zip(QUESTIONS, request.systems, strict=True)):
        prompt = processor.prompt(question, None, order, system)
        expected = [*prompt.before, *[processor.context_id] * request.counts[row], *prompt.after]
        assert ids[row, -len(expected) :].tolist() == expected
        if system:
            assert prompt.before != processor.prompt(question, None, order).before
    with pytest.raises(ValueError, match="4 questions need a system text or None each"):
        replace(request, systems=["what"])


def test_a_row_gets_its_own_images_tiles(vlm: VLM):
    request = ask(vlm, (2, 0, 2, 1))
    pixels = prompt_inputs(vlm, request)["pixel_values"]
    expected = [vlm.normalise(row_of(request, row).tiles) for row in range(4)]
    assert torch.equal(pixels, torch.cat(expected))


def test_features_that_are_there_already_give_the_same_logits(vlm: VLM):
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with torch.no_grad():
        features = vlm.visual_tokens(request.tiles)
        other = prompt_inputs(vlm, request, features=features)
        assert set(other) == {"input_ids", "attention_mask", "mm_encoder_outputs"}
        runs = []
        hook = vlm.vision_tower.register_forward_hook(lambda *_: runs.append(1))
        logits = vlm.model(**other).logits
        assert not runs
        torch.testing.assert_close(logits, vlm.model(**inputs).logits, rtol=0, atol=2e-5)
        hook.remove()
    assert runs == [1]
    # Beams repeat what they are given, so the next call gets objects of its own.
    again = prompt_inputs(vlm, request, features=features)
    assert again["mm_encoder_outputs"]["image"] is not other["mm_encoder_outputs"]["image"]
    stop = vlm.processor.stop_id
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "eos_token_id": None, "pad_token_id": stop}
    assert torch.equal(vlm.model.generate(**again, **options), vlm.model.generate(**inputs, **options))


@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_a_batch_answers_as_single_questions_do(vlm: VLM, order: Any):
    request = ask(vlm)
    stop = vlm.processor.stop_id
    inputs = prompt_inputs(vlm, request, order)
    tokens = generate(vlm, inputs, 5)
    assert tokens.dtype == torch.int64 and len(tokens) == 4 and tokens.shape[1] <= 5
    answers = read_answers(vlm, tokens)
    with torch.no_grad():
        batch = vlm.model(**inputs, logits_to_keep=1).logits[:, 0]
    for row in range(4):
        alone = prompt_inputs(vlm, row_of(request, row), order)
        with torch.no_grad():
            single = vlm.model(**alone).logits[0, -1]
        torch.testing.assert_close(batch[row], single, rtol=0, atol=2e-5)
        ours = [*generate(vlm, alone, 5)[0].tolist(), stop]
        theirs = [*tokens[row].tolist(), stop]
        assert ours[: ours.index(stop)] == theirs[: theirs.index(stop)]
        assert read_answers(vlm, generate(vlm, alone, 5)) == [answers[row]]


def test_generation_ends_with_the_stop_token(vlm: VLM):
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    tokens = generate(vlm, inputs, 6)
    # The model's likeliest token of some row is made its stop.
    first = int(tokens[0, 1])
    word = vlm.processor.tokenizer.convert_ids_to_tokens(first)
    template = replace(vlm.processor.template, stop=word)
    stopped = type(vlm)(vlm.model, replace(vlm.processor, template=template), vlm.base)
    if stopped.processor.stop_id != first:
        pytest.skip(f"{word} is not one token of this tokenizer")
    shorter = generate(stopped, {**inputs}, 6)
    end = tokens[0].tolist().index(first)
    assert shorter[0, : end + 1].tolist() == tokens[0, : end + 1].tolist()
    assert set(shorter[0, end:].tolist()) == {first}


def test_answers_end_at_the_first_stop(vlm: VLM):
    processor, stop = vlm.processor, vlm.processor.stop_id
    red, blue = (processor.encode(word) for word in ("red", "blue"))
    rows = [[*red, stop, *blue], [*red, *blue, stop], [stop, *red, *blue], [*red, *blue, *red]]
    assert read_answers(vlm, torch.tensor(rows)) == ["red", "red blue", "", "red blue red"]


def test_a_request_of_another_tile_rule_is_refused(internvl: VLM, llava: VLM):
    with pytest.raises(
        ConfigError, match=r"takes tiles of 32 pixels and 4 tokens a side, the request has 32 and \[2\]"
    ):
        prompt_inputs(llava, ask(internvl))
    larger = Request(["what"], torch.zeros(3, 3, 64, 64, dtype=torch.uint8), [GRIDS[0]])
    with pytest.raises(ConfigError, match="takes tiles of 32 pixels and 2 tokens a side, the request has 64"):
        prompt_inputs(internvl, larger)


def test_a_model_in_memory_is_seen_as_its_family(vlm: VLM):
    seen = as_vlm(vlm.model)
    assert type(seen) is type(vlm) and seen.model is vlm.model and seen.base == type(vlm.model).__name__
    assert seen.decoder_layers is vlm.decoder_layers
    with pytest.raises(ConfigError, match="has no processor: load it with load_vlm"):
        _ = seen.processor
    seen.processor = vlm.processor
    assert seen.processor is vlm.processor


@pytest.mark.parametrize("family", [InternVL, Llava])
def test_an_adapter_around_a_model_changes_nothing_of_what_is_seen(family: type[VLM], tiny_base: str, llava_base: str):
    vlm = load_vlm(tiny_base if family is InternVL else llava_base)
    layers, width = vlm.decoder_layers, vlm.width
    wrapped: Any = get_peft_model(vlm.model, LoraConfig(r=2, target_modules=vlm.adapter_targets))
    seen = as_vlm(wrapped)
    assert type(seen) is family and seen.model is vlm.model and seen.decoder_layers is layers and seen.width == width
    assert hasattr(seen.decoder_layers[0].self_attn.q_proj, "lora_A")
    assert family(wrapped, vlm.processor, "wrapped").decoder_layers is layers


def test_a_model_of_no_family_is_refused():
    with pytest.raises(
        ConfigError, match="Linear is of no family that can be pruned; supported are InternVL and Llava"
    ):
        as_vlm(nn.Linear(2, 2))
