"""The default configuration, shrunk to a run of seconds on a few records of the embedded world."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.trace import read_trace

ROOT = Path(__file__).parents[2]
RECORDS = {"train": {"objects": 40, "reading": 24}, "val": {"objects": 5, "reading": 3}, "test": {"objects": 4}}
OFTEN = {"PosteriorHealth": 2, "LogLine": 4}


def write_manifest(folder: Path, root: Path, **options: Any) -> Path:
    """Write a manifest of a few records; options go to every source."""
    build = "pgp_lightning.embedded.records.EmbeddedRecords"
    splits = {
        split: [
            {
                "name": family,
                "build": {
                    "class_path": build,
                    "init_args": {"split": split, "family": family, "records": records},
                    "samples_per_shard": 16,
                },
                **options,
            }
            for family, records in families.items()
        ]
        for split, families in RECORDS.items()
    }
    manifest = {"name": "small", "licence": "Apache-2.0", "root": str(root), "splits": splits}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(manifest, sort_keys=False))
    return path


def small_config(manifest: Path, steps: int = 8, save_every: int = 2) -> dict[str, Any]:
    """Return configs/pgp.yaml with a few steps of four records each, two micro-batches a step."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "pgp.yaml").read_text())
    config["trainer"] |= {
        "accelerator": "cpu", "max_steps": steps, "accumulate_grad_batches": 2, "val_check_interval": steps,
        "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] in OFTEN:
            callback.setdefault("init_args", {})["every_n_steps"] = OFTEN[callback["class_path"]]
        if callback["class_path"] == "StepCheckpoint":
            callback["init_args"]["every_n_train_steps"] = save_every
        if callback["class_path"] == "ImportanceImages":
            callback["init_args"] = {"samples": 2, "size": 64}
    config["trainer"]["callbacks"].append({"class_path": "tests.trace.Trace"})
    config["data"]["init_args"] |= {"manifest": str(manifest), "batch_size": 2, "val_batch_size": 4, "lanes": 4}
    return config


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write a configuration."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def fit_command(config: Path, root: Path, *extra: str) -> list[str]:
    """Return the command that trains in a folder."""
    program = [sys.executable, "-m", "pgp_lightning", "fit", "--config", str(config)]
    return [*program, f"--trainer.default_root_dir={root}", *extra]


def wait_for_trace(process: subprocess.Popen[Any], root: Path, lines: int, rank: int = 0) -> None:
    """Wait until a run has traced so many micro-batches, or has ended."""
    while len(read_trace(root, rank)) < lines and process.poll() is None:
        time.sleep(0.005)


def lives(process: int) -> bool:
    """Say whether a process of the program is there and no zombie."""
    try:
        return b"pgp_lightning" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def second_process(first: int) -> int:
    """Return the process that the first one started with the same program."""
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return next(child for child in map(int, children) if lives(child))
