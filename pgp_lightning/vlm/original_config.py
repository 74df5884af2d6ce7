"""What `config.json` of an original InternVL checkpoint (`internvl_chat`) means in transformers' terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

from pgp_lightning.errors import ConfigError

__all__ = ["convert_config", "image_token_id", "is_original"]

CONTEXT = "<IMG_CONTEXT>"
# <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> were added last and in this order.
CONTEXT_FROM_END = 7
# Every released model was trained for at most this many positions.
LONGEST = 32768

# What the original's vision configuration takes a key to be that a file leaves out; transformers' defaults differ.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 0.1,
}
VISION_SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels",
               "hidden_act", "norm_type", "layer_norm_eps", "attention_dropout")  # fmt: skip
TEXT_MODELS = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama", "InternLM2ForCausalLM": "internlm2"}
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_KEPT = (*TEXT_SIZES, "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
             "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def is_original(config: Mapping[str, Any]) -> bool:
    """Say whether a `config.json` is of an original checkpoint, not one in transformers' layout."""
    return config.get("model_type") == "internvl_chat"


def image_token_id(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the id of the token that stands for a visual token.

    Args:
        config: the original `config.json`.
        tokenizer: the checkpoint's, or None to go by the id's place in the vocabulary.

    Raises:
        ConfigError: if the tokenizer has no such token, or the model no embedding for it.
    """
    if tokenizer is None:
        found = int(_section(config, "llm_config")["vocab_size"]) - CONTEXT_FROM_END
    else:
        ids = tokenizer.encode(CONTEXT, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"the tokenizer must know {CONTEXT} as one token, got ids {ids}: give the checkpoint's own"
            )
        found = int(ids[0])
    return _embedded(config, found)


def convert_config(config: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """Translate the original `config.json`.

    Args:
        config: as read from the file.
        image_token_id: of `image_token_id`.

    Raises:
        ConfigError: if the model is one that transformers' class would compute differently.
    """
    _refuse(config)
    vision = {**VISION_DEFAULTS, **_section(config, "vision_config")}
    side = _tokens_per_side(config, vision)
    tower = InternVLVisionConfig(
        **{key: vision[key] for key in VISION_SAME},
        image_size=[vision["image_size"]] * 2,
        patch_size=[vision["patch_size"]] * 2,
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
        projection_dropout=vision["dropout"],
        layer_scale_init_value=vision["initializer_factor"],
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # False would put a norm behind the tower, which the original has not
    )
    return InternVLConfig(
        vision_config=tower,
        text_config=_text_config(_section(config, "llm_config")),
        image_token_id=_embedded(config, image_token_id),
        image_seq_length=side**2,
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        # Said here too: True, the class's default, would lay one of the two stored matrices over the other.
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise ConfigError(f"expected {key!r} in config.json of an original InternVL checkpoint, got {found!r}")
    if key == "llm_config" and (missing := [size for size in TEXT_SIZES if size not in found]):
        raise ConfigError(
            f"llm_config of config.json must give {', '.join(missing)}: restore the checkpoint's own file"
        )
    return found


def _embedded(config: Mapping[str, Any], token: int) -> int:
    vocabulary = int(_section(config, "llm_config")["vocab_size"])
    if not 0 <= token < vocabulary:
        raise ConfigError(
            f"the id of {CONTEXT} must be from 0 to vocab_size {vocabulary} - 1, got {token}: "
            "give the checkpoint's own tokenizer"
        )
    return token


def _refuse(config: Mapping[str, Any]) -> None:
    if not is_original(config):
        raise ConfigError(f"expected model_type 'internvl_chat', got {config.get('model_type')!r}: nothing to convert")
    for key, wanted, default, hint in (
        # The first pixel shuffle, which a silent configuration means, returns the visual tokens transposed.
        ("ps_version", "v2", "v1", "transformers has the second pixel shuffle only"),
        ("select_layer", -1, -1, "no released model has another"),
        ("downsample_ratio", 0.5, 0.5, "no released model has another"),
        ("pad2square", False, False, "images are tiled here, not padded to squares"),
        ("use_llm_lora", 0, 0, "merge the adapter into the weights with the original code first"),
        ("use_backbone_lora", 0, 0, "merge the adapter into the weights with the original code first"),
    ):
        given = config.get(key, default)
        if (given or 0) != wanted:
            raise ConfigError(f"{key} must be {wanted!r}, got {given!r}: {hint}")


def _tokens_per_side(config: Mapping[str, Any], vision: Mapping[str, Any]) -> int:
    image, patch = vision["image_size"], vision["patch_size"]
    forced = config.get("force_image_size")
    if forced is not None and forced != image:
        raise ConfigError(
            f"force_image_size must be vision_config's image_size {image}, got {forced}: "
            "resize the position embeddings with the original code first"
        )
    if image % (2 * patch):
        raise ConfigError(
            f"image_size must be a multiple of twice the patch_size {patch}, got {image}: "
            f"downsample_ratio 0.5 joins two by two patches, which gives {image / patch / 2:g} visual tokens per side"
        )
    return int(image // (2 * patch))


def _text_config(llm: Mapping[str, Any]) -> Qwen2Config | LlamaConfig:
    named = next(iter(llm.get("architectures") or ()), None)
    kind = TEXT_MODELS.get(named) if named else llm.get("model_type")
    if kind not in TEXT_MODELS.values():
        raise ConfigError(
            f"the text model must be one of {', '.join(TEXT_MODELS)}, got {named or kind!r}: "
            "give a checkpoint that transformers knows itself (its name ends with -hf), if there is one"
        )
    heads, keys = llm["num_attention_heads"], llm.get("num_key_value_heads") or llm["num_attention_heads"]
    if heads % keys:
        raise ConfigError(
            f"num_attention_heads must be a multiple of num_key_value_heads {keys}, got {heads}: "
            "restore the checkpoint's own file"
        )
    kept = {key: llm[key] for key in TEXT_KEPT if key in llm} | {"num_key_value_heads": keys}
    kept |= {"rope_parameters": _rope(llm), "tie_word_embeddings": False}
    if kind == "qwen2":
        return Qwen2Config(**kept, use_sliding_window=False)
    # The original InternLM2 has biases unless told otherwise, Llama the other way round.
    bias = llm.get("bias", True) if kind == "internlm2" else llm.get("attention_bias", False)
    return LlamaConfig(**kept, attention_bias=bias)


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    scaling = llm.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "dynamic"):
        raise ConfigError(f"rope_scaling must be dynamic or none, got {kind!r}: no released model has another")
    rope = {"rope_type": "default", "rope_theta": float(llm.get("rope_theta", 10000.0))}
    # Dynamic scaling changes nothing, not one bit, until a row is longer than max_position_embeddings; transformers
    # looks up the longest position in every forward pass to know, and a GPU waits for that.
    if kind == "dynamic" and llm.get("max_position_embeddings", 0) > LONGEST:
        rope |= {"rope_type": "dynamic", "factor": float(scaling["factor"])}
    return rope
