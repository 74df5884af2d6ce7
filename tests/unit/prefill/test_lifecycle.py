"""The foreign model is as it was after every end, and a run leaves nothing behind for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.inputs import generate, prompt_inputs
from pgp_lightning.vlm.request import Request
from tests.tiny import GRIDS, QUESTIONS, row_of
from tests.unit.prefill.made import (
    CLOSE,
    FAMILIES,
    Coming,
    Given,
    Glimpse,
    LastRow,
    Staged,
    ask,
    build,
    hooks,
    shared,
    without_stop,
)

PRUNERS: dict[str, Callable[[], Pruner]] = {
    "guided": lambda: Guided(Given(), 0, 0.3),
    "guided inside": lambda: Guided(Given(), 2, 0.3, renumber=True),
    "staged": Staged,
    "watching": lambda: LastRow(2),
    "coming": Coming,
    "glimpse": lambda: Glimpse(3, 48),
}


class Broken(Exception):
    """What tests throw."""


def fail(*_: Any, **__: Any) -> NoReturn:
    raise Broken


class FailingGuide(Guide):
    def forward(self, request: Request) -> Tensor:
        fail()


class FailingLater(LogitsProcessor):
    """Throws in the second step of decoding."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        return fail() if self.steps == 2 else scores


class FailingPruner(LastRow):
    """Throws in front of a later layer, with a watch on an earlier one."""

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        return fail() if depth == 3 else super().before_layer(depth, state)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRUNERS)
def test_nothing_stays_on_the_model(name: str, family: str):
    vlm = build(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    untouched = without_stop(vlm, inputs)
    before, held, weights = (
        hooks(vlm.model),
        attributes(vlm.model),
        {k: v.clone() for k, v in vlm.model.state_dict().items()},
    )
    config = vlm.model.config.to_dict()
    with pruned(vlm, PRUNERS[name](), inputs, request):
        assert hooks(vlm.model) != before
        ours = without_stop(vlm, inputs)
    assert hooks(vlm.model) == before and attributes(vlm.model) == held and vlm.model.config.to_dict() == config
    assert all(torch.equal(value, weights[key]) for key, value in vlm.model.state_dict().items())
    again = without_stop(vlm, inputs)
    assert all(map(torch.equal, again.logits, untouched.logits))
    assert not torch.equal(ours.logits[0], untouched.logits[0])


BREAKS: dict[str, tuple[Callable[[], Pruner], dict[str, Any]]] = {
    "in the guide": (lambda: Guided(FailingGuide()), {}),
    "in the pruner": (lambda: FailingPruner(2), {}),
    "in decoding": (lambda: Guided(Given(), 0, 0.3), {"logits_processor": True}),
    "in the vision tower": (lambda: Guided(Given(), 0, 0.3), {"pixel_values": torch.zeros(9, 3, 7, 7)}),
    "in the caller": (lambda: LastRow(2), {"caller": True}),
}


@pytest.mark.parametrize("where", BREAKS)
def test_an_exception_takes_the_hooks_away(where: str):
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    before = hooks(vlm.model)
    make, options = BREAKS[where]
    if "logits_processor" in options:
        options = {"logits_processor": LogitsProcessorList([FailingLater()])}
    with pytest.raises((Broken, ValueError, RuntimeError)) as caught, pruned(vlm, make(), inputs, request):
        if "caller" in options:
            fail()
        without_stop(vlm, {**inputs, **options})
    assert isinstance(caught.value, Broken) or where == "in the vision tower"
    assert hooks(vlm.model) == before
    # And the next run is as if there had been none.
    with pruned(vlm, Staged(), inputs):
        ours = without_stop(vlm, inputs)
    fresh = build("internvl")
    with pruned(fresh, Staged(), inputs):
        theirs = without_stop(fresh, inputs)
    assert all(map(torch.equal, ours.logits, theirs.logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRUNERS)
def test_two_calls_in_one_context_and_two_contexts_agree(name: str, family: str):
    vlm, pruner = shared(family), PRUNERS[name]()
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    outputs = []
    with pruned(vlm, pruner, inputs, request) as run:
        outputs.append(without_stop(vlm, inputs))
        first = [kept.clone() for kept in run.kept]
        outputs.append(without_stop(vlm, inputs))
        with torch.no_grad():
            plain = vlm.model(**inputs).logits[:, -1]
        assert len(run.kept) == len(first) and all(map(torch.equal, run.kept, first))
    # Another prompt in between, with the same pruner.
    other = row_of(request, 1)
    with pruned(vlm, pruner, prompt_inputs(vlm, other), other):
        without_stop(vlm, prompt_inputs(vlm, other))
    with pruned(vlm, pruner, inputs, request):
        outputs.append(without_stop(vlm, inputs))
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        assert all(map(torch.equal, output.logits, outputs[0].logits))
    torch.testing.assert_close(plain, outputs[0].logits[0], rtol=0, atol=CLOSE)


BY_ROW = [name for name in PRUNERS if name != "staged"]  # whose random numbers are the batch's


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BY_ROW)
def test_a_rows_answer_does_not_depend_on_the_rows_around_it(name: str, family: str):
    vlm = shared(family)
    questions = [*QUESTIONS, "what color", "how many", "is there a red cross", "read the white sign on the blue square"]
    request = ask(vlm, questions, images=(0, 1, 2, 0, 1, 2, 0, 2))
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, PRUNERS[name](), inputs, request) as together:
        batch = without_stop(vlm, inputs)
    assert len(inputs["input_ids"]) == 8 and len(set(inputs["attention_mask"].sum(dim=1).tolist())) > 2
    for row in range(8):
        alone = row_of(request, row)
        single = prompt_inputs(vlm, alone)
        with pruned(vlm, PRUNERS[name](), single, alone) as run:
            out = without_stop(vlm, single)
        for step, (ours, theirs) in enumerate(zip(out.logits, batch.logits, strict=True)):
            torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=CLOSE, msg=f"row {row}, step {step}")
        for ours, theirs in zip(run.kept, together.kept, strict=True):
            count = alone.counts[0]
            assert torch.equal(ours[0], theirs[row, :count]) and not theirs[row, count:].any()


def test_answers_of_a_batch_are_those_of_single_questions():
    vlm = shared("internvl")
    request = ask(vlm, QUESTIONS, images=(0, 1, 2, 0))
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, Guided(Given(), 2, 0.3), inputs, request):
        tokens = generate(vlm, inputs, 6)
    for row in range(4):
        alone = row_of(request, row)
        single = prompt_inputs(vlm, alone)
        with pruned(vlm, Guided(Given(), 2, 0.3), single, alone):
            ours = generate(vlm, single, 6)[0]
        stop = vlm.processor.stop_id
        expected = [*tokens[row].tolist(), stop]
        assert [*ours.tolist(), stop][: expected.index(stop)] == expected[: expected.index(stop)]


def test_a_pruner_at_another_budget_shares_its_guide_and_leaves_the_first_alone():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    guide = Given()
    first = Guided(Remember(guide), 2, 0.5)
    second = first.at(0.1)
    assert (first.keep_ratio, second.keep_ratio) == (0.5, 0.1) and second.guide is first.guide
    kept = []
    for pruner in (first, second, first):
        with pruned(vlm, pruner, inputs, request) as run, torch.no_grad():
            vlm.model(**inputs)
        kept.append(run.kept[-1].sum(dim=1).tolist())
    assert kept == [[6, 2, 10], [1, 1, 2], [6, 2, 10]] and guide.calls == 1
    # Another request object is asked about anew.
    again = ask(vlm)
    with pruned(vlm, second, inputs, again), torch.no_grad():
        vlm.model(**inputs)
    assert guide.calls == 2
    assert [grid.tokens for grid in GRIDS] == request.counts
