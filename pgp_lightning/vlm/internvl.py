"""The InternVL family: InternVL2, 2.5 and 3, as released (`internvl_chat`) and in transformers' own layout (`-hf`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.conversion import load_original
from pgp_lightning.vlm.family import VLM, Facts, load_whole
from pgp_lightning.vlm.original_config import convert_config, image_token_id, is_original
from pgp_lightning.vlm.processor import ChatTemplate, Processor
from pgp_lightning.vlm.settings import (
    CONFIG,
    Setting,
    agreed,
    check_chat_format,
    check_pixels,
    image_files,
    side_of,
    text_length,
)
from pgp_lightning.vlm.tiles import TileRule

__all__ = ["TEMPLATES", "InternVL"]

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# By the name in the original config.json. The generation of InternVL2 ends blocks without a newline.
TEMPLATES = {
    "Hermes-2": ChatTemplate(_SYSTEM_2, separator="<|im_end|>", between=""),
    "internlm2-chat": ChatTemplate(_SYSTEM_2, separator="<|im_end|>", between=""),
    "internvl2_5": ChatTemplate(_SYSTEM_2_5),
}


class InternVL(VLM):
    """A model of the InternVL family."""

    family = "internvl"
    # The pixel statistics of ImageNet, with which every InternViT was trained.
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    vision_attention_name = "attention"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Say whether a folder's `config.json` is of this family."""
        return config.get("model_type") == "internvl" or is_original(config)

    @classmethod
    def facts(cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Facts:
        """Read tile rule, chat format and length limit from a checkpoint's own files.

        transformers' layout has no place for the chat format's system text: checkpoints in it are of InternVL2.5 or
        3 and get theirs, as the original code would.

        Raises:
            ConfigError: if the model is of a kind that is not supported.
        """
        found = cls.settings(folder, config, tokenizer)
        text = config.get("llm_config" if is_original(config) else "text_config", {})
        name = config.get("template") if is_original(config) else "internvl2_5"
        if name not in TEMPLATES:
            raise ConfigError(f"{folder} wants the chat format {name!r}; known are {', '.join(TEMPLATES)}")
        thumbnail = bool(config.get("use_thumbnail", False)) if is_original(config) else True
        template = replace(TEMPLATES[name], begin=_begin(text, tokenizer))
        if not is_original(config):
            check_pixels(folder, image_files(folder), cls.mean, cls.std)
            check_chat_format(folder, tokenizer, template)
        side, tokens, least, most = (int(found[key].value) for key in ("side", "tokens", "min_patches", "max_patches"))
        return Facts(TileRule(side, tokens, least, most, thumbnail), template, int(found["length"].value))

    @classmethod
    def settings(
        cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
    ) -> dict[str, Setting]:
        """Return side and tokens a side of tiles, their least and greatest number, and the longest sequence."""
        if is_original(config):
            # Refuses by name what cannot be converted.
            converted: Any = convert_config(config, image_token_id(config, tokenizer))
            size, patch = converted.vision_config.image_size[0], converted.vision_config.patch_size[0]
            # What the original's class takes a key to be that is not there.
            least, most = config.get("min_dynamic_patch") or 1, config.get("max_dynamic_patch") or 6
            if not config.get("dynamic_image_size", False):
                least, most = 1, 1
            side, ratio = Setting(size, CONFIG), config.get("downsample_ratio", 0.5)
            limits = {"min_patches": Setting(least, CONFIG), "max_patches": Setting(most, CONFIG)}
            length = text_length(config["llm_config"], "qwen2", tokenizer)
        else:
            vision, files = config.get("vision_config", {}), image_files(folder)
            patch, ratio = side_of(vision.get("patch_size", 14)) or 14, config.get("downsample_ratio", 0.5)
            sizes = {name: side_of(values.get("size")) for name, values in files.items()}
            side = agreed(folder, "the side of a tile", {CONFIG: side_of(vision.get("image_size", 448)), **sizes})
            limits = {
                key: agreed(folder, key, {name: values.get(key) for name, values in files.items()})
                for key in ("min_patches", "max_patches")
            }
            length = text_length(config.get("text_config", {}), "qwen2", tokenizer)
        tokens = int(side.value // patch * ratio)
        return {"side": side, "tokens": Setting(tokens, CONFIG), **limits, "length": length}

    @classmethod
    def load_model(
        cls, folder: Path, config: Mapping[str, Any], processor: Processor, dtype: torch.dtype, attention: str
    ) -> PreTrainedModel:
        """Load the weights (safetensors only), converting the original layout on the way."""
        if is_original(config):
            converted = convert_config(config, processor.context_id)
            return load_original(folder, converted, dtype, attention, stop_id=processor.stop_id)
        return load_whole(InternVLForConditionalGeneration, folder, dtype, attention)

    @classmethod
    def is_family_of(cls, model: nn.Module) -> bool:
        """Say whether a model in memory is of this family."""
        return isinstance(model, InternVLForConditionalGeneration)

    def as_features(self, visual: Tensor) -> Tensor:
        """Return visual tokens (T, n, d) as they are."""
        return visual

    def encode(self, pixels: Tensor) -> Tensor:
        """Run vision tower and projector: normalised pixels (T, 3, S, S) to visual tokens (T, n, d)."""
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The vision tower's layers, first to last."""
        layers: nn.ModuleList = self.vision_tower.get_submodule("encoder").get_submodule("layer")  # type: ignore[assignment]
        return layers


def _begin(text: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return what the tokenizer puts in front of every sequence: <s> for InternLM2, nothing for Qwen."""
    if tokenizer is None:
        return "<s>" if text.get("model_type") == "internlm2" else ""
    with_specials, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return str(tokenizer.bos_token) if with_specials[:1] == [tokenizer.bos_token_id] != plain[:1] else ""
