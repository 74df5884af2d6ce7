"""`pgp doctor`: would this fit work here? Every check says what it found; nothing is trained, downloaded or changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import HfApi, constants
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, InternVLConfig, LlavaConfig

from pgp_lightning.data.module import InstructionData
from pgp_lightning.doctor_data import examine_mixture, examine_sources
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.finding import Finding, failed
from pgp_lightning.guides.posterior import PosteriorGuide, check_numbers
from pgp_lightning.training.command_line import TerseParser, quieten, reason_of
from pgp_lightning.training.global_batch import GlobalBatch
from pgp_lightning.training.options import refusals
from pgp_lightning.training.pgp import PGP
from pgp_lightning.training.run import checkpoints
from pgp_lightning.vlm.conversion import converted_tensors
from pgp_lightning.vlm.family import check_pair, choose_attention
from pgp_lightning.vlm.loading import check_quantised, family_of, load_processor, read_config, resolve_base
from pgp_lightning.vlm.memory import GIB, device_memory, fit_memory, prune_memory
from pgp_lightning.vlm.original_config import convert_config, is_original
from pgp_lightning.vlm.processor import SIDE_CAR, Processor
from pgp_lightning.vlm.settings import check_chat_format
from pgp_lightning.vlm.shard_files import INDEX

__all__ = ["examine"]

FREE_GIB = 1.0
FULL = 0.9  # share of a device's memory above which an estimate is a warning
TEXT, ANSWER = 256, 64  # prompt slots taken to be usual where no record can be read
REFUSALS = (ConfigError, DataError, OSError)


class _Model(NamedTuple):
    processor: Processor
    config: InternVLConfig | LlavaConfig


@dataclass
class _Case:
    """The configuration, and what checks found out for those behind them."""

    cli: Any
    configs: list[Path]
    answer_model: str | None
    guide: dict[str, Any] = field(default_factory=dict)
    """Arguments of the guide, and of the model around it."""
    data: InstructionData | None = None
    models: dict[str | None, _Model] = field(default_factory=dict)
    """Those whose weights are here, by the name of the base."""
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    """Of every record read: longest text and answer in slots, number of turns."""


def examine(configs: list[Path], answer_model: str | None = None) -> list[Finding]:
    """Check environment, configuration, weights, data and memory of a fit.

    Args:
        configs: configuration files, later ones over earlier ones, as for `lightning fit`.
        answer_model: a model that the guide shall prune, named like a base.
    """
    findings = [*_environment()]
    try:
        case = _Case(_parse(configs), configs, answer_model)
    except (*REFUSALS, SystemExit) as error:
        detail = "the configuration was refused, see above" if isinstance(error, SystemExit) else str(error)
        return [*findings, failed("config", detail)]
    checks: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
        _model, _config, _weights, _bases, _attention, _run_folder, _lanes, _training, _data, _memory, _answer_model
    )  # fmt: skip
    for check in checks:
        try:
            findings.extend(check(case))
        except REFUSALS as error:
            findings.append(failed(check.__name__.strip("_").replace("_", " "), error))
    return findings


def _environment() -> Iterator[Finding]:
    names = ("torch", "lightning", "transformers", "peft", "webdataset")
    yield Finding("ok", "versions", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "devices", ", ".join(f"{d.name} {d.total_memory / GIB:.0f} GiB" for d in devices))
    else:
        yield Finding("ok", "devices", f"no CUDA device; {os.cpu_count()} CPU cores")
    owners = [e.value for e in importlib.metadata.entry_points(group="console_scripts", name="lightning")]
    if owners == ["pgp_lightning.cli:main"]:
        yield Finding("ok", "lightning", "the console script is ours")
    else:
        remedy = "use python -m pgp_lightning, or pip install --force-reinstall --no-deps pgp-lightning"
        yield Finding("warn", "lightning", f"the console script belongs to {owners or 'nobody'}: {remedy}")


class _Parsed(LightningCLI):
    """Reads the configuration; `build` makes data and trainer of it, and no model, which would load weights."""

    def parse_arguments(self, parser: Any, args: Any) -> None:  # noqa: ANN401 (Lightning's types)
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Leave that to `build`."""

    def build(self) -> None:
        self.config.model = None
        try:
            super().instantiate_classes()
        except Exception as error:
            raise ConfigError(reason_of(error)) from error


def _parse(configs: list[Path]) -> _Parsed:
    quieten()
    for config in configs:
        if not config.is_file():
            raise FileNotFoundError(f"there is no configuration {config}")
    return _Parsed(
        LightningModule,
        LightningDataModule,
        args=[part for config in configs for part in ("--config", str(config))],
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=TerseParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # its bookkeeping wants a model
        save_config_callback=None,
        trainer_defaults={"logger": False},
    )


def _model(case: _Case) -> Iterator[Finding]:
    """Take the guide's arguments out of the configuration, and let the model's class check its own."""
    model = case.cli.config.model
    arguments = model.init_args.as_dict() if model.get("init_args") else {}
    guide = arguments.pop("guide", None)
    if not isinstance(guide, dict) or "base" not in guide.get("init_args", {}):
        yield Finding("warn", "model", f"{model.class_path} has no guide with a base: its weights are not examined")
        return
    case.guide = {**arguments, **guide["init_args"]}
    if guide["class_path"].rpartition(".")[2] == PosteriorGuide.__name__:
        check_numbers(guide["init_args"])
    module, _, name = model.class_path.rpartition(".")
    if issubclass(kind := getattr(importlib.import_module(module), name), PGP):
        kind(guide=object(), **arguments)


def _config(case: _Case) -> Iterator[Finding]:
    """Make data, callbacks and trainer, which check their own settings, devices and strategy among them."""
    case.cli.build()
    yield Finding("ok", "config", ", ".join(map(str, case.configs)))
    if isinstance(case.cli.datamodule, InstructionData):
        case.data = case.cli.datamodule
    else:
        yield Finding("warn", "data", f"{type(case.cli.datamodule).__name__} is not known here and not examined")


def _weights(case: _Case) -> Iterator[Finding]:
    """Look for every model and read all of it but its weights."""
    roles = {"guide base": case.guide.get("base"), "answer model": case.answer_model}
    roles["data base"] = case.data.base if case.data else None
    for base in dict.fromkeys(filter(None, roles.values())):
        named = " and ".join(role for role, its in roles.items() if its == base)
        try:
            yield from _one_base(case, f"{named} {base}", base)
        except ConfigError as error:
            yield failed("weights", f"{named}: {error}")


def _one_base(case: _Case, named: str, base: str) -> Iterator[Finding]:
    try:
        folder = resolve_base(base, download=False)
    except ConfigError as error:
        if (found := _on_the_hub(named, base)) is None:
            raise error
        yield found
        return
    size, config, processor = _stored_bytes(folder), read_config(folder), load_processor(str(folder))
    quantised = check_quantised(config, folder)
    if original := is_original(config):
        built: Any = convert_config(config, processor.context_id)
        converted_tensors(folder, built)  # accounts for every tensor, from the files' headers
    else:
        built = AutoConfig.from_pretrained(folder)
        # Released files do not say so, but hold two matrices.
        built.tie_word_embeddings = config.get("tie_word_embeddings", False)
    case.models[base] = _Model(processor, built)
    layout = "original layout, converted while loading" if original else "transformers' layout"
    yield Finding("ok", "weights", f"{named}: {folder}, {processor.family}, {layout}, {size / 1e9:.2f} GB")
    context, known, template = processor.context_id, built.text_config.vocab_size, processor.template
    told = f"{template.context} is {context}, answers end with {template.stop} {processor.stop_id}"
    if max(context, processor.stop_id) >= known:
        raise ConfigError(f"{base!r}: {told}, but there are {known} embeddings: the tokenizer is of another model")
    yield Finding("ok", "tokenizer", f"{told}, at most {processor.max_length:,} slots")
    yield Finding("ok", "settings", f"{named}: {_settings(folder, config, processor)}")
    if quantised is not None:
        yield Finding("warn", "weights", f"{named}: quantised ({quantised}); memory is estimated for whole weights")


def _settings(folder: Path, config: dict[str, Any], processor: Processor) -> str:
    """Say what was taken from files that might say it, and from which."""
    if (folder / SIDE_CAR).is_file():
        return f"tiles, chat format and length from {SIDE_CAR}"
    found = family_of(config, folder).settings(folder, config, processor.tokenizer)
    told = ", ".join(f"{name} {setting.value} ({setting.source})" for name, setting in found.items())
    templates = "" if is_original(config) else check_chat_format(folder, processor.tokenizer, processor.template)
    return f"{told}, chat format of the family" + (f" (agrees with {templates})" if templates else "")


def _on_the_hub(named: str, base: str) -> Finding | None:
    """Ask the hub for the size of a repository that is not in the cache; None if it cannot be reached."""
    name, _, revision = base.partition("@")
    if constants.HF_HUB_OFFLINE or base.startswith("embedded:") or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=10)
    except Exception:  # the library raises its own, its transport's, and OSError
        return None
    size = sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))
    there, free = _free(Path(constants.HF_HUB_CACHE))
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    told = f"{named}: {size / GIB:.1f} GiB to download on first use (or now: `{command}`)"
    state: Literal["warn", "fail"] = "warn" if 0 < size < free * GIB else "fail"
    return Finding(state, "weights", f"{told}, {free:.1f} GiB free at {there}; nothing else of it could be examined")


def _stored_bytes(folder: Path) -> int:
    """Return the size of a folder's weights, having opened every file."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / INDEX} is no index of weights ({error!r}): download it again") from error
        files = [folder / name for name in sorted(set(listed))]
    missing = [file.name for file in files if not file.is_file()] if files else ["*.safetensors"]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing[:3])}: copy or download the whole folder again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is damaged ({error}): copy or download it again") from error
    return sum(file.stat().st_size for file in files)


def _free(folder: Path) -> tuple[Path, float]:
    """Return where a folder is, or would be made, and the GiB that are free there."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return there, shutil.disk_usage(there).free / GIB


def _bases(case: _Case) -> Iterator[Finding]:
    """Compare the guide with the base that the data is prepared for, and with the length that is wanted."""
    guide, data = case.models.get(case.guide.get("base")), case.models.get(case.data.base if case.data else None)
    if guide is None or data is None or case.data is None:
        return
    if guide.processor.rule != data.processor.rule:
        told = f"they must tile alike: {guide.processor.rule} and {data.processor.rule}"
        raise ConfigError(f"the guide's base and data.base: {told}; set both to the same model")
    most, wanted = guide.processor.max_length, case.data.max_length
    if wanted is not None and wanted > most:
        yield Finding("warn", "max_length", f"data.max_length is {wanted}, the guide's base was made for {most} slots")


def _attention(case: _Case) -> Iterator[Finding]:
    if wanted := case.guide.get("attention"):
        case.guide["attention"] = choose_attention(wanted, getattr(torch, case.guide["dtype"]))
        yield Finding("ok", "attention", f"{wanted} gives {case.guide['attention']} here")


def _run_folder(case: _Case) -> Iterator[Finding]:
    root = Path(case.cli.config.trainer.default_root_dir or ".")
    there, free = _free(root)
    yield Finding("ok" if free >= FREE_GIB else "fail", "disk", f"{free:.1f} GiB free at {there} for {root}")
    if checkpoints(root):
        yield Finding("warn", "run folder", f"{root} holds a run: continue with --ckpt_path last, or name another")


def _lanes(case: _Case) -> Iterator[Finding]:
    if case.data is not None:
        trainer = case.cli.trainer
        ranks = max(1, trainer.world_size)
        for callback in trainer.callbacks:
            if isinstance(callback, GlobalBatch):
                callback.settle(trainer, case.data)
                yield Finding("ok", "batch", callback.told(trainer, case.data.batch_size))
        batches = trainer.max_steps * trainer.accumulate_grad_batches * ranks
        if trainer.overfit_batches:
            batches = min(batches, int(trainer.overfit_batches) * ranks)
        yield from examine_mixture(case.data, ranks, batches if batches > 0 else None)


def _training(case: _Case) -> Iterator[Finding]:
    """Name the trainer's options that a fit would refuse; by now GlobalBatch has settled the accumulation."""
    if (trainer := getattr(case.cli, "trainer", None)) is None:  # it could not be built, which has been said
        return
    if refused := list(refusals(trainer, case.cli.datamodule)):
        yield from (failed("training", one) for one in refused)
    else:
        told = f"{trainer.max_steps:,} optimiser steps of {trainer.accumulate_grad_batches} micro-batches a process"
        yield Finding("ok", "training", f"{told}, precision {trainer.precision}")


def _data(case: _Case) -> Iterator[Finding]:
    if (data := case.data) is not None:
        model = case.models.get(data.base)
        yield from examine_sources(data, model.processor if model else None, case.rows)


def _memory(case: _Case) -> Iterator[Finding]:
    guide, data = case.models.get(case.guide.get("base")), case.data
    if guide is None or data is None:
        yield Finding("warn", "memory", "not estimated, for want of the guide's base or of the data")
        return
    device, memory = device_memory(case.cli.trainer.strategy.root_device)
    tiles, text = _largest(case, guide.processor)
    turns = max((turns for _, _, turns in case.rows), default=1)
    rows, visual = data.batch_size * turns, tiles * guide.processor.rule.tokens_per_side**2
    answer = max((answer for _, answer, _ in case.rows), default=ANSWER)
    # The budget cuts longer rows off: with this much text a row fills it.
    full = max(text, (data.max_length or guide.processor.max_length) - visual)
    names = ("lora_rank", "head_layers", "gradient_checkpointing", "attention")
    fit, worst = (
        fit_memory(
            guide.config,
            rows=rows,
            images=data.batch_size,
            tiles=tiles,
            text_slots=slots,
            answer=answer,
            visual_share=case.guide.get("visual_token_share", 1.0),
            dtype=getattr(torch, case.guide.get("dtype", "float32")),
            **{key: case.guide[key] for key in names if key in case.guide},
        )
        for slots in (text, full)
    )
    told = f"{fit} for {rows} rows of {tiles} tiles and {text} slots of text at most"
    told += f"; {device} has {memory / GIB:.1f} GiB"
    if fit.total > FULL * memory:
        told += ": lower data.batch_size and raise trainer.accumulate_grad_batches, or set gradient_checkpointing"
    yield Finding("fail" if fit.total > memory else "warn" if fit.total > FULL * memory else "ok", "memory", told)
    if fit.total <= FULL * memory < worst.total:
        told = f"{worst.total / GIB:.1f} GiB, were all rows as long as data.max_length allows ({visual + full:,} slots)"
        yield Finding("warn", "memory", f"{told}: only some records were read; a lower data.max_length makes sure")


def _largest(case: _Case, processor: Processor) -> tuple[int, int]:
    """Return tiles and text slots of the largest row that the data may hold."""
    rule, data = processor.rule, case.data
    text = max((text for text, _, _ in case.rows), default=TEXT)
    most = min(rule.max_tiles, _most_tiles(data) or rule.max_tiles) if data else rule.max_tiles
    budget = (data and data.max_length) or processor.max_length
    fitting = max(1, (budget - text) // rule.tokens_per_side**2)
    return min(fitting, most + int(rule.thumbnail and most > 1)), text


def _most_tiles(data: InstructionData) -> int | None:
    """Return the greatest number of tiles that the data's settings allow some source, None for the model's own."""
    sources = [source for split in data.read_manifest().splits.values() for source in split]
    limits = [source.max_tiles or data.max_tiles for source in sources]
    return None if None in limits else max(limit for limit in limits if limit)


def _answer_model(case: _Case) -> Iterator[Finding]:
    """Say whether the guide's scores can be laid on the answer model's tokens, and what generating takes."""
    guide, answer = case.models.get(case.guide.get("base")), case.models.get(case.answer_model)
    if guide is None or answer is None:
        return
    check_pair(guide.processor, answer.processor)
    tiles, text = _largest(case, answer.processor)
    prune = prune_memory(answer.config, tiles=tiles, text_slots=text, keep_ratio=0.05)
    yield Finding("ok", "answer model", f"has the guide's tokens; {prune} in bfloat16, a prompt of {tiles} tiles")
