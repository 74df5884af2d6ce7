"""A chat goes on from a cut cache, right inside `pruned` and refused outside of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import KeepAll, pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import next_turn, prompt_inputs
from pgp_lightning.vlm.prompt_cache import PromptLayer
from tests.masked_reference import Masked, embed, masked_states
from tests.tiny import QUESTIONS, row_of
from tests.unit.prefill.made import (
    CLOSE,
    FAMILIES,
    NAMES,
    STEPS,
    Given,
    Masks,
    ask,
    pruners,
    random_masks,
    reference,
    shared,
    without_stop,
)

LATER = ("how many", "read the white sign on the blue square", "is there")


class Ends(LogitsProcessor):
    """Lets some rows end after some tokens."""

    def __init__(self, after: dict[int, int], stop: int, prompt: int) -> None:
        self.after, self.stop, self.prompt = after, stop, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, count in self.after.items():
            if input_ids.shape[1] - self.prompt == count:
                scores[row] = scores[row].index_fill(0, torch.tensor([self.stop]), 1e4)
        return scores


def answered(vlm: VLM, inputs: dict[str, Any], after: dict[int, int]) -> Any:
    """Generate answers of which some end early; where they end, `generate` fills up with stop tokens."""
    stop = vlm.processor.stop_id
    ends = LogitsProcessorList([Ends(after, stop, inputs["input_ids"].shape[1])])
    return without_stop(vlm, inputs, eos_token_id=stop, logits_processor=ends, max_new_tokens=5)


@torch.no_grad()
def expected(vlm: VLM, inputs: dict[str, Any], row: int, answer: list[int], turn: list[int], masked: Masked) -> Tensor:
    """Return the logits behind a row's next turn, by the masked reference and without any padding behind the prompt."""
    one = Masked(
        [slots[row : row + 1] for slots in masked.prefill],
        [slots[row : row + 1] for slots in masked.decode],
        masked.renumber,
    )
    later = vlm.model.get_input_embeddings()(torch.tensor([[*answer, *turn]]))
    whole = torch.cat([embed(vlm, inputs)[row : row + 1], later], dim=1)
    return masked_states(vlm, whole, inputs["attention_mask"][row : row + 1].bool(), one)[0][0, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_next_turns_are_those_of_the_reference_though_answers_end_at_different_steps(name: str, family: str):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    stop, processor = vlm.processor.stop_id, vlm.processor
    with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
        first = answered(vlm, inputs, {0: 1, 2: 3})
        second = next_turn(vlm, inputs, first, LATER)
        out = answered(vlm, second, {1: 2})
        third = next_turn(vlm, second, out, QUESTIONS[:3])
        last = without_stop(vlm, third, max_new_tokens=1)
    masked, prompt = reference(vlm, inputs, name, run), inputs["input_ids"].shape[1]
    for row in range(3):
        said: list[int] = []
        history: list[int] = []
        for turn, (output, start, question) in enumerate(
            ((first, prompt, LATER[row]), (out, second["input_ids"].shape[1], QUESTIONS[row]))
        ):
            said = output.sequences[row, start:].tolist()
            said = said[: said.index(stop) + 1] if stop in said else [*said, stop]
            asked = processor.next_turn(question)
            logits = expected(vlm, inputs, row, [*history, *said], asked, masked)
            found = (out, last)[turn].logits[0][row]
            torch.testing.assert_close(found, logits, rtol=0, atol=CLOSE, msg=f"row {row}, turn {turn}")
            history += [*said, *asked]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_transformers_own_way_to_go_on_is_right_inside(name: str, family: str):
    vlm = shared(family)
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request) as run:
        first = without_stop(vlm, inputs)
        ids = torch.cat([first.sequences, torch.arange(20, 25)[None]], dim=1)
        chat = {"input_ids": ids, "attention_mask": torch.ones_like(ids), cache_keyword(vlm.model): None}
        # A copy goes on by itself, as the same prompt with other questions does.
        copies = [copy.deepcopy(cache_of_output(first)) for _ in range(2)]
        found = [without_stop(vlm, chat | {cache_keyword(vlm.model): cache}) for cache in copies]
    later = ids[0, inputs["input_ids"].shape[1] :].tolist()
    logits = expected(vlm, inputs, 0, later, [], reference(vlm, inputs, name, run))
    for out in found:
        torch.testing.assert_close(out.logits[0][0], logits, rtol=0, atol=CLOSE)
        assert torch.equal(out.sequences, found[0].sequences) and out.sequences.shape[1] == ids.shape[1] + STEPS


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("how", ["generate", "step", "another pruned"])
@torch.no_grad()
def test_a_cut_cache_is_refused_outside_and_a_whole_one_is_not(how: str, depth: int):
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)

    def go_on(first: Any) -> None:
        ids = torch.cat([first.sequences, torch.arange(20, 25)[None]], dim=1)
        cache = {cache_keyword(vlm.model): copy.deepcopy(cache_of_output(first))}
        if how == "step":
            vlm.model(input_ids=ids[:, -1:], **cache)
        else:
            vlm.model.generate(input_ids=ids, max_new_tokens=1, **cache)

    with pruned(vlm, Masks({depth: random_masks(request, 0.4)}), inputs, request):
        cut = without_stop(vlm, inputs)
    with pruned(vlm, KeepAll(), inputs, request):
        whole = without_stop(vlm, inputs)
    if how == "another pruned":
        with pruned(vlm, Guided(Given(), 1, 0.3), inputs, request):
            go_on(cut)  # it says itself what was cut
        return
    with pytest.raises(ConfigError, match=r"cache holds a prompt that pruned\(\) has cut.*inside the same `with"):
        go_on(cut)
    go_on(whole)


@pytest.mark.parametrize("name", ["at 0", "at 2"])
@torch.no_grad()
def test_what_goes_on_wrongly_is_refused_by_name(name: str):
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruners(vlm, request)[name], inputs, request):
        first = without_stop(vlm, inputs)
        turn = next_turn(vlm, inputs, first, ["how many"])
        keyword = cache_keyword(vlm.model)
        step = {"input_ids": turn["input_ids"][:, -2:], keyword: turn[keyword]}
        for given, message in (
            ({**turn, "pixel_values": inputs["pixel_values"]}, "leave pixel_values and features out of calls that go"),
            ({**step, "attention_mask": turn["attention_mask"][:, -2:]}, r"counted without a cut, and the attention_m"),
            ({**step, "attention_mask": torch.ones(1, 1, 2, 2)}, r"attention_mask is \(1, 1, 2, 2\)"),
            ({**step, "input_ids": inputs["input_ids"]}, "placeholders of images follow a prompt that is in the cache"),
        ):
            with pytest.raises(ConfigError, match=message):
                (vlm.model.generate if "pixel_values" in given else vlm.model)(**given)
    placeholder = "a question, an answer or a system text holds <image>, which stands for an image's visual"
    for questions, message in (([], "1 answers take as many questions, got 0"), (["<image> why"], placeholder)):
        with pytest.raises(ConfigError, match=message):
            next_turn(vlm, inputs, first, questions)
        beams = vlm.model.generate(
            **inputs, max_new_tokens=2, num_beams=3, num_return_sequences=3, return_dict_in_generate=True
        )
    with pytest.raises(ConfigError, match=r"beam search leaves a cache of its beams.*num_beams=1"):
        next_turn(vlm, inputs, beams, ["how many"] * 3)
    with pytest.raises(ConfigError, match=r"the conversation takes .* slots and the model was made for 64"):
        next_turn(vlm, inputs, first, ["how many " * 30])


@torch.no_grad()
def test_rows_of_a_cut_cache_may_be_chosen_and_repeated():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    token = torch.tensor([[7]])
    with pruned(vlm, Masks({0: random_masks(request, 0.4)}, renumber=0), inputs, request):

        def step(rows: list[int], change: Any) -> Tensor:
            cache = cache_of_output(vlm.model(**inputs))
            change(cache)
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)[rows]
            places = mask.cumsum(dim=1)[:, -1:] - 1
            given = {"input_ids": token.expand(len(rows), 1), "attention_mask": mask, "position_ids": places}
            return vlm.model(**given, **{cache_keyword(vlm.model): cache}).logits[:, -1]

        plain = step([0, 1, 2], lambda cache: None)
        chosen = step([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([0, 2])))
        repeated = step([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))
    torch.testing.assert_close(chosen, plain[[0, 2]], rtol=0, atol=CLOSE)
    torch.testing.assert_close(repeated, plain.repeat_interleave(2, dim=0), rtol=0, atol=CLOSE)


@torch.no_grad()
def test_a_cut_cache_gives_back_what_followed_the_prompt_and_no_more():
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, Masks({0: random_masks(request, 0.4)}), inputs, request):
        cache = cache_of_output(without_stop(vlm, inputs))
        layer: PromptLayer = cache.layers[0]
        assert (layer.generated, cache.get_seq_length()) == (STEPS - 1, inputs["input_ids"].shape[1] + STEPS - 1)
        assert layer.held < cache.get_seq_length()
        for count in (-STEPS, 1):
            with pytest.raises(ConfigError, match=rf"3 slots follow the prompt in this cache, and crop\({count}\)"):
                cache.crop(count)
        cache.crop(-2)
        assert (layer.generated, cache.get_seq_length()) == (1, inputs["input_ids"].shape[1] + 1)
        # Forgotten, it takes a prompt as any empty cache does.
        expected = vlm.model(**inputs).logits
        cache.reset()
        again = vlm.model(**inputs, **{cache_keyword(vlm.model): cache}).logits
    assert torch.equal(expected, again) and cache.layers[0].cut
