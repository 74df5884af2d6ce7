"""Assisted decoding: guesses that come with the prompt are text behind it, and what is guessed changes no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import pruned
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles
from tests.originals import download
from tests.tiny import row_of
from tests.unit.prefill.made import FAMILIES, NAMES, Given, Staged, ask, build, pruners, shared, without_stop

TOKENS = 12


class Passes:
    """Notes the widths of a model's calls."""

    def __init__(self, vlm: VLM) -> None:
        self.widths: list[int] = []
        self.handle = vlm.model.register_forward_pre_hook(
            lambda _, args, kwargs: self.widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )


def draft(family: str) -> Any:
    """A model that agrees with `shared` now and then."""
    model = build(family).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("helper", ["lookup", "draft"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*NAMES, "staged", "fastv"])
def test_guesses_change_no_token(name: str, family: str, helper: str):
    vlm = shared(family)
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    # The prompt ends with what stands in it before, so that there is something to look up at once.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -3:-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    pruner = {"staged": Staged(), "fastv": FastV(2, 0.3)}.get(name) or pruners(vlm, request)[name]
    help_ = {"prompt_lookup_num_tokens": 4} if helper == "lookup" else {"assistant_model": draft(family)}
    with pruned(vlm, pruner, inputs, request) as run:
        plain = without_stop(vlm, inputs, max_new_tokens=TOKENS)
        kept = [mask.clone() for mask in run.kept]
        passes = Passes(vlm)
        try:
            guessed = without_stop(vlm, inputs, max_new_tokens=TOKENS, **help_)
        finally:
            passes.handle.remove()
    # There were guesses beside the prompt, and some of all guesses were wrong.
    slots = inputs["input_ids"].shape[1]
    assert passes.widths[0] > slots and sum(passes.widths) > slots + TOKENS - 1
    assert torch.equal(plain.sequences, guessed.sequences)
    assert all(map(torch.equal, run.kept, kept))
    for ours, theirs in zip(cache_of_output(guessed).layers, cache_of_output(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["internvl_qwen2", "internvl_internlm2"])
def test_prompts_of_released_templates_end_with_something_to_look_up(name: str, tmp_path: Path):
    vlm = load_vlm(str(download(tmp_path, name)))
    vlm.model.generation_config.eos_token_id = None
    tiles, grid = cut_tiles(Image.new("RGB", (100, 60), "red"), vlm.processor.rule)
    request = Request(["What color is it?"], torch.from_numpy(tiles), [grid])
    inputs = prompt_inputs(vlm, request)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    with pruned(vlm, Guided(Given(), 0, 0.3), inputs, request):
        plain = vlm.model.generate(**inputs, **options)
        assert torch.equal(plain, vlm.model.generate(**inputs, **options, prompt_lookup_num_tokens=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cannot_draft_for_itself(family: str):
    vlm = shared(family)
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    for options, message in (
        ({"assistant_model": vlm.model}, "assistant_model is the pruned model itself"),
        ({"assistant_early_exit": 2}, "assistant_early_exit drafts with the first layers"),
    ):
        with pruned(vlm, Guided(Given(), 0, 0.3), inputs, request), pytest.raises(ConfigError, match=message):
            without_stop(vlm, inputs, **options)
