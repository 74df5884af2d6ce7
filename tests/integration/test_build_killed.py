"""Builds killed at random moments: what is finished stays untouched, and the result is that of a build left alone."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from pgp_lightning.data.shards import verify_source
from pgp_lightning.tools import main as pgp

RECORDS, PER_SHARD = 60, 3
BUILDER = '''
import io, pathlib, time
from PIL import Image
from pgp_lightning.data.records import UnusableRecord

class SlowRecords:
    """Makes a record every fiftieth of a second, up to the number that a file holds; some are unusable."""

    def __init__(self, records, limit):
        self.records, self.limit = records, pathlib.Path(limit)

    def __len__(self):
        return self.records

    def __getitem__(self, index):
        time.sleep(0.02)
        while index >= int(self.limit.read_text()):
            time.sleep(0.01)
        if index % 7 == 3:
            raise UnusableRecord("seventh", f"number {index}")
        picture = io.BytesIO()
        Image.new("RGB", (40, 30), (index, 2 * index, 3 * index)).save(picture, "PNG")
        return f"r-{index}", picture.getvalue(), "png", {"turns": [{"question": "q", "answer": str(index)}]}

    def identity(self):
        return {"records": self.records}
'''


def build(folder: Path, root: Path, workers: int) -> None:
    """Run `pgp shards build` in a process of its own, which says what it says to a file."""
    sys.path.insert(0, str(folder))
    with (folder / "said.txt").open("w", buffering=1) as said:
        sys.stdout = sys.stderr = said
        raise SystemExit(
            pgp(["shards", "build", str(folder / "slow.yaml"), "--root", str(root), f"--workers={workers}"])
        )


def start(folder: Path, root: Path, workers: int) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")  # what a build imports is imported once for all of them
    context.set_forkserver_preload([__name__, "pgp_lightning.data.shards"])
    process = context.Process(target=build, args=(folder, root, workers))
    process.start()
    return process


def allow(folder: Path, records: int) -> None:
    """Let builds make records up to this one, so that none is done before it can be killed."""
    (folder / "new").write_text(str(records))
    (folder / "new").replace(folder / "limit")


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every shard that an interrupted build has finished."""
    entries = (json.loads(path.read_text()) for path in root.glob("train/.slow.*.part/entries/*.json"))
    shards = [next(root.glob(f"train/.slow.*.part/files/{entry['file']}")) for entry in entries]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


@pytest.mark.full
@pytest.mark.parametrize(("workers", "kills"), [(0, 5), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_build_that_was_killed(tmp_path: Path, workers: int, kills: int) -> None:
    (tmp_path / "slow_records.py").write_text(BUILDER)
    made = {
        "class_path": "slow_records.SlowRecords",
        "init_args": {"records": RECORDS, "limit": str(tmp_path / "limit")},
        "samples_per_shard": PER_SHARD,
    }
    sources = [{"name": "slow", "allowed_rejects": 0.2, "build": made}]
    content = {"name": "slow", "licence": "CC0-1.0", "root": "data", "splits": {"train": sources}}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(content))
    whole, root = tmp_path / "whole", tmp_path / "killed"
    rng = random.Random(workers)
    stamps: dict[str, tuple[int, int]] = {}
    for _ in range(kills):
        goal = len(stamps) + rng.randrange(1, 3)
        allow(tmp_path, goal * PER_SHARD + rng.randrange(2 * PER_SHARD))
        process = start(tmp_path, root, workers)
        while len(finished(root)) < goal and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)  # into the next shard, or between shard and entry
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / "said.txt").read_text()
        now = finished(root)
        assert stamps.items() <= now.items(), "a finished shard was written again"
        stamps = now
    allow(tmp_path, RECORDS)
    last = start(tmp_path, root, workers)
    last.join()
    text = (tmp_path / "said.txt").read_text()
    assert last.exitcode == 0, text
    kept = re.search(r"(\d+) of (\d+) shards are finished from before", text)
    assert kept and len(stamps) <= int(kept[1]) < int(kept[2]) == RECORDS // PER_SHARD
    rejected = len(range(3, RECORDS, 7))
    assert f"{RECORDS} records in, {RECORDS - rejected} used, {rejected} rejected (seventh {rejected})" in text
    found = {path.name: path for path in (root / "train/slow").iterdir()}
    assert {name: (found[name].stat().st_ino, found[name].stat().st_mtime_ns) for name in stamps} == stamps
    assert [path.name for path in (root / "train").iterdir()] == ["slow"]
    undisturbed = start(tmp_path, whole, 0)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected = {path.name: path.read_bytes() for path in (whole / "train/slow").iterdir()}
    assert {name: path.read_bytes() for name, path in found.items()} == expected
    assert verify_source(root / "train/slow").samples == RECORDS - rejected
