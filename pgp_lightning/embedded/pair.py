"""The embedded pair: a small guide and a larger answer model of the InternVL family, and their shared tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from pgp_lightning.embedded.world import RULE, WORDS
from pgp_lightning.vlm.processor import ChatTemplate, Processor

__all__ = ["build_model", "build_processor"]

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<unk>")
MAX_LENGTH = 448  # 320 visual tokens, the longest turn of the world, and room for several turns
VISION: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
# The guide is smaller and weaker on purpose.
LANGUAGE: dict[str, dict[str, Any]] = {
    "guide": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 256},
    "answer_model": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
}
# The answer model reads the picture before the question. On the family's own chat format, which puts three tokens
# between the question's last word and the answer, it learnt no lookup by glyph in 3,000 steps (docs/embedded.md).
TEMPLATES = {
    "guide": ChatTemplate(),
    "answer_model": ChatTemplate(separator="", user="", assistant="<|im_start|>", between=""),
}


def build_processor(name: str) -> Processor:
    """Make the word-level tokenizer and tile rule that both models share, and the chat format of `name`."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, "user", "assistant", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "start_turn_token": "<|im_start|>",
        },
    )
    return Processor(tokenizer, RULE, TEMPLATES[name], MAX_LENGTH)


def build_model(name: str, seed: int) -> InternVLForConditionalGeneration:
    """Build `guide` or `answer_model` with seeded weights.

    The library's initialisation (deviation 0.02, positions 0) suits wide models; at widths of 64 to 128 it is far too
    small, so linear weights start at 1 / sqrt(fan in) and the tower's positions as two-dimensional waves.
    """
    processor = build_processor(name)
    tokenizer = processor.tokenizer
    vision = InternVLVisionConfig(
        **VISION,
        attention_bias=True,
        image_size=(RULE.tile_size, RULE.tile_size),
        patch_size=(8, 8),
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        **LANGUAGE[name],
        vocab_size=64,
        num_key_value_heads=LANGUAGE[name]["num_attention_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.encode("<IMG_CONTEXT>")[0],
        image_seq_length=RULE.tokens_per_side**2,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in module_name:
                residual = module_name.endswith(("projection_layer", "fc2", "o_proj", "down_proj"))
                module.weight.normal_(0, (0.6 if residual else 1.0) * module.in_features**-0.5)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(0, 2 * module.weight[0].numel() ** -0.5)
        positions = model.model.vision_tower.embeddings.position_embeddings
        positions[0, 0] = 0
        positions[0, 1:] = 0.5 * _waves(2 * RULE.tokens_per_side, positions.shape[-1])
        model.get_input_embeddings().get_parameter("weight").normal_(0, 0.1)
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine and cosine positions of a side x side raster: (side * side, width)."""
    quarter = width // 4
    frequency = 1.5 * 30.0 ** -(torch.arange(quarter) / max(quarter - 1, 1))
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
