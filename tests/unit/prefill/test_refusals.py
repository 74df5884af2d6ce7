"""What cannot be pruned is refused early, in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.request import Request
from tests.tiny import QUESTIONS, row_of
from tests.unit.prefill.made import Given, Masks, ask, build, hooks, random_masks, shared, without_stop


class World(NamedTuple):
    vlm: VLM
    request: Request
    inputs: dict[str, Any]


@cache
def world() -> World:
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    without_stop(vlm, inputs)  # transformers puts hooks of its own on a model when it first runs
    return World(vlm, request, inputs)


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    """Whatever was refused, the model has no hook afterwards."""
    before = hooks(world().vlm.model)
    yield
    assert hooks(world().vlm.model) == before


def use(pruner: Pruner | None = None, model: Any = None, inputs: Any = None, **options: Any) -> None:
    """Open `pruned` and call nothing."""
    options.setdefault("request", world().request)
    with pruned(
        world().vlm if model is None else model,
        pruner or KeepAll(),
        world().inputs if inputs is None else inputs,
        **options,
    ):
        pass


def halves() -> Masks:
    return Masks({2: random_masks(world().request, 0.5)})


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.5, float("nan")])
def test_budgets(ratio: float):
    with pytest.raises(ConfigError, match=rf"keep_ratio, the share .* must be in \(0, 1\], got {ratio}"):
        Guided(Given(), keep_ratio=ratio)
    with pytest.raises(ConfigError, match="keep_ratio"):
        Guided(Given()).at(ratio)


@pytest.mark.parametrize("options", [{"layer": -1}, {"max_tiles_kept": 0}])
def test_numbers_of_a_guided_pruner(options: dict[str, int]):
    with pytest.raises(ConfigError, match="layer must be at least 0 and max_tiles_kept at least 1, got"):
        Guided(Given(), **options)


@pytest.mark.parametrize("depth", [5, 40, -1])
def test_layers_that_are_not_there(depth: int):
    with pytest.raises(ConfigError, match=f"cannot prune before layer {depth}: the model has the layers 0 to 4"):
        use(Masks({depth: random_masks(world().request, 0.5)}))


def test_models_of_other_families():
    config = Qwen2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8)
    for model in (Qwen2ForCausalLM(config), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=f"{type(model).__name__} is of no family .* InternVL and Llava"):
            use(model=model)


def test_sliding_windows():
    vlm = build("internvl")
    vlm.decoder.config.layer_types = ["full_attention"] * 4 + ["sliding_attention"]
    with pytest.raises(
        ConfigError, match=r"needs full attention in every decoder layer, got full_.*, sliding_attention"
    ):
        use(model=vlm)


def test_sliding_windows_that_only_a_width_tells():
    # As Mistral's configuration has it, without a kind for each layer.
    vlm = build("llava")
    vlm.decoder.config.layer_types, vlm.decoder.config.sliding_window = None, 6
    with pytest.raises(ConfigError, match=r"needs full attention in every decoder layer, got sliding_attention"):
        use(model=vlm)


def embedded() -> dict[str, Any]:
    return {"inputs_embeds": torch.zeros(3, 31, 48), "attention_mask": world().inputs["attention_mask"]}


def with_mask(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {**world().inputs, "attention_mask": change(world().inputs["attention_mask"])}


BAD_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "embeddings alone": (lambda: {"inputs": embedded()}, r"without input_ids .* pass visual=, bool \(B, N\)"),
    "ids of None": (lambda: {"inputs": {**world().inputs, "input_ids": None}}, "without input_ids"),
    "a longer mask": (
        lambda: {"inputs": with_mask(lambda mask: torch.cat([mask, mask[:, -2:]], dim=1))},
        r"the prompt has \(3, 31\) slots and the attention mask is \(3, 33\).*cannot go on from a cache",
    ),
    "a row without an image": (
        lambda: {
            "inputs": {**world().inputs, "input_ids": world().inputs["input_ids"].index_fill(0, torch.tensor([1]), 20)}
        },
        "row 1 has no visual token: there is nothing to prune; leave it out",
    ),
    "an image that is padding": (
        lambda: {"inputs": with_mask(lambda mask: mask * torch.tensor([[1], [1], [0]]))},
        "row 2 has no visual token",
    ),
    "another request": (
        lambda: {"request": ask(world().vlm, images=(0, 2, 1))},
        r"the prompts hold \[12, 4, 20\] visual tokens and the request's images \[12, 20, 4\]",
    ),
    "fewer questions": (lambda: {"request": row_of(world().request, 0)}, r"and the request's images \[12\]"),
    "no request for a guide": (
        lambda: {"request": None, "pruner": Guided(Given())},
        r"a guide reads questions and tiles: call pruned\(model, pruner, inputs, request\)",
    ),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_inputs_that_do_not_fit(what: str):
    make, message = BAD_INPUTS[what]
    with pytest.raises(ConfigError, match=message):
        use(**make())


class Wrong(Guide):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, request: Request) -> Tensor:
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(3, 19), (2, 20), (3, 21), (20,)])
def test_guides_of_other_shapes(shape: tuple[int, ...]):
    message = rf"importance of shape \({shape[0]}.* for 3 rows of up to 20 visual tokens: pair guide and answer model"
    with pytest.raises(ConfigError, match=message):
        use(Guided(Wrong(*shape)))


GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "static cache": ({"cache_implementation": "static"}, "takes a DynamicCache of plain layers; got StaticCache of "),
    "chunks": ({"prefill_chunk_size": 8}, "31 slots comes in parts, the first of 8: .* leave prefill_chunk_size unset"),
    "no cache": ({"use_cache": False}, "got 1 slots behind the prompt and no cache: .* leave use_cache on"),
    "a draft of its own first layers": ({"assistant_early_exit": 2}, "assistant_early_exit drafts with the first"),
}


@pytest.mark.parametrize("what", GENERATE)
def test_ways_to_generate(what: str):
    options, message = GENERATE[what]
    with pruned(world().vlm, halves(), world().inputs, world().request), pytest.raises(ConfigError, match=message):
        without_stop(world().vlm, world().inputs, **options)


@torch.no_grad()
def test_caches_with_layers_of_another_kind():
    vlm, request, inputs = world()
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(5)]
    message = "got DynamicCache of DynamicSlidingWindowLayer"
    with pruned(vlm, halves(), inputs, request), pytest.raises(ConfigError, match=message):
        vlm.model(**inputs, **{cache_keyword(vlm.model): cache})


def test_other_inputs_than_were_announced():
    others = prompt_inputs(world().vlm, ask(world().vlm, QUESTIONS[:2]))
    with (
        pruned(world().vlm, halves(), world().inputs, world().request),
        pytest.raises(ConfigError, match="other inputs than pruned"),
    ):
        without_stop(world().vlm, others)


@torch.no_grad()
def test_going_on_from_another_runs_cache():
    step = {"input_ids": torch.full((3, 1), 7), "attention_mask": torch.ones(3, 32, dtype=torch.long)}
    full = cache_of_output(world().vlm.model(**world().inputs, use_cache=True))
    with pruned(world().vlm, halves(), world().inputs, world().request):
        with pytest.raises(ConfigError, match="the cache holds a prompt already: open pruned"):
            world().vlm.model(**step, **{cache_keyword(world().vlm.model): full})
        # Its own prefill's cache goes on, but not with other rows.
        own = cache_of_output(world().vlm.model(**world().inputs, **{cache_keyword(world().vlm.model): DynamicCache()}))
        with pytest.raises(ConfigError, match="the prefill had 3 rows, this step has 2"):
            world().vlm.model(input_ids=step["input_ids"][:2], **{cache_keyword(world().vlm.model): own})


class CutsLate(Pruner):
    """Drops at one depth, and at another from all layers behind."""

    layers = (1, 3)

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth == 3:
            return state.keep(~state.visual | (state.token < 2), full_depth=True)
        # The longest row may stay whole, so that widths agree and slots do not.
        longest = state.valid.sum(dim=1, keepdim=True) == state.valid.shape[1]
        few = ~state.visual | (state.token < 3) | (longest & (self.first == 1))
        return state.keep(few) if depth == 1 else state


@pytest.mark.parametrize("first", [0, 1])
def test_a_full_depth_cut_behind_another_cut(first: int):
    vlm, _, inputs = world()
    with (
        pruned(vlm, CutsLate(first), inputs),
        pytest.raises(ConfigError, match="full_depth needs layers behind that all"),
    ):
        without_stop(vlm, inputs)


def test_tiles_that_the_guide_did_not_see():
    # Twice the images: as many placeholders as tokens would be too many, so the tiles are counted first.
    pixels = world().inputs["pixel_values"].repeat(2, 1, 1, 1)
    with (
        pruned(world().vlm, Guided(Given(), 0, 0.1), world().inputs, world().request),
        pytest.raises(
            ConfigError,
            match=r"pixel_values of \(9, 3, 32, 32\) were announced and the vision tower gets \(18, 3, 32, 32\)",
        ),
    ):
        without_stop(world().vlm, {**world().inputs, "pixel_values": pixels})
