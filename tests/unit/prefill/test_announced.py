"""Inputs are recognised by what they hold: a batch that pruned() was not given is never cut by another one's scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.inputs import prompt_inputs
from tests.masked_reference import embed
from tests.tiny import row_of
from tests.unit.prefill.made import (
    CLOSE,
    FAMILIES,
    RECOMPUTED_WITH_HOOKS,
    Given,
    Masks,
    ask,
    build,
    random_masks,
    shared,
    without_stop,
)

ANOTHER = "other inputs than pruned\\(\\) was given"
FIRST, OTHER = "what shape is the square", "is there a white cross"  # as many tokens


def asked(family: str, question: str = FIRST, rows: tuple[int, ...] = (2,)) -> tuple[dict[str, Any], Any]:
    """Inputs of one shape, whatever the question."""
    vlm = shared(family)
    request = ask(vlm, (question,) * len(rows), images=rows)
    request = row_of(request, 0) if len(rows) == 1 else request
    return prompt_inputs(vlm, request), request


PRUNERS = {"guided": lambda: Guided(Given(), 0, 0.2), "fastv": lambda: FastV(0, 0.3), "later": lambda: FastV(2, 0.3)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRUNERS)
def test_the_next_batch_of_a_loop_is_refused_also_if_its_shape_is_the_same(name: str, family: str):
    vlm, (one, request), (two, _) = shared(family), asked(family), asked(family, OTHER)
    assert one["input_ids"].shape == two["input_ids"].shape
    pruner: Pruner = PRUNERS[name]()
    with pruned(vlm, pruner, one, request):
        expected = without_stop(vlm, one).sequences
        with pytest.raises(ConfigError, match=rf"{ANOTHER}.*open pruned\(\) anew for every batch"):
            without_stop(vlm, two | {"pixel_values": one["pixel_values"]})
        # Copies of the announced ones are the announced ones.
        assert torch.equal(without_stop(vlm, {k: v.clone() for k, v in one.items()}).sequences, expected)


def changed(inputs: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The inputs with another value, or without one of the name."""
    return {k: v for k, v in inputs.items() if k != name} | ({} if value is None else {name: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_the_inputs_is_looked_at(family: str):
    vlm = shared(family)
    inputs, request = asked(family, rows=(2, 2))
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    dropped = mask.index_fill(1, torch.tensor([0]), 0)
    others: dict[str, tuple[dict[str, Any], str]] = {
        "a picture": (changed(inputs, "pixel_values", pixels.flip(-1)), f"{ANOTHER}: pixel_values of another picture"),
        "rows exchanged": (changed(inputs, "input_ids", ids.flip(0).index_fill(1, torch.tensor([3]), 9)), ANOTHER),
        "padding": (changed(inputs, "attention_mask", dropped), f"{ANOTHER}: the attention_mask is another one"),
        "rows": ({**inputs, "input_ids": ids[:1], "attention_mask": mask[:1]}, f"{ANOTHER}: it got 2 prompts and the"),
        "a mask of whom one sees": (
            changed(inputs, "attention_mask", mask[:, None, None]),
            "takes an attention_mask of",
        ),
        "no picture": (changed(inputs, "pixel_values", None), "was given pixel_values and the model is called with no"),
    }
    for given, message in others.values():
        with torch.no_grad(), pruned(vlm, Guided(Given(), 0, 0.2), inputs, request):
            with pytest.raises(ConfigError, match=message):
                vlm.model(**given)
            vlm.model(**inputs)  # what was refused leaves nothing behind


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_in_place_of_pixels_are_recognised_also_repeated_for_beams(family: str):
    vlm = shared(family)
    _, request = asked(family, rows=(2, 1))
    visual = vlm.visual_tokens(request.tiles)

    def given(features: Tensor) -> dict[str, Any]:
        return prompt_inputs(vlm, request, features=features)

    with pruned(vlm, Guided(Given(), 0, 0.2), given(visual), request):
        plain = without_stop(vlm, given(visual)).sequences
        assert torch.equal(without_stop(vlm, given(visual.clone())).sequences, plain)
        without_stop(vlm, given(visual), num_beams=3)
        for options in ({}, {"num_beams": 2}):
            with pytest.raises(ConfigError, match=f"{ANOTHER}: features of another picture"):
                without_stop(vlm, given(visual.flip(-1)), **options)
        with pytest.raises(ConfigError, match="given features of pictures and the model is called with pixel_values"):
            vlm.model(**prompt_inputs(vlm, request))
    pixels = prompt_inputs(vlm, request)
    with pruned(vlm, Guided(Given(), 0, 0.2), pixels, request):
        vlm.model(**pixels)
        # A picture that has passed the tower before vouches for no later features.
        with pytest.raises(ConfigError, match="given pixel_values and the model is called with features"):
            vlm.model(**given(visual))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_are_compared_where_there_are_no_ids(family: str):
    vlm = shared(family)
    inputs, request = asked(family)
    visual = inputs["input_ids"] == vlm.model.config.image_token_id
    embedded = {"inputs_embeds": embed(vlm, inputs), "attention_mask": inputs["attention_mask"]}
    other = changed(embedded, "inputs_embeds", embedded["inputs_embeds"].roll(1, dims=1))
    with pruned(vlm, Guided(Given(), 0, 0.2), embedded, request, visual=visual):
        without_stop(vlm, embedded, num_return_sequences=2, do_sample=True)
        with pytest.raises(ConfigError, match=f"{ANOTHER}: inputs_embeds"):
            without_stop(vlm, other)
        with pytest.raises(ConfigError, match="called with input_ids, which pruned\\(\\) was not given"):
            vlm.model(**inputs)
    with (
        pruned(vlm, Guided(Given(), 0, 0.2), inputs, request),
        pytest.raises(ConfigError, match=r"called with inputs_embeds, which .*\(prompt tuning"),
    ):
        vlm.model(**embedded)


@torch.no_grad()
def test_a_buffer_that_is_used_again_for_the_next_batch_is_another_batch():
    vlm = shared("internvl")
    (inputs, request), (other, _) = asked("internvl"), asked("internvl", OTHER)
    with pruned(vlm, Guided(Given(), 0, 0.2), inputs, request), pytest.raises(ConfigError, match=ANOTHER):
        inputs["input_ids"].copy_(other["input_ids"])
        vlm.model(**inputs)
    # One question about many pictures, as captions are asked for: pixels in the same buffer, or features of them.
    inputs, request = asked("internvl")
    encoded = prompt_inputs(vlm, request, "image_first", vlm.visual_tokens(request.tiles))
    (features,) = (part.pooler_output for part in encoded["mm_encoder_outputs"].values())
    for given, buffer in ((inputs, inputs["pixel_values"]), (encoded, features[0])):
        with pruned(vlm, Guided(Given(), 0, 0.2), given, request):
            vlm.model(**given)
            buffer.add_(1)
            with pytest.raises(ConfigError, match=ANOTHER):
                vlm.model(**given)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (1,)])
def test_comparing_waits_for_the_device_once_a_prefill_and_never_in_a_layer(
    family: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    vlm = shared(family)
    inputs, request = asked(family)
    waits: list[int] = []
    for name in ("__bool__", "item", "tolist"):
        before = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, before=before: (waits.append(0), before(self))[1])
    counts = []
    for steps in (1, 4):
        for attached in (False, True):
            waits.clear()
            if attached:
                with pruned(vlm, Masks({depth: random_masks(request, 0.4) for depth in cuts}), inputs, request):
                    waits.clear()
                    without_stop(vlm, inputs, max_new_tokens=steps)
                    counts[-1] = len(waits) - counts[-1]
            else:
                without_stop(vlm, inputs, max_new_tokens=steps)
                counts.append(len(waits))
    if cuts:
        # transformers looks once at a mask whether it hides anything: at those of a prefill, and at one a step.
        assert counts[0] <= 6 and counts[1] - counts[0] <= 3
    else:
        assert counts == [counts[0]] * 2 and counts[0] <= 2


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_known_answer_may_follow_the_prompt(family: str):
    vlm = shared(family)
    inputs, request = asked(family, rows=(2, 2))
    keep = Masks({0: random_masks(request, 0.4)})
    with pruned(vlm, keep, inputs, request):
        out = without_stop(vlm, inputs)
        whole = {**inputs, "input_ids": out.sequences[:, :-1]}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        told = vlm.model(**whole).logits[:, -len(out.logits) :]
        with pytest.raises(ConfigError, match="leave output_hidden_states and output_attentions unset"):
            vlm.model(**whole, output_hidden_states=True)
    torch.testing.assert_close(told, torch.stack(out.logits, dim=1), rtol=0, atol=CLOSE)


def test_a_known_answer_without_a_cache_is_refused():
    vlm = build("internvl")
    inputs, request = asked("internvl")
    whole = {name: torch.cat([inputs[name], torch.ones_like(inputs[name][:, :2])], dim=1) for name in ("input_ids",)}
    whole |= {"attention_mask": torch.ones_like(whole["input_ids"]), "pixel_values": inputs["pixel_values"]}
    with pruned(vlm, Masks({0: random_masks(request, 0.4)}), inputs, request):
        with pytest.raises(ConfigError, match=r"2 slots behind the prompt and no cache: .* leave use_cache on"):
            vlm.model(**whole, use_cache=False)
        vlm.model.train()
        vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        if RECOMPUTED_WITH_HOOKS:
            with pytest.raises(ConfigError, match="hooks again when gradient checkpointing"):
                vlm.model(**whole)
            return
        with pytest.raises(ConfigError, match="the model has filled none, as gradient checkpointing does"):
            vlm.model(**whole)
        # The prompt alone runs, and its cache stays empty as it does without a pruner.
        assert vlm.model(**inputs).logits.requires_grad
