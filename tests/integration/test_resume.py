"""Twenty kills at random steps: the run that goes on after each is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
import torch

from pgp_lightning.tools import main as pgp
from tests.integration.small_run import ROOT, fit_command, small_config, wait_for_trace, write_config, write_manifest
from tests.trace import read_trace

STEPS, SAVE_EVERY, KILLS = 120, 4, 20


def start(config: Path, root: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = fit_command(config, root, *extra)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path: Path):
    manifest = write_manifest(tmp_path, tmp_path / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    config = write_config(tmp_path, small_config(manifest, STEPS, SAVE_EVERY))
    whole, root = tmp_path / "whole", tmp_path / "run"
    finish(start(config, whole))
    rng = random.Random(0)
    begins = []
    for kill in range(KILLS + 1):
        resume = ["--ckpt_path=last"] if (root / "checkpoints" / "last.ckpt").exists() else []
        begins.append(len(read_trace(root)))
        process = start(config, root, *resume)
        if kill == KILLS:
            finish(process)
            break
        stop = begins[-1] + rng.randrange(1, 4 * SAVE_EVERY)
        wait_for_trace(process, root, stop)
        process.kill()
        process.communicate()
    expected = {line["batch"]: line for line in read_trace(whole)}
    found = read_trace(root)
    assert [line for line in found if line != expected[line["batch"]]] == []
    assert {line["batch"] for line in found} == set(expected)
    print(f"{KILLS} kills; {len(found) - len(expected)} of {len(expected)} micro-batches were done again")
    mine, theirs = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (root, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
