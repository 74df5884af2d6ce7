"""Chat format against the original's prompts; processors and models on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.internvl import ChatTemplate, InternVL, Processor, load_processor, resolve_base
from pgp_lightning.vlm.tiles import TileRule
from tests.tiny import GOLDEN, RULE, WIDTH, golden, tiny_processor, tiny_request

PROMPTS = golden("prompts.json")
CONTEXT = "<IMG_CONTEXT>"


def name(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['order']}-{'answer' if case['answer'] else 'prompt'}-{len(case['question'])}"


@pytest.mark.parametrize("case", PROMPTS, ids=name)
def test_the_text_is_the_original_prompt(case: dict[str, Any]):
    template = ChatTemplate(case["system"], case["separator"])
    before, after = template.render(case["question"], case["order"])
    text = before + CONTEXT * case["visual_tokens"] + after
    if case["answer"]:
        text += case["answer"] + case["separator"]
    assert text == case["text"]


@pytest.mark.parametrize("case", [case for case in PROMPTS if case["answer"]], ids=name)
def test_ids_and_supervised_tokens_are_the_original_ones(case: dict[str, Any]):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "toy_tokenizer")
    processor = Processor(tokenizer, TileRule(), ChatTemplate(case["system"], case["separator"]), 999)
    prompt = processor.prompt(case["question"], case["answer"], case["order"])
    ids = [*prompt.before, *processor.encode(CONTEXT) * case["visual_tokens"], *prompt.after, *prompt.answer]
    # The original ends a block with the separator's newline, which is never predicted.
    assert ids == case["input_ids"][: len(ids)] and len(case["input_ids"]) - len(ids) == len(case["separator"]) - 10
    assert prompt.answer == case["supervised"]
    assert processor.prompt_length(case["question"], case["answer"], case["visual_tokens"]) == len(ids)


def test_without_system_and_without_question():
    template = ChatTemplate()
    assert template.render("Q", "image_first") == (
        "<|im_start|>user\n<img>", "</img>\nQ<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    blind = ("<|im_start|>user\n<img>", "</img><|im_end|>\n<|im_start|>assistant\n")
    assert template.render(None, "question_first") == template.render(None, "image_first") == blind


def test_other_words_around_the_blocks():
    template = ChatTemplate("S", "|", "U:", "A:")
    assert template.render("Q", "question_first") == ("<|im_start|>system\nS|U:Q\n<img>", "</img>|A:")


def test_a_prompt_without_answer_supervises_nothing():
    assert tiny_processor().prompt("how many red shapes", None, "question_first").answer == []


def test_a_processor_survives_the_disk(tmp_path: Path):
    processor = Processor(tiny_processor().tokenizer, RULE, ChatTemplate("系统", "<|im_end|>"), 77)
    processor.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again = load_processor(str(tmp_path))
    assert (again.rule, again.template, again.max_length) == (RULE, processor.template, 77)
    for text in ("what color is the square", "<|im_start|>user\n<img></img>", "unheard of"):
        assert again.encode(text) == processor.encode(text)


def test_a_base_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no model of the InternVL family at 'gone': give a local folder that holds"):
        load_processor("gone")
    with pytest.raises(ConfigError, match=r"no model of the InternVL family at 'embedded:gone': the package holds "):
        resolve_base("embedded:gone")


def test_a_folder_of_another_family(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model of the InternVL family"):
        load_processor(str(tmp_path))
    (tmp_path / "vlm.json").write_text(json.dumps({"family": "llava"}))
    with pytest.raises(ConfigError, match=r"vlm\.json must say family 'internvl', got 'llava'"):
        load_processor(str(tmp_path))


def test_a_model_from_outside(tiny_base: str):
    vlm = InternVL.load(tiny_base)
    assert vlm.width == WIDTH and vlm.base == tiny_base and vlm.processor.rule == RULE
    assert vlm.decoder is vlm.model.model.language_model
    request = tiny_request()
    tokens = vlm.visual_tokens(request.tiles)
    assert tokens.shape == (len(request.tiles), 4, WIDTH) and tokens.dtype == torch.float32
    half = InternVL.load(tiny_base, torch.bfloat16)
    assert half.visual_tokens(request.tiles).dtype == torch.bfloat16


def test_pixels_are_normalised_by_channel():
    tiles = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 2, 2)
    pixels = InternVL.normalise(tiles)
    for channel, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert pixels[0, channel, 0, 0].item() == pytest.approx(-mean / deviation)
        assert pixels[1, channel, 1, 1].item() == pytest.approx((1 - mean) / deviation)
    assert InternVL.normalise(tiles, torch.bfloat16).dtype == torch.bfloat16
