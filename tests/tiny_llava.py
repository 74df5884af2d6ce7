"""A random model of the LLaVA-1.5 family, as small as can be."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pgp_lightning.embedded.world import WORDS
from tests.tiny import enlarge

SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
SIDE, PATCH, WIDTH = 32, 8, 48  # 16 visual tokens


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that puts <s> in front, like Llama's."""
    words = (*SPECIAL, "USER:", "ASSISTANT:", *WORDS)
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a model with three vision and two decoder layers, its weights large enough to matter."""
    tokenizer = llava_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=96,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config)
    enlarge(model)
    return model


def save_llava(folder: Path, seed: int = 0) -> str:
    """Write model and tokenizer as a converted checkpoint has them, and return the path, which serves as `base`."""
    llava_model(seed).save_pretrained(folder)
    llava_tokenizer().save_pretrained(folder)
    return str(folder)
