"""Two processes train what one trains with twice the accumulation, and fall together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning.tools import main as pgp
from tests.integration.small_run import (
    ROOT,
    fit_command,
    lives,
    second_process,
    small_config,
    wait_for_trace,
    write_config,
    write_manifest,
)
from tests.trace import hold, read_trace, release

STEPS = 20
pytestmark = pytest.mark.full  # by default test_fit.py alone trains on two processes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout, whose random numbers differ from process to process; all others belong to samples."""
    folder = tmp_path_factory.mktemp("two")
    manifest = write_manifest(folder, folder / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    config = small_config(manifest, STEPS, save_every=2)
    config["model"]["init_args"]["guide"]["init_args"]["lora_dropout"] = 0.0
    return write_config(folder, config)


def start(config: Path, root: Path, *extra: str) -> subprocess.Popen[str]:
    command, environment = fit_command(config, root, *extra), os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def trained(config: Path, root: Path, *extra: str) -> dict[str, torch.Tensor]:
    process = start(config, root, *extra)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    weights: dict[str, Any] = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return weights


def samples(root: Path, ranks: int) -> list[Any]:
    """Return the samples of every global micro-batch, in order."""
    traces = [read_trace(root, rank) for rank in range(ranks)]
    return [line["samples"] for lines in zip(*traces, strict=True) for line in lines]


@pytest.mark.parametrize(
    ("precision", "limit"), [("64-true", 1e-9), pytest.param("32-true", 1e-4, marks=pytest.mark.slow)]
)
def test_two_processes_are_one_with_twice_the_accumulation(
    config: Path, tmp_path: Path, precision: str, limit: float, capsys: pytest.CaptureFixture[str]
) -> None:
    common = f"--trainer.precision={precision}"
    one = trained(config, tmp_path / "one", common, "--trainer.accumulate_grad_batches=4")
    two = trained(config, tmp_path / "two", common, "--trainer.devices=2")
    assert samples(tmp_path / "one", 1) == samples(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    difference = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    moved = max(float(value.abs().max()) for name, value in two.items() if "lora_B" in name)
    with capsys.disabled():
        print(f"\n{precision}: greatest difference of a weight {difference:.1e} after {STEPS} steps; of B {moved:.1e}")
    assert difference < limit < moved


def test_the_curves_say_which_process_is_slow(config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text())
    # After Throughput, which has begun to count by then; long enough to be seen on a machine with other work.
    content["trainer"]["callbacks"].append({"class_path": "tests.trace.Slow", "init_args": {"rank": 1, "seconds": 2.0}})
    slow = write_config(tmp_path, content)
    trained(slow, tmp_path / "run", "--trainer.devices=2", "--trainer.max_steps=4")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    ranks = [point.value for point in events.Scalars("throughput/slowest_rank")]
    lags = [point.value for point in events.Scalars("throughput/slowest_rank_lag")]
    assert ranks == [1.0] * 4 and min(lags) > 0.1, (ranks, lags)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_others_end_and_the_run_goes_on(config: Path, tmp_path: Path, rank: int) -> None:
    root = tmp_path / "run"
    often = ["--trainer.devices=2"]
    hold(root, 7)
    process = start(config, root, *often)
    wait_for_trace(process, root, 5, rank=1)
    second = second_process(process.pid)
    os.kill((process.pid, second)[rank], signal.SIGKILL)
    release(root)
    output, _ = process.communicate()
    assert process.returncode != 0
    while lives(second):
        time.sleep(0.1)  # until the timeout of this test: none may live on
    assert "another process of this run has ended" in output and "Go on with --ckpt_path last" in output, output[-3000:]
    if rank == 1:
        trained(config, root, *often, "--ckpt_path=last")
        assert read_trace(root)[-1]["batch"] == read_trace(root, rank=1)[-1]["batch"] == 2 * STEPS - 1


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_is_told_to_end_does_so_at_once(config: Path, tmp_path: Path, devices: int) -> None:
    root = tmp_path / "run"
    hold(root, 7)  # and never released: it ends in the midst of a step, or not at all
    process = start(config, root, f"--trainer.devices={devices}", "--data.init_args.workers=1")
    wait_for_trace(process, root, 5, rank=devices - 1)
    processes = ([second_process(process.pid)] if devices == 2 else []) + [process.pid]
    try:
        for number in processes:
            os.kill(number, signal.SIGTERM)
            time.sleep(0.01)  # as SLURM does, not all of them in the same moment
        output, _ = process.communicate()  # its workers hold the pipe too, so they have ended as well
    finally:
        if process.poll() is None:
            for number in processes:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
    assert process.returncode == -signal.SIGTERM and "Received SIGTERM" not in output, output[-3000:]
