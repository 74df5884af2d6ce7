"""How much memory a model takes, in bytes and from its configuration alone: nothing is loaded.

Parameters and the key-value cache are exact. What training keeps for the backward pass is a sum of named terms per
layer, kernels' scratch and fragmentation left out: good to a fifth, to tell what fits from what does not.

    python -m pgp_lightning.vlm.memory      # the table of docs/models.md
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, InternVLConfig, LlamaConfig, LlavaConfig

from pgp_lightning.bottleneck import GaussianBottleneck
from pgp_lightning.vlm.original_config import convert_config

__all__ = [
    "ZOO",
    "FitMemory",
    "PruneMemory",
    "cache_bytes",
    "device_memory",
    "fit_memory",
    "geometry",
    "parameters",
    "prune_memory",
    "table",
    "tokens_per_tile",
    "trained_parameters",
]

GIB = 2**30
SINGLE = 4  # bytes of float32
Config = InternVLConfig | LlavaConfig

# Geometry of released models: vision tower, language model, its layers, width, heads, key-value heads, MLP, vocabulary.
_300M = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "image_size": 448, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}  # fmt: skip
_6B = {"num_hidden_layers": 45, "image_size": 448}
_CLIP = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
_QWEN, _INTERNLM, _LLAMA = "Qwen2ForCausalLM", "InternLM2ForCausalLM", "LlamaForCausalLM"
ZOO: dict[tuple[str, ...], tuple[dict[str, Any], str, int, int, int, int, int, int]] = {
    ("InternVL2-1B",): (_300M, _QWEN, 24, 896, 14, 2, 4864, 151655),
    ("InternVL2_5-1B", "InternVL3-1B"): (_300M, _QWEN, 24, 896, 14, 2, 4864, 151674),
    ("InternVL2-2B", "InternVL2_5-2B"): (_300M, _INTERNLM, 24, 2048, 16, 8, 8192, 92553),
    ("InternVL3-2B",): (_300M, _QWEN, 28, 1536, 12, 2, 8960, 151674),
    ("InternVL2_5-4B",): (_300M, _QWEN, 36, 2048, 16, 2, 11008, 151674),
    ("InternVL2-8B", "InternVL2_5-8B"): (_300M, _INTERNLM, 32, 4096, 32, 8, 14336, 92553),
    ("InternVL3-8B",): (_300M, _QWEN, 28, 3584, 28, 4, 18944, 151674),
    ("InternVL3-14B",): (_300M, _QWEN, 48, 5120, 40, 8, 13824, 151674),
    ("InternVL2-26B", "InternVL2_5-26B"): (_6B, _INTERNLM, 48, 6144, 48, 8, 16384, 92553),
    ("InternVL2_5-38B", "InternVL3-38B"): (_6B, _QWEN, 64, 5120, 40, 8, 27648, 151674),
    ("InternVL2_5-78B", "InternVL3-78B"): (_6B, _QWEN, 80, 8192, 64, 8, 29568, 151674),
    ("tiny-llava-v1",): (_CLIP, _LLAMA, 22, 2048, 32, 4, 5632, 32064),
    ("llava-1.5-7b",): (_CLIP, _LLAMA, 32, 4096, 32, 32, 11008, 32064),
    ("llava-1.5-13b",): (_CLIP, _LLAMA, 40, 5120, 40, 40, 13824, 32064),
}


class _Parts:
    """Prints itself, the total first."""

    @property
    def total(self) -> int:
        """Greatest sum of what is there at one time."""
        raise NotImplementedError

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {_size(value)}" for name, value in vars(self).items())
        return f"about {_size(self.total)} ({parts})"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class FitMemory(_Parts):
    """Bytes of a training step; the vision tower has finished before the two passes begin."""

    weights: int
    trained: int
    vision: int
    passes: int
    bottleneck: int
    logits: int

    @property
    def total(self) -> int:
        """Greatest sum of what is there at one time."""
        return self.weights + self.trained + max(self.vision, self.passes + self.bottleneck + self.logits)


@dataclass(frozen=True)
class PruneMemory(_Parts):
    """Bytes of generating from a pruned prompt; `full_cache`, which the total leaves out, is the unpruned one's."""

    weights: int
    vision: int
    prefill: int
    cache: int
    full_cache: int
    logits: int

    @property
    def total(self) -> int:
        """Greatest sum of what is there at one time."""
        return self.weights + max(self.vision, self.prefill + self.cache + self.logits)


def parameters(config: Config) -> int:
    """Count a model's parameters, by building it without memory."""
    build: Any = AutoModelForImageTextToText.from_config  # which has no types
    with torch.device("meta"):
        return sum(p.numel() for p in build(copy.deepcopy(config)).parameters())


def trained_parameters(config: Config, lora_rank: int = 32, head_layers: Literal[1, 2] = 2) -> int:
    """Count what posterior-guided pruning trains: the adapter on all seven projections, and the bottleneck."""
    text = _Text(config)
    with torch.device("meta"):
        bottleneck = GaussianBottleneck(text.width, head_layers=head_layers)
    return lora_rank * text.layers * text.adapter + sum(p.numel() for p in bottleneck.parameters())


def device_memory(device: torch.device) -> tuple[str, int]:
    """Return a device's name and memory in bytes; a CPU has the machine's, or what a container may use of it."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.name, found.total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
    return "this machine", min(total, int(text)) if text.isdigit() else total


def cache_bytes(config: Config, slots: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the size of the key-value cache of a number of prompt slots."""
    text = _Text(config)
    return 2 * text.layers * text.keys * slots * dtype.itemsize


def fit_memory(
    config: Config,
    *,
    rows: int,
    tiles: int,
    text_slots: int,
    answer: int = 64,
    images: int | None = None,
    visual_share: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int = 32,
    head_layers: Literal[1, 2] = 2,
    gradient_checkpointing: bool = True,
    attention: str = "sdpa",
) -> FitMemory:
    """Estimate a step of posterior-guided pruning: frozen base in `dtype`, adapter and bottleneck in float32.

    Args:
        config: of the guide's base.
        rows: questions of a micro-batch.
        tiles: of every image, the thumbnail included.
        text_slots: prompt slots of a row besides the visual tokens.
        answer: supervised tokens of a row.
        images: of a micro-batch; by default one a row.
        visual_share: share of the visual tokens that takes part in the passes.
        dtype: of the frozen weights.
        lora_rank: of the adapter on all seven projections of every decoder layer.
        head_layers: depth of the bottleneck's heads.
        gradient_checkpointing: whether decoder layers keep their input alone.
        attention: implementation of transformers.
    """
    text, size = _Text(config), dtype.itemsize
    trained = trained_parameters(config, lora_rank, head_layers)
    visual = round(visual_share * tiles * tokens_per_tile(config))
    slots = rows * (visual + text_slots)
    layer = slots * text.kept(size, lora_rank) + text.square(rows, visual + text_slots, attention, size)
    # Checkpointed layers keep their input; the one whose turn it is in the backward pass has all its tensors again,
    # with gradients of its widest ones.
    layers = 2 * slots * size * text.width * text.layers + layer if gradient_checkpointing else 2 * text.layers * layer
    gradients = slots * SINGLE * (text.width + 2 * text.inner)
    final_norms = 2 * slots * (SINGLE + size) * text.width
    mask = rows * (visual + text_slots) ** 2 if attention != "flash_attention_2" else 0
    vocabulary = rows * answer * text.vocabulary
    return FitMemory(
        weights=parameters(config) * size,
        trained=trained * 4 * SINGLE,  # itself, its gradient and AdamW's two moments
        vision=_vision(config, (rows if images is None else images) * tiles, size),
        passes=layers + gradients + final_norms + mask,
        # Posterior, heads, sample and divergence keep some twenty tensors of V's shape, the last step's record five.
        bottleneck=25 * SINGLE * rows * visual * text.width,
        # As computed, in float32, their log-probabilities and the gradient.
        logits=vocabulary * (size + 3 * SINGLE),
    )


def prune_memory(
    config: Config,
    *,
    tiles: int,
    text_slots: int,
    keep_ratio: float,
    new_tokens: int = 128,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> PruneMemory:
    """Estimate generating from prompts of which a share of the visual tokens is kept.

    Args:
        config: of the answer model.
        tiles: of every image, the thumbnail included.
        text_slots: prompt slots of a row besides the visual tokens.
        keep_ratio: share of the visual tokens that stays.
        new_tokens: tokens generated in a row.
        rows: prompts at a time.
        dtype: of the weights.
    """
    text, size = _Text(config), dtype.itemsize
    visual = tiles * tokens_per_tile(config)
    prompt, full = round(keep_ratio * visual) + text_slots, visual + text_slots
    # In half precision a norm has its input in float32 twice; the widest point of a layer is its MLP.
    working = rows * prompt * (2 * SINGLE * text.width + size * (2 * text.width + 3 * text.inner))
    return PruneMemory(
        weights=parameters(config) * size,
        vision=_vision(config, rows * tiles, size),
        prefill=working + rows * prompt**2,
        cache=cache_bytes(config, rows * (prompt + new_tokens), dtype),
        full_cache=cache_bytes(config, rows * (full + new_tokens), dtype),
        logits=rows * text.vocabulary * (size + SINGLE),
    )


class _Text:
    """The sizes of a language model: d is `width`, the MLP's width `inner`, queries and keys are all heads together."""

    def __init__(self, config: Config) -> None:
        text: Any = config.text_config
        self.layers, self.heads, self.vocabulary = (
            int(size) for size in (text.num_hidden_layers, text.num_attention_heads, text.vocab_size)
        )
        self.width, self.inner = int(text.hidden_size), int(text.intermediate_size)
        head = int(getattr(text, "head_dim", None) or self.width // self.heads)
        self.queries, self.keys = head * self.heads, head * int(text.num_key_value_heads)
        # Inputs of q, k, v, o, gate, up and down together; with their outputs, what a rank of the adapter costs.
        self.inputs = 5 * self.width + self.queries + self.inner
        self.adapter = self.inputs + self.queries + 2 * self.keys + 2 * self.width + 2 * self.inner

    def kept(self, size: int, rank: int) -> int:
        """Return what a decoder layer keeps of one prompt slot for its backward pass."""
        norms = 2 * SINGLE * self.width
        attention = size * 4 * self.queries  # query, output, and key and value repeated for all heads
        mlp = size * 3 * self.inner  # gate before and after its activation, up
        # Every projection has its own float32 copy of its input, with dropout's mask of a byte.
        adapter = (SINGLE + 1) * self.inputs + 7 * SINGLE * rank if rank else 0
        return norms + attention + mlp + adapter

    def square(self, rows: int, slots: int, attention: str, size: int) -> int:
        """Return what a layer keeps of its attention matrix: only eager attention writes it out."""
        return rows * self.heads * slots * slots * (SINGLE + 2 * size) if attention == "eager" else 0


def tokens_per_tile(config: Config) -> int:
    """Return the number of visual tokens of a tile."""
    if isinstance(config, LlavaConfig):  # whose files leave image_seq_length out, also where it is not the default
        vision: Any = config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2
    return int(config.image_seq_length)


def _vision(config: Config, tiles: int, size: int) -> int:
    """Return the working memory of tower and pixels: there are no gradients, so the widest layer counts."""
    vision: Any = config.vision_config
    image, patch = (x if isinstance(x, int) else x[0] for x in (vision.image_size, vision.patch_size))
    tokens = tiles * ((image // patch) ** 2 + 1)
    # CLIP's activation takes one more step than InternViT's.
    width = 5 * vision.hidden_size + (3 if isinstance(config, LlavaConfig) else 2) * vision.intermediate_size
    return int(tokens * size * width + tiles * 3 * image**2 * (1 + size))


def geometry(name: str) -> Config:
    """Return the configuration of a model of the zoo as far as its sizes go.

    Raises:
        KeyError: if it is none of the zoo.
    """
    tower, kind, *sizes = next(row for names, row in ZOO.items() if name in names)
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size")  # fmt: skip
    text: dict[str, Any] = dict(zip(keys, sizes, strict=True))
    if tower is _CLIP:
        language = LlamaConfig(**text, tie_word_embeddings=False)
        return LlavaConfig(vision_config=CLIPVisionConfig(**tower), text_config=language, tie_word_embeddings=False)
    original = {"model_type": "internvl_chat", "ps_version": "v2", "vision_config": tower,
                "llm_config": {**text, "architectures": [kind], "bias": False}}  # fmt: skip
    return convert_config(original, text["vocab_size"] - 7)


def table() -> str:
    """Return the zoo's sizes as a Markdown table: training by the paper's recipe, generating with and without pruning.

    Six tiles and a thumbnail (LLaVA-1.5: its one tile), 128 prompt slots of text, 64 of an answer.
    """
    lines = [
        "| model | parameters | visual tokens | as guide: fit | as answer model: prune | its KV cache: all, 5 % |",
        "|---|---|---|---|---|---|",
    ]
    for names in ZOO:
        config = geometry(names[0])
        tiles = 1 if isinstance(config, LlavaConfig) else 7
        count = parameters(config)
        fit = fit_memory(config, rows=16, tiles=tiles, text_slots=192)
        prune = prune_memory(config, tiles=tiles, text_slots=128, keep_ratio=0.05, new_tokens=64)
        cells = (", ".join(names), f"{count / 1e9:.2f} B", f"{tiles * tokens_per_tile(config):,}",
                 f"{fit.total / GIB:.1f} GiB", f"{prune.total / GIB:.1f} GiB",
                 f"{prune.full_cache / 2**20:.0f}, {prune.cache / 2**20:.0f} MiB")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
