"""From the name of a base to a model: the package's own, a local folder, or a repository on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.quantizers.auto import AutoHfQuantizer

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.conversion import convert_checkpoint
from pgp_lightning.vlm.family import VLM, Attention, choose_attention, without_wrapper
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import Llava
from pgp_lightning.vlm.original_config import convert_config, image_token_id, is_original
from pgp_lightning.vlm.processor import SIDE_CAR, Processor, read_side_car, write_side_car
from pgp_lightning.vlm.settings import CONFIG, agreed, image_files, read_object
from pgp_lightning.vlm.shard_files import INDEX, SINGLE

__all__ = [
    "as_vlm",
    "check_quantised",
    "convert_base",
    "family_of",
    "load_processor",
    "load_tokenizer",
    "load_vlm",
    "packaged",
    "read_config",
    "resolve_base",
]

FAMILIES: tuple[type[VLM], ...] = (InternVL, Llava)
# Weights without pickle, and no code.
_WANTED = ["*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_PACKAGED = "embedded:"
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")


def resolve_base(base: str, download: bool = True) -> Path:
    """Return the folder of a model, which is downloaded if it is a repository that is not in the cache yet.

    Args:
        base: `embedded:NAME` for one of the package's own, a local folder, or `OWNER/NAME`, optionally `@REVISION`.
        download: whether a repository may be downloaded, or has to be in the cache.

    Raises:
        ConfigError: if there is no such model.
    """
    if base.startswith(_PACKAGED):
        return packaged(base, "models")
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not _REPOSITORY.fullmatch(base):
        raise ConfigError(
            f"no model at {base!r}: give a local folder that holds config.json and safetensors, "
            "embedded:NAME, or a repository OWNER/NAME"
        )
    return _download(base, download)


def packaged(name: str, kind: Literal["models", "guides"]) -> Path:
    """Return the folder of `embedded:NAME`, a model or a guide that comes with the package.

    Raises:
        ConfigError: if there is none of that name.
    """
    bare = name.removeprefix(_PACKAGED)
    there = Path(__file__).parents[1] / "embedded" / kind
    folder = there / bare
    if not bare.isidentifier() or not folder.is_dir():
        known = ", ".join(sorted(f"{_PACKAGED}{p.name}" for p in there.glob("*") if p.is_dir()))
        raise ConfigError(f"no {kind.removesuffix('s')} at {name!r}: the package holds {known or 'none'}")
    return folder


def _download(base: str, download: bool) -> Path:
    name, _, revision = base.partition("@")
    reason = ""
    for local in (True, False)[: 1 + download]:
        try:
            found = snapshot_download(
                name, revision=revision or None, allow_patterns=_WANTED, local_files_only=local, max_workers=4
            )
        except Exception as error:  # the library raises its own, requests', and OSError
            if not local:
                reason = " ".join(str(error).split()).split(". ")[0][:200]
            continue
        # An interrupted download leaves a part of the folder in the cache.
        if _is_whole(Path(found)):
            return Path(found)
        reason = "it lacks config.json, a tokenizer, or safetensors files"
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    tried = f" and cannot be downloaded ({reason})" if download else ""
    raise ConfigError(
        f"no model at {base!r}: there is no such folder, and a whole copy is not in the hub's cache{tried}; "
        f"on a machine with a network run `{command}` and copy the folder, then give its path"
    )


def _is_whole(folder: Path) -> bool:
    """Say whether configuration, tokenizer and every file of weights are there."""
    files = {SINGLE}
    if (folder / INDEX).is_file():
        try:
            files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return _has_tokenizer(folder) and all((folder / name).is_file() for name in ("config.json", *files))


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json` as it is, without transformers, which would want remote code for some.

    Raises:
        ConfigError: if it is no JSON object.
    """
    return read_object(folder / CONFIG)


def family_of(config: Mapping[str, Any], folder: Path) -> type[VLM]:
    """Return the family of a checkpoint.

    Raises:
        ConfigError: if it is none that is supported.
    """
    for family in FAMILIES:
        if family.recognises(config):
            return family
    names = " and ".join(family.__name__ for family in FAMILIES)
    raise ConfigError(f"{folder} is of model_type {config.get('model_type')!r}; supported are {names}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer without remote code.

    Raises:
        ConfigError: if there is none, or sentencepiece is missing and needed.
    """
    if not _has_tokenizer(folder):
        wanted = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        raise ConfigError(f"{folder} holds no tokenizer: expected {wanted}")
    if (folder / "tokenizer.json").is_file():
        fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
        return fast
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder)
    bpe: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return bpe


def _has_tokenizer(folder: Path) -> bool:
    names = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in one) for one in names)


def _sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Load the sentencepiece tokenizer of InternLM2 (its own class is remote code) or Llama."""
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if missing:
        raise ConfigError(
            f"the tokenizer of {folder} needs {' and '.join(missing)}: pip install 'pgp-lightning[sentencepiece]'"
        )
    config = folder / "tokenizer_config.json"
    facts = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    # With the defaults every InternLM2 sequence would begin with a space and without <s>.
    internlm2 = "InternLM2" in str(facts.get("tokenizer_class", ""))
    options: dict[str, Any] = {"add_prefix_space": False, "legacy": False, "add_bos_token": True, "pad_token": "</s>"}
    tokenizer: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, **(options if internlm2 else {}))
    return tokenizer


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def load_processor(base: str) -> Processor:
    """Load tokenizer, tile rule and chat format of a model (no weights; cheap enough for data workers).

    Raises:
        ConfigError: if there is no such model, or it is of a kind that is not supported.
    """
    return _describe(base).processor


class _Described(NamedTuple):
    """All that is known of a model before its weights are read."""

    folder: Path
    config: dict[str, Any]
    family: type[VLM]
    processor: Processor


def _describe(base: str) -> _Described:
    folder = resolve_base(base)
    config = read_config(folder)
    family = family_of(config, folder)
    tokenizer = load_tokenizer(folder)
    side_car = read_side_car(folder)
    if side_car is None:
        facts = family.facts(folder, config, tokenizer)
        processor = Processor(tokenizer, *facts, family.family)
    elif side_car["family"] == family.family:
        processor = Processor(tokenizer, **side_car)
        if not is_original(config) and any(image_files(folder).values()):
            # transformers has saved a processor of its own beside ours.
            rule = family.facts(folder, config, tokenizer).rule
            agreed(folder, "the tile rule", {SIDE_CAR: asdict(processor.rule), "transformers' files": asdict(rule)})
    else:
        raise ConfigError(f"{folder / SIDE_CAR} must say family {family.family!r}, got {side_car['family']!r}")
    # A tokenizer of another model is found out here, not as an index error in the middle of training.
    _ = processor.context_id, processor.stop_id
    return _Described(folder, config, family, processor)


def load_vlm(base: str, dtype: torch.dtype = torch.float32, attention: Attention = "auto") -> VLM:
    """Load a model and its processor.

    Args:
        base: what `resolve_base` takes.
        dtype: of the weights.
        attention: implementation of transformers; `auto` is flash-attn where it can run, else sdpa.

    Raises:
        ConfigError: if there is no such model, it is of a kind that is not supported, or it does not fit its tokenizer.
    """
    folder, config, family, processor = _describe(base)
    check_quantised(config, folder)
    model = family.load_model(folder, config, processor, dtype, choose_attention(attention, dtype))
    vlm = family(model, processor, base)
    known = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    if max(processor.context_id, processor.stop_id) >= known:
        ids = f"{processor.template.context} is {processor.context_id}, {processor.template.stop} {processor.stop_id}"
        raise ConfigError(f"{base!r}: {ids}, but there are {known} embeddings: the tokenizer is of another model")
    if model.generation_config is not None:
        model.generation_config.eos_token_id = processor.stop_id  # where an answer ends, whatever a file says
    return vlm


def check_quantised(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return how the weights are quantised, None if they are not.

    Raises:
        ConfigError: says which package is missing, or that it is not supported.
    """
    parts = [config, *(config.get(name) or {} for name in ("text_config", "llm_config"))]
    quantised: dict[str, Any] | None = next(
        (p["quantization_config"] for p in parts if p.get("quantization_config")), None
    )
    if quantised is None:
        return None
    method = str(quantised.get("quant_method", "unknown"))
    if is_original(config):
        raise ConfigError(
            f"{folder} is quantised ({method}), in the original layout, which is not supported: use the released one"
        )
    try:
        AutoHfQuantizer.from_config(dict(quantised), pre_quantized=True).validate_environment()
    except Exception as error:  # ImportError for packages; the methods' own classes raise others
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder} is quantised ({method}) and cannot be loaded here: {reason}") from error
    return method


def as_vlm(model: nn.Module) -> VLM:
    """See a model in memory as its family's `VLM`, without a processor; an adapter around it changes nothing.

    Raises:
        ConfigError: if it is of no family that is supported.
    """
    inner = without_wrapper(model)
    for family in FAMILIES:
        if family.is_family_of(inner):
            return family(inner, None, type(inner).__name__)
    names = " and ".join(family.__name__ for family in FAMILIES)
    raise ConfigError(f"{type(inner).__name__} is of no family that can be pruned; supported are {names}")


def convert_base(source: str, target: Path, context_id: int | None = None) -> None:
    """Rewrite a checkpoint in the original InternVL layout as one that transformers loads by itself.

    Args:
        source: what `resolve_base` takes.
        target: a folder that does not exist yet; what is there afterwards is complete and verified.
        context_id: id of <IMG_CONTEXT>; by default the tokenizer's, or without one what the vocabulary's size says.

    Raises:
        ConfigError: if the source is in another layout, or of a kind that is not supported.
    """
    folder = resolve_base(source)
    config = read_config(folder)
    if not is_original(config):
        raise ConfigError(f"{folder} is in transformers' layout already: use it as it is")
    tokenizer = load_tokenizer(folder) if _has_tokenizer(folder) else None
    facts = InternVL.facts(folder, config, tokenizer)
    found = image_token_id(config, tokenizer)
    if context_id is not None and context_id != found:
        if tokenizer is not None:
            raise ConfigError(
                f"the tokenizer of {folder} gives <IMG_CONTEXT> the id {found}, not {context_id}: leave it out"
            )
        found = context_id
    if tokenizer is not None:
        stop: int | None = Processor(tokenizer, *facts).stop_id
    else:
        # InternLM2's own stop ends a document; <|im_end|> comes four ids before <IMG_CONTEXT>.
        stop = found - 4 if config["llm_config"].get("model_type") == "internlm2" else None

    def write_extras(part: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_side_car(part, InternVL.family, *facts)

    convert_checkpoint(folder, target, convert_config(config, found), stop_id=stop, write_extras=write_extras)
