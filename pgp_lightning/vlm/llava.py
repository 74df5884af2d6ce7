"""The LLaVA-1.5 family, in transformers' layout (`llava-hf/llava-1.5-7b-hf`, `bczhou/tiny-llava-v1-hf`, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.family import VLM, Facts, load_whole
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

__all__ = ["VICUNA", "Llava"]

# The paper's conversation with its system sentence, which the chat template of converted checkpoints leaves out.
VICUNA = ChatTemplate(
    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    separator=" ",
    user="USER: ",
    assistant="ASSISTANT:",
    begin="<s>",
    system_open="",
    image_open="",
    image_close="",
    context="<image>",
    answer_open=" ",
    stop="</s>",
    between="",
)


class Llava(VLM):
    """A model of the LLaVA-1.5 family: one tile, the image padded to a square."""

    family = "llava"
    # CLIP's pixel statistics.
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Say whether a folder's `config.json` is of this family; the original layout says `llava_llama`."""
        return config.get("model_type") in ("llava", "llava_llama")

    @classmethod
    def facts(cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Facts:
        """Read tile rule, chat format and length limit from a checkpoint's own files.

        Raises:
            ConfigError: if it is in the original layout, or its visual tokens are not a raster of patches.
        """
        if config["model_type"] != "llava" or "vision_config" not in config:
            raise ConfigError(
                f"{folder} is a LLaVA checkpoint in the original layout, which holds no vision tower; "
                "use the converted one, e.g. llava-hf/llava-1.5-7b-hf"
            )
        vision = config["vision_config"]
        if vision.get("model_type") != "clip_vision_model":
            raise ConfigError(f"{folder}: the vision tower must be CLIP, got {vision.get('model_type')!r}")
        for key, wanted in (("vision_feature_select_strategy", "default"), ("vision_feature_layer", -2)):
            if config.get(key, wanted) != wanted:
                raise ConfigError(f"{folder}: {key} must be {wanted!r} as in LLaVA-1.5, got {config[key]!r}")
        found = cls.settings(folder, config, tokenizer)
        check_pixels(folder, image_files(folder), cls.mean, cls.std)
        check_chat_format(folder, tokenizer, VICUNA)
        rule = TileRule(found["side"].value, found["tokens"].value, 1, 1, thumbnail=False, fit="pad")
        return Facts(rule, VICUNA, int(found["length"].value))

    @classmethod
    def settings(
        cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
    ) -> dict[str, Setting]:
        """Return side and tokens a side of the tile, and the longest sequence."""
        vision, files = config["vision_config"], image_files(folder)
        # transformers leaves out what equals its defaults, which are CLIP-B/32's.
        cut = {name: side_of(values.get("crop_size")) for name, values in files.items()}
        side = agreed(folder, "the side of the image", {CONFIG: int(vision.get("image_size", 224)), **cut})
        patch = int(vision.get("patch_size", 32))
        length = text_length(config.get("text_config", {}), "llama", tokenizer)
        return {"side": side, "tokens": Setting(side.value // patch, CONFIG), "length": length}

    @classmethod
    def load_model(
        cls, folder: Path, config: Mapping[str, Any], processor: Processor, dtype: torch.dtype, attention: str
    ) -> PreTrainedModel:
        """Load the weights (safetensors only)."""
        return load_whole(LlavaForConditionalGeneration, folder, dtype, attention)

    @classmethod
    def is_family_of(cls, model: nn.Module) -> bool:
        """Say whether a model in memory is of this family."""
        return isinstance(model, LlavaForConditionalGeneration)

    def as_features(self, visual: Tensor) -> list[Tensor]:
        """Return visual tokens (T, n, d) as a list by image."""
        return list(visual)

    def encode(self, pixels: Tensor) -> Tensor:
        """Run vision tower and projector: normalised pixels (T, 3, S, S) to visual tokens (T, n, d)."""
        features: list[Tensor] = self.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.stack(list(features))

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The vision tower's layers, first to last; the projector reads the last but one."""
        tower: Any = self.vision_tower
        layers: nn.ModuleList = getattr(tower, "vision_model", tower).encoder.layers
        return layers
