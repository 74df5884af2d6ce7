"""What a pruned model computes equals the whole model under masks, for every kind of pruner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.guides.simple import RandomGuide, UniformGuide
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.request import Request
from tests.masked_reference import Masked, Rewrite, embed, masked_greedy, masked_states
from tests.pairwise import pairwise
from tests.tiny import QUESTIONS, row_of
from tests.unit.prefill.made import (
    CLOSE,
    FAMILIES,
    LAYERS,
    STEPS,
    Coming,
    Given,
    Glimpse,
    LastRow,
    Masks,
    Merge,
    Recorder,
    Rewriting,
    Staged,
    ask,
    build,
    flashing,
    masked_by,
    random_masks,
    shared,
    without_stop,
)


@dataclass(frozen=True)
class Case:
    """A pruner, and what the reference has to know of it.

    Args:
        make: builds it.
        renumber: the layer from which it counts positions again.
        cut: the layer in front of which it cuts the caches behind.
        merges: whether it changes hidden states.
    """

    make: Callable[[VLM, Request], Pruner]
    renumber: int | None = None
    cut: int | None = None
    merges: bool = False


def guided(layer: int, ratio: float, **options: Any) -> Case:
    number = layer if options.get("renumber") else None
    return Case(lambda vlm, request: Guided(Given(), layer, ratio, **options), number)


def stages(vlm: VLM, request: Request) -> Masks:
    """Drop by other masks at three depths and count again at the second."""
    return Masks({depth: random_masks(request, 0.7, depth) for depth in (0, 1, 3)}, renumber=1)


CASES = {
    "guided at 0": guided(0, 0.3),
    "guided at 0, hardly any": guided(0, 0.05),
    "guided at 0, tiles": guided(0, 0.3, max_tiles_kept=2),
    "guided at 2": guided(2, 0.3),
    "guided at the last layer": guided(LAYERS - 1, 0.05),
    "guided at 2, all": guided(2, 1.0),
    "guided at 0, renumbered": guided(0, 0.3, renumber=True),
    "guided at 3, renumbered": guided(3, 0.3, renumber=True),
    "masks at 2": Case(lambda vlm, request: Masks({2: random_masks(request, 0.4)})),
    "stages, renumbered between": Case(stages, renumber=1),
    "three stages": Case(lambda vlm, request: Staged()),
    "attention of the layer before": Case(lambda vlm, request: LastRow(2)),
    "attention of the coming layer": Case(lambda vlm, request: Coming()),
    "merge at 0": Case(lambda vlm, request: Merge(0), merges=True),
    "merge at 2": Case(lambda vlm, request: Merge(2), merges=True),
    "rewrite at 0": Case(lambda vlm, request: Rewriting(0), merges=True),
    "rewrite at 2": Case(lambda vlm, request: Rewriting(2), merges=True),
    "renumber alone": Case(lambda vlm, request: Masks({}, renumber=2), renumber=2),
    "glimpse": Case(lambda vlm, request: Glimpse(3, vlm.width), cut=3),
    "glimpse, its token cut first": Case(lambda vlm, request: Glimpse(3, vlm.width, "first"), cut=3),
    "glimpse, its token cut last": Case(lambda vlm, request: Glimpse(3, vlm.width, "last"), cut=3),
    "fastv": Case(lambda vlm, request: FastV(2, 0.3)),
    "fastv, all queries": Case(lambda vlm, request: FastV(3, 0.3, query="all")),
    "fastv at 0": Case(lambda vlm, request: FastV(0, 0.3)),
    "divprune": Case(lambda vlm, request: DivPrune(0.3)),
    "divprune by tile, renumbered": Case(lambda vlm, request: DivPrune(0.3, "tile", renumber=True), renumber=0),
    "visionzip": Case(lambda vlm, request: VisionZip(0.3), merges=True),
    "visionzip, renumbered": Case(lambda vlm, request: VisionZip(0.3, renumber=True), renumber=0, merges=True),
    "random": Case(lambda vlm, request: Guided(RandomGuide(1), 0, 0.2)),
    "uniform": Case(lambda vlm, request: Guided(UniformGuide(), 2, 0.2)),
}
BATCHES = ("single", "even", "padded")
ATTENTION = ("sdpa", "eager", "flash_attention_2")


def batch_of(vlm: VLM, kind: str) -> Request:
    """Return one question, two of the same length, or four of different ones about images of different sizes."""
    if kind == "even":
        return ask(vlm, (QUESTIONS[0], "how many red square is"), images=(0, 0))
    request = ask(vlm, QUESTIONS, images=(0, 1, 2, 0))
    return row_of(request, 2) if kind == "single" else request


@pytest.fixture
def attention(request: pytest.FixtureRequest) -> str:
    if request.param == "flash_attention_2":
        request.getfixturevalue("flash_kernels")
    return str(request.param)


def rewrites_of(vlm: VLM, inputs: Mapping[str, Any], case: Case, recorder: Recorder) -> dict[int, Rewrite]:
    """Return how the reference changes hidden states: by itself where it can, else as the pruner did."""
    if not case.merges:
        return {}
    if isinstance(recorder.inner, (Merge, Rewriting)):
        visual = inputs["input_ids"] == vlm.model.config.image_token_id
        return {recorder.layers[0]: lambda hidden: Merge.merged(hidden, visual)}
    return {depth: lambda hidden, depth=depth: recorder.rewrite(depth, hidden) for depth in recorder.handed}


@pairwise(name=CASES, family=FAMILIES, kind=BATCHES, attention=ATTENTION, indirect=["attention"])
def test_generation_equals_the_masked_reference(name: str, family: str, kind: str, attention: str):
    case, reference = CASES[name], shared(family, "eager" if attention == "eager" else "sdpa")
    vlm = flashing(family) if attention == "flash_attention_2" else reference
    request = batch_of(vlm, kind)
    inputs = prompt_inputs(vlm, request)
    recorder = Recorder(case.make(vlm, request))
    with torch.no_grad(), pruned(vlm, recorder, inputs, request) as run:
        out = without_stop(vlm, inputs)
    masked = masked_by(vlm, inputs, run, renumber=case.renumber, rewrites=rewrites_of(vlm, inputs, case, recorder))
    seen, temporary = [slots.sum(dim=1) for slots in masked.prefill], 0
    if case.cut is not None:
        # The layers behind saw everything, the temporary token too; what their caches keep is another matter.
        behind = masked.decode[case.cut] if name == "glimpse" else masked.decode[0]
        masked.decode = [behind if depth < case.cut else slots for depth, slots in enumerate(masked.decode)]
        temporary = case.cut
    tokens, logits = masked_greedy(reference, inputs, masked, STEPS)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, rtol=0, atol=CLOSE)
    # What each layer saw and its cache holds, and what the run says of it.
    slots = [held.sum(dim=1) for held in masked.decode]
    assert all(map(torch.equal, run.cached, slots)) and len(run.cached) == len(run.kept) == LAYERS
    assert all(torch.equal(run.slots[i], seen[i] + (i < temporary)) for i in range(LAYERS))
    lengths = [layer.keys.shape[2] for layer in cache_of_output(out).layers]
    assert lengths == [int(count.max()) + STEPS - 1 for count in slots]
    budget = recorder.inner.keep_ratio
    counts = torch.tensor(request.counts)
    if isinstance(recorder.inner, Guided):
        assert torch.equal(run.kept[-1].sum(dim=1), (counts * budget + 1e-6).long().clamp(min=1))
        assert torch.equal(run.kept[-1], recorder.inner.keep)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_an_appended_token_sees_the_prompt_from_behind_its_end(family: str, kind: str):
    vlm = shared(family)
    inputs = prompt_inputs(vlm, batch_of(vlm, kind))
    pruner = Glimpse(3, vlm.width)
    with torch.no_grad(), pruned(vlm, pruner, inputs) as run:
        vlm.model(**inputs)
    valid = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, 1), value=True)
    masked = masked_by(vlm, inputs, run)
    masked.prefill = masked.decode = [valid] * LAYERS

    def add(depth: int) -> Rewrite:
        return lambda hidden: torch.cat([hidden[:, :-1], hidden[:, -1:] + pruner.tokens[depth]], dim=1)

    masked.rewrites = {1: add(1), 2: add(2)}
    with torch.no_grad():
        token = pruner.tokens[0].expand(len(valid), 1, -1)
        _, before = masked_states(vlm, torch.cat([embed(vlm, inputs), token], dim=1), valid, masked)
    assert pruner.found is not None
    torch.testing.assert_close(pruner.found, before[3][:, -1], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_pruners_read_is_that_of_the_eager_model(family: str):
    eager = shared(family, "eager")
    inputs = prompt_inputs(eager, batch_of(eager, "padded"))
    with torch.no_grad():
        paid = eager.model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == eager.model.config.image_token_id

    def by_token(rows: Tensor) -> list[Tensor]:
        return [row[slots] for row, slots in zip(rows, visual, strict=True)]

    for vlm in (eager, shared(family)):
        for pruner, layer in ((LastRow(2), 1), (Coming(), 1)):
            if isinstance(pruner, Coming):
                pruner.layers = (1,)
            with torch.no_grad(), pruned(vlm, pruner, inputs):
                vlm.model(**inputs)
            assert pruner.importance is not None
            for ours, theirs in zip(pruner.importance, by_token(paid[layer].mean(dim=1)[:, -1]), strict=True):
                torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-6)
                assert bool((ours[len(theirs) :] == -torch.inf).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention's own kernels need a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_on_a_device(family: str):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    vlm = build(family)
    request = batch_of(vlm, "padded").to("cuda")
    for name in ("guided at 0", "guided at 2", "guided at 3, renumbered"):
        outcomes = []
        for attention in ("sdpa", "flash_attention_2"):
            vlm.model.to("cuda", torch.bfloat16).set_attn_implementation({"text_config": attention})
            inputs = prompt_inputs(vlm, request)
            with torch.no_grad(), pruned(vlm, CASES[name].make(vlm, request), inputs, request):
                outcomes.append(vlm.model(**inputs, logits_to_keep=1).logits.float())
        torch.testing.assert_close(*outcomes, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_reference_without_a_pruner_is_the_model(family: str, implementation: str):
    vlm = shared(family, implementation)
    inputs = prompt_inputs(vlm, batch_of(vlm, "padded"))
    tokens, logits = masked_greedy(vlm, inputs, Masked([inputs["attention_mask"].bool()] * LAYERS), STEPS)
    out = without_stop(vlm, inputs)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, rtol=0, atol=CLOSE)
