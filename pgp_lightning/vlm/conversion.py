"""Original InternVL checkpoints (`internvl_chat`) as transformers' own `InternVLForConditionalGeneration`.

Nothing is computed on the way: every tensor of the new model is rows of one original tensor, so that a conversion is a
list of which rows go where, known and checked from the files' headers before the first weight is read. InternVL2, 2.5
and 3 are known, with the text models Qwen2, Llama and InternLM2 (which is Llama under other names).
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.shard_files import (
    DTYPES,
    INDEX,
    SINGLE,
    Piece,
    Stored,
    read_folder,
    read_tensor,
    sync_path,
    verify_file,
    write_file,
)

__all__ = ["convert_checkpoint", "converted_tensors", "load_original"]

# New name and original name: # stands for a layer's number, * for weight or bias. A third entry says which part of a
# packed original it is: 0 query, 1 key, 2 value.
Rule = tuple[str, str] | tuple[str, str, int]
TOWER: tuple[Rule, ...] = (
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection.*", "vision_model.embeddings.patch_embedding.*"),
    ("model.vision_tower.encoder.layer.#.attention.q_proj.*", "vision_model.encoder.layers.#.attn.qkv.*", 0),
    ("model.vision_tower.encoder.layer.#.attention.k_proj.*", "vision_model.encoder.layers.#.attn.qkv.*", 1),
    ("model.vision_tower.encoder.layer.#.attention.v_proj.*", "vision_model.encoder.layers.#.attn.qkv.*", 2),
    ("model.vision_tower.encoder.layer.#.attention.q_norm.*", "vision_model.encoder.layers.#.attn.q_norm.*"),
    ("model.vision_tower.encoder.layer.#.attention.k_norm.*", "vision_model.encoder.layers.#.attn.k_norm.*"),
    ("model.vision_tower.encoder.layer.#.attention.projection_layer.*", "vision_model.encoder.layers.#.attn.proj.*"),
    ("model.vision_tower.encoder.layer.#.layernorm_before.*", "vision_model.encoder.layers.#.norm1.*"),
    ("model.vision_tower.encoder.layer.#.layernorm_after.*", "vision_model.encoder.layers.#.norm2.*"),
    ("model.vision_tower.encoder.layer.#.lambda_1", "vision_model.encoder.layers.#.ls1"),
    ("model.vision_tower.encoder.layer.#.lambda_2", "vision_model.encoder.layers.#.ls2"),
    ("model.vision_tower.encoder.layer.#.mlp.fc1.*", "vision_model.encoder.layers.#.mlp.fc1.*"),
    ("model.vision_tower.encoder.layer.#.mlp.fc2.*", "vision_model.encoder.layers.#.mlp.fc2.*"),
    ("model.multi_modal_projector.layer_norm.*", "mlp1.0.*"),
    ("model.multi_modal_projector.linear_1.*", "mlp1.1.*"),
    ("model.multi_modal_projector.linear_2.*", "mlp1.3.*"),
)
_COMMON = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
# Qwen2 and Llama are stored under transformers' names of that time, which have one prefix more.
TEXT: tuple[Rule, ...] = (
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("model.language_model.norm.weight", "language_model.model.norm.weight"),
    *((f"model.language_model.layers.#.{stem}.*", f"language_model.model.layers.#.{stem}.*") for stem in _COMMON),
)
INTERNLM2: tuple[Rule, ...] = (
    ("lm_head.weight", "language_model.output.weight"),
    ("model.language_model.embed_tokens.weight", "language_model.model.tok_embeddings.weight"),
    ("model.language_model.norm.weight", "language_model.model.norm.weight"),
    ("model.language_model.layers.#.self_attn.q_proj.*", "language_model.model.layers.#.attention.wqkv.*", 0),
    ("model.language_model.layers.#.self_attn.k_proj.*", "language_model.model.layers.#.attention.wqkv.*", 1),
    ("model.language_model.layers.#.self_attn.v_proj.*", "language_model.model.layers.#.attention.wqkv.*", 2),
    ("model.language_model.layers.#.self_attn.o_proj.*", "language_model.model.layers.#.attention.wo.*"),
    ("model.language_model.layers.#.mlp.gate_proj.*", "language_model.model.layers.#.feed_forward.w1.*"),
    ("model.language_model.layers.#.mlp.up_proj.*", "language_model.model.layers.#.feed_forward.w3.*"),
    ("model.language_model.layers.#.mlp.down_proj.*", "language_model.model.layers.#.feed_forward.w2.*"),
    ("model.language_model.layers.#.input_layernorm.*", "language_model.model.layers.#.attention_norm.*"),
    ("model.language_model.layers.#.post_attention_layernorm.*", "language_model.model.layers.#.ffn_norm.*"),
)


def converted_tensors(folder: Path, config: InternVLConfig) -> Iterator[tuple[str, Tensor]]:
    """Return names and tensors of the new model, read one by one in the order of the files, in their stored dtype.

    Args:
        folder: the original checkpoint.
        config: its translation.

    Raises:
        ConfigError: at once, if a tensor is missing, unknown or of another shape, or a file is not as its index says.
    """
    pieces = _plan(folder, config)
    return ((piece.name, read_tensor(piece)) for piece in pieces)


def load_original(
    folder: Path, config: InternVLConfig, dtype: torch.dtype, attention: str, stop_id: int | None = None
) -> InternVLForConditionalGeneration:
    """Load an original checkpoint without writing anything; it takes the model's memory and one tensor's.

    Args:
        folder: the original checkpoint.
        config: its translation; left as it is.
        dtype: of the weights.
        attention: implementation of both parts.
        stop_id: id at which generation stops, if not the text model's.

    Raises:
        ConfigError: as `converted_tensors`.
    """
    # Names as in files: a model that was loaded under others would be saved under others.
    weights = {_disk_name(name): tensor.to(dtype) for name, tensor in converted_tensors(folder, config)}
    # The model takes these very tensors, without a copy, since they have its dtype.
    model: InternVLForConditionalGeneration = InternVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attention
    )
    model.generation_config = _generation_config(config, stop_id)
    return model


def convert_checkpoint(
    source: Path,
    target: Path,
    config: InternVLConfig,
    *,
    stop_id: int | None = None,
    write_extras: Callable[[Path], None] | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write an original checkpoint as a folder in transformers' layout, whole and compared bit for bit, or not at all.

    Args:
        source: the original checkpoint.
        target: folder to be made; until it is complete it has another, hidden name beside the target.
        config: translation of the source's.
        stop_id: id at which generation stops, if not the text model's.
        write_extras: called with the hidden folder before the weights, for what else belongs to a model.
        shard_bytes: greatest size of a file, single tensors aside.

    Raises:
        ConfigError: as `converted_tensors`; if the target exists, or the disk is too small.
        DataError: if what was written is read back differently.
    """
    target = target.absolute()
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already: remove it, or give another target")
    pieces = _plan(source, config)
    size = sum(piece.size for piece in pieces)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise ConfigError(f"{target} takes {size:,} bytes, and its disk has {free:,} left: make room")
    config = copy.deepcopy(config)
    for part in (config, cast(Any, config.text_config), cast(Any, config.vision_config)):
        part.dtype = _main_dtype(pieces)
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    hidden.mkdir()
    try:
        if write_extras is not None:
            write_extras(hidden)
        _write_weights(hidden, pieces, shard_bytes)
        _generation_config(config, stop_id).save_pretrained(hidden)
        config.save_pretrained(hidden)
        for path in (*hidden.rglob("*"), hidden):
            sync_path(path)
        hidden.rename(target)
        sync_path(target.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _plan(folder: Path, config: InternVLConfig) -> list[Piece]:
    """Say where every tensor of the new model comes from, in the order of the files, having accounted for all."""
    text = cast(Any, config.text_config)
    if config.tie_word_embeddings or text.tie_word_embeddings:
        raise ConfigError(
            "tie_word_embeddings must be False here and in text_config: the originals store both matrices"
        )
    stored = read_folder(folder)
    for key, one in stored.items():
        if key.startswith("base_model.model.") or ".lora_" in key or ".base_layer." in key:
            raise ConfigError(
                f"tensor {key!r} of {one.file} is part of a LoRA adapter: merge the adapter into the weights first"
            )
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(copy.deepcopy(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    packed = text.model_type == "llama" and any(".attention.wqkv." in key for key in stored)
    origins = {name: _origin(name, (*TOWER, *(INTERNLM2 if packed else TEXT))) for name in shapes}
    rows: Counter[str] = Counter()
    for name, (key, _) in origins.items():
        rows[key] += shapes[name][0]
    for key in sorted(stored.keys() - rows.keys()):
        raise ConfigError(
            f"tensor {key!r} of {stored[key].file} is none that config.json describes: are both of one model?"
        )
    if missing := sorted(rows.keys() - stored.keys()):
        raise ConfigError(f"{_some(missing)} should be in {folder} and are not: download the checkpoint again")
    for name, (key, _) in origins.items():
        expected, one = (rows[key], *shapes[name][1:]), stored[key]
        if one.shape != expected:
            raise ConfigError(
                f"tensor {key!r} of {one.file} must have shape {expected} by config.json, got {one.shape}: "
                "are both of one model?"
            )
    heads = (1, 1) if not packed else (text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads)
    pieces = [
        Piece(name, stored[key], _rows(stored[key], shapes[name][0], part, heads if ".wqkv." in key else (1, 1)))
        for name, (key, part) in origins.items()
    ]
    return sorted(pieces, key=lambda piece: (piece.source.file, piece.spans[0]))


def _origin(name: str, rules: Iterable[Rule]) -> tuple[str, int | None]:
    """Return the original name of a tensor and which part of that it is."""
    for new, old, *part in rules:
        pattern = re.escape(new).replace(r"\#", r"(?P<layer>\d+)").replace(r"\*", "(?P<kind>weight|bias)")
        if match := re.fullmatch(pattern, name):
            found = match.groupdict()
            key = old.replace("#", found.get("layer", "")).replace("*", found.get("kind", ""))
            return key, next(iter(part), None)
    raise AssertionError(f"no rule for {name}")


def _rows(stored: Stored, count: int, part: int | None, heads: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of rows that are the query, the key or the value of a packed tensor, or all of another.

    A packed tensor is a row of groups, each of some query heads, a key head and a value head; the tower's, packed as
    one query, one key and one value, is the case of one group with one head.
    """
    if part is None:
        return ((0, stored.shape[0]),)
    groups, queries = heads
    head = stored.shape[0] // (groups * (queries + 2))
    first, end = ((0, queries), (queries, queries + 1), (queries + 1, queries + 2))[part]
    found = tuple(((g * (queries + 2) + first) * head, (g * (queries + 2) + end) * head) for g in range(groups))
    assert sum(end - first for first, end in found) == count
    return found


def _some(keys: list[str]) -> str:
    named = ", ".join(map(repr, keys[:3]))
    return f"tensors {named}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _disk_name(name: str) -> str:
    """Return the name in files, which transformers keeps as it was before version 5."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    inner = name.removeprefix("model.")
    text = "language_model."
    return inner.replace(text, f"{text}model.", 1) if inner.startswith(text) else inner


def _main_dtype(pieces: Iterable[Piece]) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for piece in pieces:
        sizes[piece.source.dtype] += piece.size
    return DTYPES[sizes.most_common(1)[0][0]]


def _generation_config(config: InternVLConfig, stop_id: int | None) -> GenerationConfig:
    text = cast(Any, config.text_config)
    stop = text.eos_token_id if stop_id is None else stop_id
    pad = stop if text.pad_token_id is None else text.pad_token_id
    return GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=stop, pad_token_id=pad)  # type: ignore[no-untyped-call]


def _write_weights(folder: Path, pieces: list[Piece], shard_bytes: int) -> None:
    """Write the files of the weights, and verify each while the next is written and its sources are still cached."""
    shards: list[list[Piece]] = [[]]
    room = shard_bytes
    for piece in pieces:
        if shards[-1] and piece.size > room:
            shards.append([])
            room = shard_bytes
        room -= piece.size
        shards[-1].append(Piece(_disk_name(piece.name), piece.source, piece.rows))
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    size = sum(piece.size for piece in pieces)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar, ThreadPoolExecutor(1) as aside:
        task = bar.add_task("", total=2 * size)  # written, and read again

        def advance(count: int) -> None:
            bar.advance(task, count)

        check: Future[None] | None = None
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard, advance)
            if check is not None:
                check.result()
            check = aside.submit(verify_file, folder / name, shard, advance)
        if check is not None:
            check.result()
    if len(shards) > 1:
        count = sum(piece.size // DTYPES[piece.source.dtype].itemsize for piece in pieces)
        places = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        index = {
            "metadata": {"total_parameters": count, "total_size": size},
            "weight_map": dict(sorted(places.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
