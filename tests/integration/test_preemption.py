"""SIGUSR1 to one of two processes: both stop after the same step, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning import warning_signal
from pgp_lightning.cli import main as lightning
from pgp_lightning.tools import main as pgp
from tests.integration.small_run import (
    ROOT,
    fit_command,
    second_process,
    small_config,
    wait_for_trace,
    write_config,
    write_manifest,
)
from tests.trace import hold, read_trace, release

STEPS = 12


def start(config: Path, root: Path, folder: Path, *extra: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start a run of two processes, on a machine whose `scontrol` only notes what it is told."""
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/told\n')
    (folder / "scontrol").chmod(0o755)
    command = fit_command(config, root, "--trainer.devices=2", *extra)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.full
def test_a_warned_process_stops_all_of_them_and_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, tmp_path / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    given = small_config(manifest, STEPS, save_every=1000)
    given["trainer"]["val_check_interval"] = 6  # after every third step, the one that is warned among them
    config = write_config(tmp_path, given)
    whole, root = tmp_path / "whole", tmp_path / "run"
    finish(start(config, whole, tmp_path))
    hold(root, 7)
    process = start(config, root, tmp_path, SLURM_JOB_ID="17")
    wait_for_trace(process, root, 5, rank=1)  # the middle of the third step
    os.kill(second_process(process.pid), signal.SIGUSR1)
    release(root)
    output = finish(process)
    done = [len(read_trace(root, rank)) for rank in range(2)]
    assert done[0] == done[1] < 2 * STEPS and done[0] % 2 == 0, done
    assert f"warned by SIGUSR1: saved {root}/checkpoints/last.ckpt at optimiser step {done[0] // 2}" in output
    assert (tmp_path / "told").read_text() == "requeue 17\n"
    finish(start(config, root, tmp_path, "--ckpt_path=last"))
    for rank in range(2):
        assert read_trace(root, rank) == read_trace(whole, rank)
    mine, theirs = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (root, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for tag in ("train/loss", "val/loss"):
        one, other = (
            [(e.step, e.value) for e in EventAccumulator(str(r)).Reload().Scalars(tag)] for r in (root, whole)
        )
        assert one == other, tag
    assert len((tmp_path / "told").read_text().splitlines()) == 1


def test_a_warning_while_the_program_is_still_loading_is_kept(tmp_path: Path) -> None:
    program = "import os, signal; from pgp_lightning import cli, warning_signal\n"
    program += "warning_signal.listen(); os.kill(os.getpid(), signal.SIGUSR1); print(warning_signal.warned())"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n" and "torch" not in done.stderr
    assert not warning_signal.warned()


def test_what_has_nothing_to_save_with_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(tmp_path, tmp_path / "data")
    config = small_config(manifest)
    config["trainer"]["callbacks"] = [
        one for one in config["trainer"]["callbacks"] if one["class_path"] != "StepCheckpoint"
    ]
    path = write_config(tmp_path, config)
    assert lightning(["fit", "--config", str(path), f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 2
    assert "Preemption saves by a StepCheckpoint with save_last: true" in capsys.readouterr().err
