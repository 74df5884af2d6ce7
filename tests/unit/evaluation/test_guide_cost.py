"""What scoring costs, as the report has it, against what torch counts while guides and pruners run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.evaluation.guide_cost import guide_flops, scoring_flops
from pgp_lightning.guides.attention import AttentionGuide
from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion, OracleGuide, RandomGuide, UniformGuide
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.fastv import FastV, attention_received
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles
from tests.tiny import GRIDS, QUESTIONS, WIDTH, row_of, tiny_request
from tests.unit.guides.made import make
from tests.unit.prefill.made import ask, shared


def counted(run: Callable[[], object]) -> int:
    """What torch counts in a call; its formulas lack the CPU's attention kernel, grouped key heads and vectors."""

    def attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
        (rows, heads, queries, width), keys = query, key[2]
        return int(4 * rows * heads * queries * keys * width)

    def by_vector(matrix: Any, vector: Any, **options: Any) -> int:
        return int(2 * matrix[0] * matrix[1])

    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention, torch.ops.aten.mv: by_vector}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.fixture
def asked() -> Request:
    """Four questions of different lengths about three images of different sizes, one with a system text of its own."""
    system = "what color is what and where is it " * 3
    return replace(tiny_request(QUESTIONS, images=(0, 1, 2, 0)), systems=[None, system, None, None])


@pytest.mark.parametrize("order", ["question_first", "image_first"])
@pytest.mark.parametrize(("rank", "head_layers"), [(4, 2), (0, 1)])
def test_the_posterior_guide(tiny_base: str, asked: Request, order: str, rank: int, head_layers: int):
    guide = make(tiny_base, lora_rank=rank, head_layers=head_layers, bottleneck_order=order)
    found = guide_flops(guide, asked)
    assert len(set(found)) > 2
    for row, flops in enumerate(found):
        alone = row_of(asked, row)
        assert flops == pytest.approx(counted(lambda: guide(alone)), rel=0.01)  # noqa: B023
    # Rows of a batch cost what each costs by itself.
    assert found == [guide_flops(guide, row_of(asked, row))[0] for row in range(4)]


@pytest.mark.parametrize("order", ["question_first", "image_first"])
@pytest.mark.parametrize("longest", [1, 6])
def test_the_attention_guide(tiny_base: str, asked: Request, order: Any, longest: int):
    guide = AttentionGuide(tiny_base, rows="prompt", order=order, max_new_tokens=longest)
    together = guide(asked)
    found = guide_flops(guide, asked)
    assert together.shape == (4, 20)
    for row, flops in enumerate(found):
        alone = row_of(asked, row)
        # Generating counts too, with the head on the last slot alone.
        assert flops == pytest.approx(counted(lambda: guide(alone)), rel=0.01)  # noqa: B023
        assert guide_flops(guide, alone) == [flops]


@pytest.mark.parametrize("rows", ["prompt_after_image", "answer"])
def test_the_attention_guide_with_fewer_rows(tiny_base: str, asked: Request, rows: Any):
    guide = AttentionGuide(tiny_base, rows=rows, max_new_tokens=3)
    alone = row_of(asked, 2)
    run = counted(lambda: guide(alone))
    assert guide_flops(guide, alone)[0] == pytest.approx(run, rel=0.01)


def test_what_a_guide_answered_counts(tiny_base: str, asked: Request, monkeypatch: pytest.MonkeyPatch):
    guide = AttentionGuide(tiny_base, max_new_tokens=6)
    with pytest.raises(RuntimeError, match="answered nothing yet"):
        guide_flops(guide, asked)
    guide(asked)
    assert guide.attended is not None
    stop = guide.vlm.processor.stop_id
    tokens = torch.full((4, 6), stop + 1)
    lengths = []
    for length in (1, 3, 6):
        tokens[:, length - 1 :] = stop
        guide.attended = guide.attended._replace(tokens=tokens.clone())
        lengths.append(guide_flops(guide, asked)[0])
        tokens[:] = stop + 1
    assert lengths[0] < lengths[1] < lengths[2]


def test_wrappers_cost_what_they_wrap(tiny_base: str, asked: Request):
    guide = make(tiny_base)
    own = guide_flops(guide, asked)
    assert guide_flops(Remember(guide), asked) == own
    longer = [f"{QUESTIONS[0]} and {question}" for question in asked.questions]
    others = replace(asked, other_questions=longer)
    assert guide_flops(AnotherQuestion(guide), others) == guide_flops(guide, replace(asked, questions=longer)) != own
    assert guide_flops(Remember(AnotherQuestion(Remember(guide))), others) == guide_flops(
        AnotherQuestion(guide), others
    )


@pytest.mark.parametrize(
    "guide", [RandomGuide(), UniformGuide(), OracleGuide()], ids=lambda guide: type(guide).__name__
)
def test_guides_without_a_model_cost_nothing(guide: Guide, asked: Request):
    assert guide_flops(guide, asked) == [0, 0, 0, 0]


class Learned(Guide):
    """A guide that runs a model, and says nothing of what it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 2)

    def forward(self, request: Request) -> Tensor:
        return UniformGuide()(request)


class LearnedPruner(Pruner):
    """A pruner with a model of its own, here inside a guide."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Remember(Learned())


def test_what_runs_a_model_and_is_not_registered_has_unknown_costs(tiny_base: str, asked: Request):
    unknown, vlm = [None] * 4, load_vlm(tiny_base)
    others = replace(asked, other_questions=asked.questions)
    for guide in (Learned(), Remember(Learned()), AnotherQuestion(Learned()), Remember(AnotherQuestion(Learned()))):
        assert guide_flops(guide, others) == unknown
        assert scoring_flops(Guided(guide), vlm, others, [9] * 4) == unknown
    assert scoring_flops(LearnedPruner(), vlm, asked, [9] * 4) == unknown


class Own(Guide):
    """A guide that the package does not know."""

    def forward(self, request: Request) -> Tensor:
        return UniformGuide()(request)


class OwnPruner(Pruner):
    """A pruner that the package does not know."""


class Priced(Own):
    """One that says what it costs."""


class PricedPruner(OwnPruner):
    """One that says what it costs."""


def test_a_guide_or_pruner_of_ones_own_says_what_it_costs(tiny_base: str, asked: Request):
    vlm = load_vlm(tiny_base)
    assert guide_flops(Own(), asked) == scoring_flops(OwnPruner(), vlm, asked, [9] * 4) == [0] * 4

    @guide_flops.register
    def _(guide: Priced, request: Request) -> list[int]:
        return request.counts

    @scoring_flops.register
    def _(pruner: PricedPruner, vlm: VLM, request: Request, text: list[int]) -> list[int]:
        return text

    assert guide_flops(Priced(), asked) == guide_flops(Remember(Priced()), asked) == [12, 4, 20, 12]
    assert scoring_flops(Guided(Priced()), vlm, asked, [9] * 4) == [12, 4, 20, 12]
    assert scoring_flops(PricedPruner(), vlm, asked, [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_pruners(tiny_base: str, asked: Request):
    vlm, guide = load_vlm(tiny_base), make(tiny_base)
    assert scoring_flops(Guided(guide, layer=1), vlm, asked, [9] * 4) == guide_flops(guide, asked)
    for pruner in (KeepAll(), Guided(UniformGuide())):
        assert scoring_flops(pruner, vlm, asked, [9] * 4) == [0] * 4


@pytest.mark.parametrize("score_layer", [1, 2])
def test_fastv_with_a_scoring_pass_of_its_own(tiny_base: str, asked: Request, score_layer: int):
    vlm = load_vlm(tiny_base)
    vlm.model.eval()
    for row in range(4):
        alone = row_of(asked, row)
        inputs = prompt_inputs(vlm, alone)
        text = [inputs["input_ids"].shape[1] - alone.counts[0]]
        pruner = FastV(layer=0, score_layer=score_layer)

        def score() -> None:
            with pruner.attached(vlm, inputs, alone):  # noqa: B023
                pass

        assert scoring_flops(pruner, vlm, alone, text) == [pytest.approx(counted(score), rel=0.01)]


@pytest.mark.parametrize("query", ["last", "all"])
def test_fastv_with_the_attention_of_a_layer_before_the_cut(tiny_base: str, asked: Request, query: Any):
    vlm, text = load_vlm(tiny_base), [9] * 4
    found = scoring_flops(FastV(layer=1, query=query), vlm, asked, text)
    for count, flops in zip(asked.counts, found, strict=True):
        hidden, rope = torch.randn(1, count + 9, WIDTH), torch.randn(1, count + 9, WIDTH // 4)
        valid = torch.ones(1, count + 9, dtype=torch.bool)
        run = partial(attention_received, vlm.decoder_layers[0], hidden, (rope, rope), valid, query)
        assert flops == pytest.approx(counted(run), rel=0.01)


BESIDE: dict[str, Callable[[], Any]] = {
    "visionzip": lambda: VisionZip(0.4),
    "visionzip, columns, input": lambda: VisionZip(0.4, score="column", merge_at="input"),
    "visionzip, class, output": lambda: VisionZip(0.6, 0.4, score="class", merge_at="output"),
    "visionzip, dominant": lambda: VisionZip(0.6, 0.0),
    "divprune": lambda: DivPrune(0.4),
    "divprune, rounded": lambda: DivPrune(0.4, rounding="round"),
    "divprune, tiles": lambda: DivPrune(0.4, scope="tile"),
    "fastv": lambda: FastV(1, 0.4),
    "fastv, all": lambda: FastV(1, 0.4, "all"),
    "fastv, all, alone": lambda: FastV(0, 0.4, "all"),
}


@cache
def answer_model(name: str) -> tuple[VLM, Request]:
    """Return a model and questions; the embedded model's 320 visual tokens are more than a block of any routine."""
    if name != "embedded":
        return shared(name), ask(shared(name))
    vlm, scene = load_vlm("embedded:answer_model"), draw_scene("test", 0)
    tiles, grid = cut_tiles(Image.fromarray(scene.image), vlm.processor.rule)
    return vlm, Request([scene.questions[0].text], torch.from_numpy(tiles), [grid])


@pytest.mark.parametrize("name", ["internvl", "llava", "embedded"])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_a_prefill_takes_beside_the_answer_model(name: str, kind: str):
    vlm, request = answer_model(name)
    for row in range(len(request) if name == "internvl" else 1):
        alone, pruner = row_of(request, row), BESIDE[kind]()
        inputs = prompt_inputs(vlm, alone)
        text = [inputs["input_ids"].shape[1] - alone.counts[0]]
        kept: list[int] = []

        def prefill(pruner: Pruner) -> None:
            with pruned(vlm, pruner, inputs, alone) as run:  # noqa: B023
                vlm.model(**inputs, logits_to_keep=1)  # noqa: B023
            kept.append(int(run.kept[-1].sum()))  # noqa: B023

        whole = counted(lambda: prefill(pruner))  # noqa: B023
        # The same schedule, with scores that cost nothing.
        free = FirstTokens(kept[0], pruner.layers[0])
        rest = counted(lambda: prefill(free))  # noqa: B023
        (flops,) = scoring_flops(pruner, vlm, alone, text)
        assert kept[1] == kept[0]
        assert flops == pytest.approx(whole - rest, rel=0.01)
        assert flops > 0


class FirstTokens(Pruner):
    """Keeps the first tokens of a single row."""

    def __init__(self, count: int, layer: int) -> None:
        super().__init__()
        self.count, self.layers = count, (layer,)

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if (depth,) != self.layers:
            return state
        return state.keep_tokens(torch.arange(int(state.counts[0]))[None] < self.count)


def test_images_of_a_request_count_by_row(tiny_base: str):
    guide = make(tiny_base)
    turned = tiny_request((QUESTIONS[0],) * 2, GRIDS, (2, 0))
    large, small = guide_flops(guide, turned)
    assert large > small == guide_flops(guide, tiny_request(QUESTIONS[:1], GRIDS[:1]))[0]
    assert isinstance(guide, PosteriorGuide)
