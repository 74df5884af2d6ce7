"""Estimates of memory, against models that exist and a tally of the tensors that a step has alive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaConfig,
    Qwen2Config,
)

from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.objective import divergence_loss, objective, reconstruction_loss
from pgp_lightning.vlm.decoder_call import cache_keyword
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.memory import (
    ZOO,
    cache_bytes,
    device_memory,
    fit_memory,
    geometry,
    parameters,
    prune_memory,
    table,
)
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid, TileRule
from tests.tiny import tiny_model, tiny_processor
from tests.tiny_llava import llava_model

ROOT = Path(__file__).parents[3]
STEP: dict[str, Any] = {"rows": 4, "tiles": 7, "text_slots": 100}


@pytest.mark.parametrize("build", [tiny_model, llava_model])
def test_parameters_are_those_of_the_model(build: Any):
    model = build()
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("InternVL2_5-1B", 0.938), ("InternVL2-8B", 8.08), ("InternVL2_5-26B", 25.5), ("llava-1.5-7b", 7.06)],
)
def test_parameters_of_released_models(name: str, billions: float):
    assert parameters(geometry(name)) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_model_of_the_zoo_is_named_once():
    names = [name for names in ZOO for name in names]
    assert len(names) == len(set(names)) == 20
    assert all(isinstance(geometry(name), InternVLConfig | LlavaConfig) for name in names)


@pytest.mark.parametrize(("rank", "layers"), [(0, 1), (4, 1), (32, 2)])
def test_what_is_trained_is_counted_exactly(tiny_base: str, rank: int, layers: Any):
    guide = PosteriorGuide(tiny_base, lora_rank=rank, head_layers=layers)
    count = sum(p.numel() for p in guide.parameters() if p.requires_grad)
    estimate = fit_memory(guide.vlm.model.config, lora_rank=rank, head_layers=layers, **STEP)
    assert estimate.trained == 16 * count


def test_the_cache_is_that_of_a_real_one():
    model = tiny_model()
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        decoder = model.model.language_model
        decoder(inputs_embeds=torch.zeros(2, 7, 48), **{cache_keyword(decoder): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 2 * 7, torch.float32) == held


def middling() -> InternVLForConditionalGeneration:
    """A model whose activations outweigh what is the same for any: 64 visual tokens a tile, a wide MLP."""
    vision = InternVLVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, attention_bias=True,
        image_size=(64, 64), patch_size=(4, 4),
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=64, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_seq_length=64, tie_word_embeddings=False)
    model: InternVLForConditionalGeneration = InternVLForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    )
    return model


@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_estimate_of_a_step_is_near_what_is_alive(
    dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from step_flops import LiveBytes

    processor = replace(tiny_processor(), rule=TileRule(64, 8, max_tiles=4), max_length=999)
    vlm = InternVL(middling().to(dtype), processor, "middling")
    guide = PosteriorGuide(vlm, gradient_checkpointing=checkpointing)
    grid, rows = TileGrid(2, 1, 8, thumbnail=True), 2
    tiles = torch.randint(0, 256, (rows * 3, 3, 64, 64), dtype=torch.uint8)
    request = Request(["what color is the square"] * rows, tiles, [grid] * rows)
    prompt = processor.prompt(request.questions[0], "red", "question_first")
    noise = torch.randn(rows, grid.tokens, guide.vlm.width)
    with LiveBytes(guide) as alive:
        start = alive.bytes
        visual = guide.visual_tokens(request)
        tower, alive.peak = alive.peak - start, alive.bytes
        found = guide.bottleneck_pass(request, visual)
        latents = guide.bottleneck.sample(found.posterior, noise)
        predicted = guide.reconstruction_pass(request, ["red"] * rows, latents)
        loss = objective(reconstruction_loss(*predicted), divergence_loss(found.divergence, found.mask), 0.5)
        loss.backward()
        passes = alive.peak - start
    estimate = fit_memory(
        vlm.model.config,
        rows=rows,
        tiles=3,
        text_slots=len(prompt.before) + len(prompt.after) + len(prompt.answer),
        answer=len(prompt.answer),
        dtype=dtype,
        gradient_checkpointing=checkpointing,
    )
    assert estimate.weights == sum(p.numel() for p in vlm.model.parameters() if not p.requires_grad) * dtype.itemsize
    assert estimate.passes + estimate.bottleneck + estimate.logits == pytest.approx(passes, rel=0.2)
    assert estimate.vision == pytest.approx(tower, rel=0.25)


@pytest.mark.parametrize(
    "more",
    [
        {"rows": 5}, {"tiles": 8}, {"text_slots": 101}, {"lora_rank": 33}, {"head_layers": 2},
        {"gradient_checkpointing": False}, {"attention": "eager"}, {"visual_share": 1.0}, {"answer": 65},
        {"dtype": torch.float32},
    ],
)  # fmt: skip
def test_more_takes_more(more: dict[str, Any]):
    config = geometry("InternVL2_5-1B")
    less: dict[str, Any] = {**STEP, "head_layers": 1, "attention": "flash_attention_2", "visual_share": 0.5}
    assert fit_memory(config, **{**less, **more}).total > fit_memory(config, **less).total


def test_pruning_spares_cache_and_prefill():
    config = geometry("InternVL2-8B")
    all_of_them, few = (prune_memory(config, tiles=7, text_slots=100, keep_ratio=ratio) for ratio in (1.0, 0.05))
    assert all_of_them.cache == all_of_them.full_cache == few.full_cache == cache_bytes(config, 7 * 256 + 100 + 128)
    assert few.cache == cache_bytes(config, 90 + 100 + 128)
    assert few.weights == all_of_them.weights and few.prefill < all_of_them.prefill and few.total < all_of_them.total


def test_an_estimate_prints_its_parts():
    text = str(fit_memory(geometry("InternVL2_5-1B"), **STEP))
    assert text.startswith("about ") and "weights 1.7 GiB" in text and "vision " in text


def test_the_memory_of_a_device():
    name, memory = device_memory(torch.device("cpu"))
    assert name == "this machine" and memory > 2**28


def test_the_documented_table_is_what_the_command_prints():
    assert table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
