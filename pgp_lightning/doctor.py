"""`pgp doctor`: would this fit work here? Every check says what it found; nothing is trained or changed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgp_lightning.errors import ConfigError, DataError

__all__ = ["Finding", "examine"]

LOOKED_AT = 64  # records of every source that are read whole
FREE_GIB = 1.0


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    state: Literal["ok", "warn", "fail"]
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.what:<12}  {self.detail}"


def examine(configs: list[Path]) -> list[Finding]:
    """Check environment, configuration, data and memory of a fit.

    Args:
        configs: configuration files, later ones over earlier ones, as for `lightning fit`.
    """
    findings = [*_environment()]
    try:
        cli = _instantiate(configs)
    except (ConfigError, FileNotFoundError, SystemExit) as error:
        detail = "the configuration was refused, see above" if isinstance(error, SystemExit) else str(error)
        return [*findings, Finding("fail", "config", " ".join(detail.split()))]
    findings.append(Finding("ok", "config", ", ".join(map(str, configs))))
    checks: tuple[Callable[[Any], Iterator[Finding]], ...] = (_run_folder, _data, _memory)
    for check in checks:
        try:
            findings.extend(check(cli))
        except (ConfigError, DataError, FileNotFoundError) as error:
            findings.append(Finding("fail", check.__name__.strip("_").replace("_", " "), str(error)))
    return findings


def _environment() -> Iterator[Finding]:
    import torch

    names = ("torch", "lightning", "transformers", "peft", "webdataset")
    yield Finding("ok", "versions", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "devices", ", ".join(f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices))
    else:
        yield Finding("ok", "devices", f"no CUDA device; {os.cpu_count()} CPU cores")
    owners = [e.value for e in importlib.metadata.entry_points(group="console_scripts", name="lightning")]
    if owners == ["pgp_lightning.cli:main"]:
        yield Finding("ok", "lightning", "the console script is ours")
    else:
        remedy = "use python -m pgp_lightning, or pip install --force-reinstall --no-deps pgp-lightning"
        yield Finding("warn", "lightning", f"the console script belongs to {owners or 'nobody'}: {remedy}")


def _instantiate(configs: list[Path]) -> Any:  # noqa: ANN401 (a LightningCLI, imported late)
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    from pgp_lightning.training.command_line import TerseParser, quieten, reason_of

    class Parsed(LightningCLI):
        """Builds model, data and trainer, and runs nothing."""

        def parse_arguments(self, parser: Any, args: Any) -> None:  # noqa: ANN401
            self.config = parser.parse_args(args)

    quieten()
    for config in configs:
        if not config.is_file():
            raise FileNotFoundError(f"there is no configuration {config}")
    try:
        return Parsed(
            LightningModule,
            LightningDataModule,
            args=[part for config in configs for part in ("--config", str(config))],
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=TerseParser,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_defaults={"logger": False},
        )
    except Exception as error:
        raise ConfigError(reason_of(error)) from error


def _run_folder(cli: Any) -> Iterator[Finding]:  # noqa: ANN401
    from pgp_lightning.training.run import checkpoints

    root = Path(cli.trainer.default_root_dir)
    there = next(parent for parent in (root, *root.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    yield Finding("ok" if free >= FREE_GIB else "fail", "disk", f"{free:.1f} GiB free at {there} for {root}")
    found = checkpoints(root)
    if found:
        yield Finding("warn", "run folder", f"{root} holds a run: continue with --ckpt_path last, or name another")


def _data(cli: Any) -> Iterator[Finding]:  # noqa: ANN401
    from pgp_lightning.data.conversation import ConversationReader, UnusableRecord
    from pgp_lightning.data.manifest import Manifest
    from pgp_lightning.data.mixture import check_topology
    from pgp_lightning.data.shards import ShardReader, make_builder
    from pgp_lightning.vlm.internvl import load_processor

    data = cli.datamodule
    check_topology(data.lanes, max(1, cli.trainer.world_size), data.workers)
    processor = load_processor(data.base)
    reader = ConversationReader(processor, data.turns, data.max_length)
    for split, sources in Manifest.load(data.manifest, data.root).splits.items():
        for source in sources:
            name = f"{split}/{source.name}"
            if not source.built:
                yield Finding("ok", name, f"{len(make_builder(source))} records, to be built on first use")
                continue
            index = source.index()
            reasons: Counter[str] = Counter()
            lengths = []
            shards = ShardReader(capacity=1)
            numbers = [(shard, i) for shard in index.shards for i in range(shard.samples)][:LOOKED_AT]
            for shard, number in numbers:
                try:
                    conversation = reader(shards.read(shard, number))
                    tokens = conversation.grid.tokens
                    lengths += [processor.prompt_length(t.question, t.answer, tokens) for t in conversation.turns]
                except UnusableRecord as unusable:
                    reasons[unusable.reason] += 1
            bad = sum(reasons.values()) / max(1, len(numbers))
            detail = f"{index.samples} records in {len(index.shards)} shards"
            detail += f"; of the first {len(numbers)}: longest {max(lengths, default=0)} slots"
            detail += "".join(f", {count} {reason}" for reason, count in reasons.items())
            yield Finding("fail" if bad > source.allowed_rejects else "ok", name, detail)


def _memory(cli: Any) -> Iterator[Finding]:  # noqa: ANN401
    weights = sum(p.numel() * p.element_size() for p in cli.model.parameters())
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    # A gradient and AdamW's two moments in float32 for each trained weight.
    states = weights + 12 * trained
    yield Finding("ok", "memory", f"{states / 2**30:.2f} GiB for weights and optimiser ({trained:,} trained weights)")
