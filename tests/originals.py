"""Checkpoints in the original InternVL layout: those of tests/golden, changed copies of them, and a random one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from pgp_lightning.vlm.conversion import load_original
from pgp_lightning.vlm.original_config import convert_config, image_token_id

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = {"internvl_qwen2": "qwen", "internvl_internlm2": "internlm2"}
NAMES = tuple(TOKENIZERS)
# Sums in another order give up to 8e-6; the smallest mistake measured, a wrong epsilon, 2.3e-4.
TOLERANCE = 5e-5


def download(folder: Path, name: str) -> Path:
    """Put a golden checkpoint and its tokenizer together, as a download has them."""
    for source in (GOLDEN / name, GOLDEN / "internvl_tokenizers" / TOKENIZERS[name]):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the library, whatever files they are in."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def read_values(name: str) -> dict[str, Tensor]:
    """Read what the original code computes with a checkpoint."""
    with np.load(GOLDEN / name / "golden.npz") as values:
        return {key: torch.from_numpy(values[key]) for key in values}


def translated(config: Mapping[str, Any]) -> InternVLConfig:
    return convert_config(config, image_token_id(config, None))


def write_original(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write a checkpoint as one file, or as shards among which the tensors take turns."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    places = {key: files[number % shards] for number, key in enumerate(tensors)}
    for file in files:
        save_file({key: tensors[key] for key in tensors if places[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def load(folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> InternVLForConditionalGeneration:
    return load_original(folder, translated(read_config(folder)), dtype, attention)


@torch.no_grad()
def logits(model: InternVLForConditionalGeneration, values: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a golden batch where it is not padded."""
    inputs = {key: values[key] for key in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
    found: Tensor = model(**inputs, use_cache=False).logits
    return found[values["attention_mask"] == 1]


def difference(model: InternVLForConditionalGeneration, values: Mapping[str, Tensor]) -> float:
    """Return the greatest difference of the logits from the original's."""
    return (logits(model, values) - values["logits"][values["attention_mask"] == 1]).abs().max().item()


def six_billion_style() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a tiny checkpoint with a tower of InternViT-6B's kind and a native Llama, its weights random.

    RMS norms, norms of query and key, and no bias of the packed projection are what the vision configuration means
    where it is silent, as the released ones are about the first.
    """
    vision = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 81,
              "image_size": 56, "patch_size": 14, "initializer_factor": 1.0}  # fmt: skip
    text = {"architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_theta": 5000000.0, "bos_token_id": 1, "eos_token_id": 7}  # fmt: skip
    config = {"model_type": "internvl_chat", "ps_version": "v2", "vision_config": vision, "llm_config": text}
    width, hidden, d, keys = 40, 81, 48, 24
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, 17, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "mlp1.0.weight": (4 * width,),
        "mlp1.0.bias": (4 * width,),
        "mlp1.1.weight": (d, 4 * width),
        "mlp1.1.bias": (d,),
        "mlp1.3.weight": (d, d),
        "mlp1.3.bias": (d,),
        "language_model.model.embed_tokens.weight": (50, d),
        "language_model.model.norm.weight": (d,),
        "language_model.lm_head.weight": (50, d),
    }
    for layer in range(2):
        tower = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
                 "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden),
                 "mlp.fc2.bias": (width,)}  # fmt: skip
        tower |= {name: (width,) for name in ("attn.q_norm.weight", "attn.k_norm.weight", "norm1.weight")}
        tower |= {name: (width,) for name in ("norm2.weight", "ls1", "ls2")}
        shapes |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in tower.items()}
        decoder = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d),
                   "self_attn.o_proj": (d, d), "mlp.gate_proj": (64, d), "mlp.up_proj": (64, d),
                   "mlp.down_proj": (d, 64), "input_layernorm": (d,), "post_attention_layernorm": (d,)}  # fmt: skip
        shapes |= {f"language_model.model.layers.{layer}.{name}.weight": shape for name, shape in decoder.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and name.endswith("weight"):
            tensor *= tensor[0].numel() ** -0.5
        elif name.endswith(("weight", "ls1", "ls2")):
            tensor.mul_(0.3).add_(1)
    return config, tensors
