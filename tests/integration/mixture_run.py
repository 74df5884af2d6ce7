"""The made-up mixture of `benchmarks/synthetic_mixture.py`: written, built, and a small fit over it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgp_lightning.data.index import Index
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder, StreamSource
from tests.integration.small_run import ROOT, small_config

LANES, BATCH = 4, 32


@dataclass
class Built:
    """A mixture on the disk: what was planted, what building and verifying said, and the seconds they took."""

    folder: Path
    planted: dict[str, Any]
    said: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        return self.folder / "mixture.yaml"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def index(self, source: str) -> Index:
        return Index.load(self.shards / "train" / source)

    def sources(self) -> tuple[StreamSource, ...]:
        return tuple(StreamSource.load(source) for source in Manifest.load(self.manifest).sources("train"))

    def keys(self, source: StreamSource) -> dict[Path, list[str]]:
        """Return the keys of the usable records of every shard, from the report of the others."""
        report = self.shards / "train" / source.name / "rejected.jsonl"
        out = {json.loads(line)["record"] for line in report.read_text().splitlines()} if report.exists() else set()
        kept = iter(number for number in range(self.planted[source.name]["in"]) if number not in out)
        return {
            shard.path: [f"{source.name}-{next(kept):08d}" for _ in range(shard.samples)] for shard in source.shards
        }

    def long(self) -> set[str]:
        """Return the keys of the records that are too long for the embedded guide."""
        return {f"{name}-{number:08d}" for name, planted in self.planted.items() for number in planted["long"]}


def run(*command: str) -> str:
    """Run a program with the python of the tests and return what it printed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_mixture(folder: Path, records: int) -> Built:
    """Write a mixture and build its shards with two workers, through the command line."""
    commands = {
        "write": ["benchmarks/synthetic_mixture.py", str(folder), f"--records={records}"],
        "build": ["-m", "pgp_lightning.tools", "shards", "build", str(folder / "mixture.yaml"), "--workers=2"],
        "verify": ["-m", "pgp_lightning.tools", "shards", "verify", str(folder / "mixture.yaml")],
    }
    said, seconds = {}, {}
    for name, command in commands.items():
        begin = time.perf_counter()
        said[name] = run(*command)
        seconds[name] = time.perf_counter() - begin
    return Built(folder, json.loads((folder / "planted.json").read_text())["sources"], said, seconds)


def fit_config(manifest: Path, steps: int, base: str) -> dict[str, Any]:
    """Return configs/pgp.yaml with images of one tile and one micro-batch of 32 records a step."""
    config = small_config(manifest, steps, save_every=steps)
    config["model"]["init_args"]["guide"]["init_args"]["base"] = config["data"]["init_args"]["base"] = base
    config["trainer"] |= {"accumulate_grad_batches": 1, "limit_val_batches": 0}
    config["data"]["init_args"] |= {
        "batch_size": BATCH, "lanes": LANES, "workers": 2, "turns": "first", "max_tiles": 1, "mixing": "even",
    }  # fmt: skip
    return config


def planned_keys(built: Built, mixture: Mixture, batches: int) -> list[str]:
    """Return the keys of the records that are due in the first micro-batches of an epoch, of all lanes in turn."""
    keys = [built.keys(source) for source in mixture.sources]
    orders = [SourceOrder(source, mixture.seed, number) for number, source in enumerate(mixture.sources)]
    plan = EpochPlan(mixture, 0)
    lanes = [Lane(plan, number) for number in range(mixture.lanes)]
    found = []
    for number in range(batches):
        for _ in range(mixture.batch_size):
            source, candidates = lanes[number % mixture.lanes].take()
            shard, place = orders[source].locate(next(candidates))
            found.append(keys[source][shard.path][place])
    return found
