"""A process that takes batches of a stream, and no more: what a training run does with its data, without a model.

    python -m tests.integration.stream_job JSON

Every batch it gets is a line of `<log>/<rank>.jsonl`; then rank 0 replaces the state, as a checkpoint after every
micro-batch would. With several ranks each step ends with a barrier, as an optimiser's step does.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.mixture import Mixture, StreamSource
from tests.integration.small_run import ROOT
from tests.unit.data.data_world import WordProcessor

MARK = "PGP_STREAM_JOB"  # an environment variable, by which the processes of a job are found
READER = ConversationReader(WordProcessor(), max_length=10_000)  # no record is too long


def mixture_of(manifest: str | Path, options: Mapping[str, Any]) -> Mixture:
    """Return the mixture of a manifest's train split."""
    sources = tuple(StreamSource.load(source) for source in Manifest.load(manifest).sources("train"))
    return Mixture(sources, **options)


def line_of(batch: Batch, number: int) -> dict[str, Any]:
    """Return what identifies global micro-batch number, its pixels included."""
    pixels = zlib.crc32(batch.request.tiles.numpy().tobytes())
    facts = {"keys": batch.keys, "sources": batch.sources, "indices": batch.indices, "epoch": batch.epoch}
    return {"number": number, **facts, "rejected": batch.rejected, "pixels": pixels}


def undisturbed(mixture: Mixture, until: int) -> list[dict[str, Any]]:
    """Return the global micro-batches 0..until-1 as one process without workers gets them."""
    return [line_of(batch, number) for number, batch in enumerate(TrainingLoader(mixture, READER, until))]


def read_log(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the batches that a rank got; a last line may be half written."""
    path = folder / f"{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start(job: Mapping[str, Any], rank: int = 0) -> subprocess.Popen[str]:
    """Start one rank of a job."""
    Path(job["log"]).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.integration.stream_job", json.dumps({**job, "rank": rank})]
    environment = {**os.environ, MARK: str(job["log"])}
    # A file for what it says: its children have it too, and reading a pipe would wait for them.
    with (Path(job["log"]) / f"{rank}.txt").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment, text=True)


def processes(log: Path) -> list[int]:
    """Return the ids of all living processes of a job, those included that lost their parents."""
    mark, found = f"{MARK}={log}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):  # of a zombie it is empty
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def main(job: Mapping[str, Any]) -> None:
    """Stream until a number of global micro-batches."""
    log, rank, ranks = Path(job["log"]), job["rank"], job["ranks"]
    state = Path(job["state"])
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{log}/meeting", rank=rank, world_size=ranks)
    mixture = mixture_of(job["manifest"], job["options"])
    loader = TrainingLoader(mixture, READER, job["until"] // ranks, rank, ranks, job["workers"])
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    first = loader.state_dict()["global_batches"]
    with (log / f"{rank}.jsonl").open("a") as file:
        for number, batch in enumerate(loader, start=first // ranks):
            while number - first // ranks >= job["most"]:
                time.sleep(1)
            file.write(json.dumps(line_of(batch, number * ranks + rank)) + "\n")
            file.flush()
            time.sleep(random.random() * job["pause"])
            if ranks > 1:
                dist.barrier()
            if rank == 0:
                new = state.with_suffix(".new")
                new.write_text(json.dumps(loader.state_dict()))
                new.replace(state)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
