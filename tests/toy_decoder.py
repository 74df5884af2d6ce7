"""The bare toy decoder of the reference values: a small Llama that is called with embeddings, no vision tower.

What its visual tokens are is up to the test, which passes their slots: `pruned(vlm, pruner, inputs, visual=slots)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pgp_lightning.vlm.family import VLM, Facts
from pgp_lightning.vlm.processor import Processor

GOLDEN = Path(__file__).parent / "golden"


class ToyVLM(VLM):
    """A language model alone, with the face that `pruned` looks at."""

    family = "toy"
    mean = std = (0.5, 0.5, 0.5)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def facts(cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Facts:
        raise NotImplementedError

    @classmethod
    def load_model(
        cls, folder: Path, config: Mapping[str, Any], processor: Processor, dtype: torch.dtype, attention: str
    ) -> PreTrainedModel:
        raise NotImplementedError

    @classmethod
    def is_family_of(cls, model: nn.Module) -> bool:
        return isinstance(model, LlamaForCausalLM)

    def as_features(self, visual: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def skipping_tiles(self, needed: Tensor) -> Iterator[None]:
        yield

    @property
    def decoder(self) -> nn.Module:
        return self.model.model

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def vision_layers(self) -> nn.ModuleList:
        return nn.ModuleList()

    def visual_slots(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("the toy decoder has no image token: pass visual= to pruned")


def read_golden(name: str) -> dict[str, np.ndarray]:
    """Read a file of reference values, `.item()` or `str()` for its scalars."""
    with np.load(GOLDEN / name, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def toy_vlm(weights: str, attention: str = "sdpa") -> ToyVLM:
    """Return the toy decoder with the weights `mha` (4 key heads) or `gqa` (2), float32."""
    arrays = read_golden(f"decoder_tinyllama_{weights}_weights.npz")
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads={"mha": 4, "gqa": 2}[weights],
        intermediate_size=64,
        num_hidden_layers=6,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    return ToyVLM(model.eval(), None, f"toy decoder ({weights})")


def visual_slots(start: int, count: int, length: int) -> Tensor:
    """Return the slots of one block of visual tokens: bool (1, length)."""
    slots = torch.zeros(1, length, dtype=torch.bool)
    slots[:, start : start + count] = True
    return slots
