"""Closed forms of FLOPs and cache entries, against torch's counter and the caches of models that run."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration, LlamaConfig

from pgp_lightning.attention import watch_attention
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation import flops
from pgp_lightning.evaluation.cost import (
    PAPER,
    PAPER_GUIDE,
    Schedule,
    break_even,
    break_even_table,
    kv_cost,
    prune_cost,
    table,
)
from pgp_lightning.guides.base import Guide
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import VICUNA, Llava
from pgp_lightning.vlm.memory import geometry
from pgp_lightning.vlm.processor import Processor
from pgp_lightning.vlm.tiles import TileGrid, TileRule
from tests.tiny import GRIDS, QUESTIONS, tiny_model, tiny_processor, tiny_request
from tests.tiny_llava import PATCH, SIDE, llava_model, llava_tokenizer


def counted(run: Any) -> int:
    """What torch counts in a call. Its formulas lack the CPU's attention kernel, and grouped key heads."""

    def attention(query, key, value, *rest, **options):
        (rows, heads, queries, width), keys = query, key[2]
        return 4 * rows * heads * queries * keys * width

    aten = torch.ops.aten
    kernels = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def llama_style() -> InternVLForConditionalGeneration:
    """InternLM2 as transformers runs it, a Llama with grouped heads, here with heads wider than width / heads."""
    config = copy.deepcopy(tiny_model().config)
    config.text_config = LlamaConfig(
        hidden_size=48,
        head_dim=16,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=56,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def middle() -> InternVLForConditionalGeneration:
    """A model whose parts weigh against each other as in released ones, 64 tokens a tile."""
    config = copy.deepcopy(tiny_model().config)
    vision, text = config.vision_config, config.text_config
    vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = 192, 768, 6
    vision.num_hidden_layers, vision.image_size, vision.patch_size = 4, (224, 224), (14, 14)
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 256, 1024, 8, 2
    text.num_hidden_layers, text.vocab_size, text.layer_types = 6, 2000, ["full_attention"] * 6
    config.image_seq_length = 64
    return InternVLForConditionalGeneration(config)


def internvl(model: InternVLForConditionalGeneration) -> tuple[InternVL, Any]:
    return InternVL(model.eval(), tiny_processor(), "test"), tiny_request(QUESTIONS[:1], GRIDS[:1])


def middle_pair() -> tuple[InternVL, Any]:
    processor = replace(tiny_processor(), rule=TileRule(224, 8, max_tiles=4), max_length=1024)
    tiles = torch.zeros(3, 3, 224, 224, dtype=torch.uint8)
    request = replace(tiny_request(QUESTIONS[:1], GRIDS[:1]), tiles=tiles, grids=[TileGrid(2, 1, 8, True)])
    return InternVL(middle().eval(), processor, "test"), request


def llava() -> tuple[Llava, Any]:
    rule = TileRule(SIDE, SIDE // PATCH, 1, 1, thumbnail=False, fit="pad")
    vlm = Llava(llava_model().eval(), Processor(llava_tokenizer(), rule, VICUNA, 256), "test")
    grid = TileGrid(1, 1, SIDE // PATCH, False)
    return vlm, replace(tiny_request(QUESTIONS[:1], GRIDS[1:2]), grids=[grid])


PAIRS = {
    "qwen2": lambda: internvl(tiny_model()),
    "llama": lambda: internvl(llama_style()),
    "llava": llava,
    "middle": middle_pair,
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and a request of one question."""
    return PAIRS[request.param]()


class First(Pruner):
    """Keeps the first k visual tokens from layer L on."""

    def __init__(self, count: int, layer: int) -> None:
        super().__init__()
        self.count, self.layers = count, (layer,)

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        return state.keep_tokens(torch.arange(int(state.counts.max()))[None] < self.count)


def prompt(vlm: Any, request: Any) -> dict[str, Tensor]:
    p = vlm.processor.prompt(request.questions[0], None, "image_first")
    ids = torch.tensor([[*p.before, *[vlm.processor.context_id] * request.counts[0], *p.after]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": vlm.normalise(request.tiles, vlm.model.dtype),
    }


def answer(vlm: Any, inputs: dict[str, Tensor], new_tokens: int) -> Any:
    """Generate an answer of exactly so many tokens."""
    return vlm.model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip


def test_towers_and_projectors(pair):
    vlm, request = pair
    config, tiles = vlm.model.config, len(request.tiles)
    pixels = vlm.normalise(request.tiles)
    tower = flops.vision_flops(config, tiles)
    assert counted(lambda: vlm.vision_tower(pixels)) == tower
    # LLaVA's tower runs to its end, although the projector reads the last layer but one.
    assert counted(lambda: vlm.encode(pixels)) == tower + flops.projector_flops(config, tiles)
    assert vlm.encode(pixels).shape[1] == flops.tokens_per_tile(config)


@pytest.mark.parametrize(("kept", "layer"), [(None, 0), (3, 0), (2, 1), (0, 1)])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_answering_costs_what_torch_counts_and_caches_what_the_cache_holds(pair, kept, layer, new_tokens):
    vlm, request = pair
    config, visual, tiles = vlm.model.config, request.counts[0], len(request.tiles)
    inputs = prompt(vlm, request)
    text = inputs["input_ids"].shape[1] - visual
    schedule = Schedule.cut(flops.Decoder(config).depth, visual, visual if kept is None else kept, layer)
    found: list[Any] = []

    def run() -> None:
        pruner = Pruner() if kept is None else First(kept, layer)
        with pruned(vlm, pruner, inputs) as log:
            found.append(answer(vlm, inputs, new_tokens))
            found.append([int(n) for n in log.slots])

    total = counted(run)
    cost = prune_cost(config, schedule, tiles=tiles, text=text, new_tokens=new_tokens, guide=7)
    assert cost.total - 7 == cost.answer_model == total
    assert (cost.decode == 0) == (new_tokens == 1)
    cache, slots = cache_of_output(found[0]), found[1]
    held = kv_cost(config, schedule.slots(text), new_tokens - 1, torch.float32)
    assert [layer.keys.shape[2] for layer in cache.layers] == list(held.layers)
    assert slots == list(schedule.slots(text))
    assert held.size == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert held.entries == sum(held.layers)


def test_a_schedule_of_several_cuts():
    vlm, request = internvl(llama_style())
    inputs, config = prompt(vlm, request), vlm.model.config

    class Steps(Pruner):
        layers = (0, 1, 2)

        def before_layer(self, depth, state):
            return state.keep_tokens(torch.arange(12)[None] < (10, 7, 1)[depth])

    with pruned(vlm, Steps(), inputs) as log:
        total = counted(lambda: answer(vlm, inputs, 4))
    schedule = Schedule(12, tuple(int(kept.sum()) for kept in log.kept))
    assert (schedule.layers, schedule.kept, schedule.average) == ((10, 7, 1), 1, 6)
    text = inputs["input_ids"].shape[1] - 12
    assert prune_cost(config, schedule, tiles=3, text=text, new_tokens=4).total == total


@pytest.mark.parametrize(("rank", "head_layers"), [(0, 2), (5, 1), (5, 2)])
def test_the_posterior_guides_pass(pair, rank, head_layers):
    vlm, request = pair
    guide = PosteriorGuide(vlm, lora_rank=rank, head_layers=head_layers).eval()
    before = len(vlm.processor.prompt(request.questions[0], None, "question_first").before)
    expected = flops.posterior_flops(
        vlm.model.config, len(request.tiles), before, lora_rank=rank, head_layers=head_layers
    )
    assert counted(lambda: guide(request)) == expected


@pytest.mark.parametrize("new_tokens", [1, 6])
def test_an_attention_guides_pass(pair, new_tokens):
    vlm, request = pair
    inputs = prompt(vlm, request)
    before = len(vlm.processor.prompt(request.questions[0], None, "image_first").before)
    text = inputs["input_ids"].shape[1] - request.counts[0]

    def run() -> None:
        with ExitStack() as stack:
            for layer in vlm.decoder_layers:
                stack.enter_context(watch_attention(layer.self_attn, lambda rows: None, last=text - before + 1))
            answer(vlm, inputs, new_tokens)

    rows = text - before + 1
    expected = flops.attention_flops(vlm.model.config, len(request.tiles), text, new_tokens=new_tokens, rows=rows)
    assert counted(run) == expected


def test_fastv_pays_one_row_of_a_layer_that_has_not_run(pair):
    vlm, request = pair
    inputs, config = prompt(vlm, request), vlm.model.config
    visual, slots = request.counts[0], inputs["input_ids"].shape[1]
    decoder = flops.Decoder(config)
    with pruned(vlm, FastV(layer=1, keep_ratio=2 / visual), inputs):
        total = counted(lambda: answer(vlm, inputs, 2))
    schedule = Schedule.cut(decoder.depth, visual, 2, 1)
    cost = prune_cost(config, schedule, tiles=len(request.tiles), text=slots - visual, new_tokens=2)
    assert cost.total + decoder.rows(1, slots, project=True) == total


@pytest.mark.parametrize("name", ["InternVL2-1B", "InternVL2-26B", "llava-1.5-7b"])
def test_released_geometries_on_the_meta_device(name: str):
    """Shapes alone are counted: nothing is computed."""
    config = geometry(name)
    tiles, text = (1, 60) if "llava" in name else (5, 150)
    vision: Any = config.vision_config
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(copy.deepcopy(config)).eval()
        pixels = torch.zeros(tiles, 3, side, side)
        visual = tiles * flops.tokens_per_tile(config)
        prompt = torch.zeros(1, visual + text, config.text_config.hidden_size)
    expected = flops.vision_flops(config, tiles) + flops.projector_flops(config, tiles)
    assert counted(lambda: model.get_image_features(pixel_values=pixels)) == expected
    slots = [visual + text] * config.text_config.num_hidden_layers
    assert counted(lambda: model.model.language_model(inputs_embeds=prompt)) == flops.prefill_flops(config, slots)
    assert counted(lambda: model.lm_head(prompt[:, -1])) == flops.head_flops(config)


def test_table_3_of_the_paper():
    """5 tiles and 150 slots of text, which the paper does not say, give its figures to 5 %."""
    config, base = geometry("InternVL2-26B"), geometry("InternVL2-1B")
    guide = flops.posterior_flops(base, 5, 150)
    assert guide / 1e12 == pytest.approx(PAPER_GUIDE, rel=0.05)
    assert guide / 1e12 == pytest.approx(4.8, abs=0.05)
    ours = {(1.0, 0): 116.0, (0.2, 9): 83.0, (0.05, 2): 70.1, (0.05, 0): 68.1}
    for (ratio, layer), paper in PAPER.items():
        cost = prune_cost(config, Schedule.cut(48, 1280, int(1280 * ratio), layer), tiles=5, text=150, guide=guide)
        assert cost.answer_model / 1e12 == pytest.approx(paper, rel=0.05)
        assert cost.answer_model / 1e12 == pytest.approx(ours[ratio, layer], abs=0.05)


def test_the_table_prints_ours_beside_the_papers():
    lines = table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in cells] == ["all", "20 %, 9", "5 %, 2", "5 %, 0", "2.5 %, 2", "2.5 %, 0"]
    assert [row[4] for row in cells[:4]] == ["116.0", "83.0", "70.1", "68.1"]
    assert [row[8] for row in cells[:4]] == ["117.7", "4.7 + 83.4", "4.7 + 69.3", "4.7 + 67.3"]
    assert cells[3][1] == "64, 64" and cells[2][1] == "64, 115" and cells[1][1] == "256, 448"
    # Below layer L every token is read, so that tiles can be skipped at L = 0 only.
    assert [bool(row[6]) for row in cells] == [False, False, False, True, False, True]
    assert "here 1" in table(tiles_encoded=1).splitlines()[0]


def test_skipped_tiles_cost_nothing_but_must_not_be_needed():
    config = geometry("InternVL2-8B")
    schedule = Schedule.cut(32, 1280, 64)
    whole, some = (prune_cost(config, schedule, tiles=5, text=60, tiles_encoded=n) for n in (None, 2))
    assert (some.vision, some.projector) == (whole.vision * 2 // 5, whole.projector * 2 // 5)
    assert (some.prefill, some.decode) == (whole.prefill, whole.decode)
    for wrong in (Schedule.cut(32, 1280, 64, 2), Schedule.cut(32, 1280, 513)):
        with pytest.raises(ConfigError, match="tiles_encoded"):
            prune_cost(config, wrong, tiles=5, text=60, tiles_encoded=2)
    with pytest.raises(ConfigError, match="tiles_encoded"):
        prune_cost(config, schedule, tiles=5, text=60, tiles_encoded=6)


@pytest.mark.parametrize("kept", [3, 5])
def test_tiles_that_a_pruner_skips(kept):
    """Tiles have 4 tokens; a guide that likes the last ones leaves 1 or 2 of 3 tiles to encode."""

    class Last(Guide):
        def forward(self, request):
            return torch.arange(12, dtype=torch.float32)[None]

    vlm, request = internvl(tiny_model())
    inputs, new = prompt(vlm, request), 3
    with pruned(vlm, Guided(Last(), keep_ratio=kept / 12), inputs, request):
        total = counted(lambda: answer(vlm, inputs, new))
    text = inputs["input_ids"].shape[1] - 12
    schedule = Schedule.cut(2, 12, kept)
    cost = prune_cost(vlm.model.config, schedule, tiles=3, text=text, new_tokens=new, tiles_encoded=-(-kept // 4))
    assert cost.total == total


def test_schedules():
    schedule = Schedule.cut(48, 1280, 256, 9)
    assert schedule.slots(10) == (1290,) * 9 + (266,) * 39
    # The rows of 20 % at L = 9 and 5 % at L = 2 are 35 % and 9 % on the average of layers.
    assert schedule.average / 1280 == pytest.approx(0.35) and schedule.kept == 256
    assert Schedule.cut(48, 1280, 64, 2).average / 1280 == pytest.approx(0.09, abs=5e-4)
    for layer, kept in ((48, 5), (-1, 5), (0, 1281)):
        with pytest.raises(ConfigError, match="from 0 to"):
            Schedule.cut(48, 1280, kept, layer)
    with pytest.raises(ConfigError, match="24 decoder layers"):
        kv_cost(geometry("InternVL2-1B"), (1, 2, 3))


def test_break_even_is_the_first_number_of_tiles_that_pays():
    config, guide = geometry("InternVL2-2B"), partial(flops.posterior_flops, geometry("InternVL2-1B"))

    def gain(tiles: int) -> int:
        n = 256 * tiles
        full, cut = (prune_cost(config, Schedule.cut(24, n, k), tiles=tiles, text=150) for k in (n, int(n * 0.05)))
        return full.total - cut.total - guide(tiles, 150)

    least = break_even(config, guide, keep_ratio=0.05, layer=0, text=150)
    assert least is not None and gain(least) > 0
    assert all(gain(n) <= 0 for n in range(1, least))
    assert break_even(config, guide, keep_ratio=0.05, layer=0, text=150, tiles=range(1, least)) is None
    assert break_even(config, lambda tiles, text: 0, keep_ratio=0.05, layer=0, text=150) == 1
    # A model never pays for pruning itself.
    same = partial(flops.posterior_flops, config)
    assert break_even(config, same, keep_ratio=0.05, layer=0, text=150) is None
    assert f"| InternVL2-2B | {least} |" in break_even_table()
