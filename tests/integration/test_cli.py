from __future__ import annotations

import copy
import io
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning.cli import main
from pgp_lightning.training.run import read_record
from tests.standins import ToyModule

CONFIG: dict[str, Any] = {
    "seed_everything": 7,
    "model": {"class_path": "tests.standins.ToyModule", "init_args": {"lr": 0.01}},
    "data": {"class_path": "tests.standins.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 12,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "BetaAnnealing", "init_args": {"warmup_fraction": 0.5}},
            {"class_path": "RandomState"},
            {"class_path": "Throughput"},
            {"class_path": "LogLine", "init_args": {"every_n_steps": 4}},
            {"class_path": "PosteriorHealth", "init_args": {"every_n_steps": 2}},
            {"class_path": "ImportanceImages", "init_args": {"samples": 1, "size": 32}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 4, "save_last": True, "enable_version_counter": False},
            },
        ],
    },
}


@pytest.fixture(autouse=True)
def _whole() -> Iterator[None]:
    yield
    ToyModule.crash_at = None


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Call `lightning SUBCOMMAND` on the configuration and return the exit code."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))

    def call(subcommand: str, name: str, *extra: str) -> int:
        try:
            return main([subcommand, "-c", str(path), f"--trainer.default_root_dir={tmp_path / name}", *extra])
        except SystemExit as stop:
            return int(stop.code or 0)

    return call


def events(root: Path) -> EventAccumulator:
    found = EventAccumulator(str(root), size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0))
    return found.Reload()


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which has to be the only line that speaks of one."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line or "usage" in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--trainer.max_stepz=2"], ["max_stepz"]),
        (["--model.lrr=2"], ["model", "lrr", "not accepted"]),
        (["--model.lr=fast"], ["lr", "float", "fast"]),
        (["--trainer.max_steps=soon"], ["trainer.max_steps", "int", "soon"]),
        (["--trainer.precision=bf17"], ["trainer.precision", "bf16-mixed", "bf17"]),
        (["--trainer.precision=bf16-true"], ["trainer.precision bf16-true", "bf16-mixed"]),
        (["--trainer.callbacks+=BatchSizeFinder"], ["the callback BatchSizeFinder", "pgp doctor"]),
        (["--trainer.callbacks+=Timer"], ["cannot be written down", "Interval.step"]),
        (["--model=null"], ["model"]),
        (["-c", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (["--model=NoSuchModule"], ["model", "NoSuchModule"]),
        (["--model.lr=9"], ["lr must be at most 5, got 9.0"]),
        (["--trainer.accelerator=abacus"], ["abacus"]),
        (["--ckpt_path=last"], ["last.ckpt", "found none", "leave --ckpt_path out"]),
        (["--ckpt_path=best"], ["--ckpt_path last or a file"]),
        (["--ckpt_path=gone.ckpt"], ["gone.ckpt", "correct --ckpt_path"]),
        (["--trainer.default_root_dir=null"], ["trainer.default_root_dir"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], extra: list[str], words: list[str]
) -> None:
    assert run("fit", "r", *extra) == 2
    line = error_line(capsys)
    assert all(word in line for word in words), line
    assert len(line) < 500


def test_broken_data_is_exit_code_1_and_debug_shows_the_traceback(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "r", "--data.broken=true") == 1
    assert error_line(capsys) == "error: shard x.tar ends early: write it again"
    assert run("fit", "r", "--data.broken=true", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    assert run("fit", "r", "--model.lr=9", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_fit_fills_one_folder(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "a") == 0
    root, out = tmp_path / "a", capsys.readouterr().out
    assert (root / "checkpoints" / "last.ckpt").exists()
    assert not list(root.glob("**/version_*")) and not list(root.glob("**/lightning_logs"))
    assert list(root.glob("events.out.tfevents*"))
    assert yaml.safe_load((root / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.01
    assert f"run {root} stopped after 12 optimiser steps" in out and "val/loss" in out
    assert "step 8/12  loss " in out and "validation at step 8  val/loss" in out and "  eta 0:00:" in out

    found = events(root)
    scalars = found.Tags()["scalars"]
    for tag in ("train/loss", "train/beta", "val/loss", "throughput/samples_per_second", "throughput/data_wait_share",
                "throughput/visual_tokens_per_second", "throughput/peak_memory_gib", "health/gate_mean",
                "health/dead_channels", "health/rms_visual", "health/rms_states", "health/rms_latents"):  # fmt: skip
        assert tag in scalars, tag
        assert all(math.isfinite(event.value) for event in found.Scalars(tag)), tag
    assert [event.step for event in found.Scalars("train/loss")] == list(range(12))
    assert [event.step for event in found.Scalars("val/loss")] == [3, 7, 11]
    assert [event.step for event in found.Histograms("health/kl")] == [1, 3, 5, 7, 9, 11]
    images = found.Images("val/importance/0")
    assert [image.step for image in images] == [3, 7, 11]
    assert np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string))).ndim == 3

    record = read_record(root / "checkpoints" / "last.ckpt")
    assert record is not None and record["micro_batches"] == 1
    assert record["config"]["model"]["init_args"] == {"lr": 0.01, "hidden": 3}

    # A second fit must not mix with the first.
    before = (root / "config.yaml").read_text()
    assert run("fit", "a") == 2
    line = error_line(capsys)
    assert "already holds a run" in line and "--ckpt_path last" in line and "--trainer.default_root_dir" in line
    # Looking at a run leaves no trace in it.
    files = sorted(root.rglob("*"))
    for subcommand in ("validate", "test", "predict"):
        assert run(subcommand, "a", "--ckpt_path=last") == 0
    assert sorted(root.rglob("*")) == files and (root / "config.yaml").read_text() == before


def test_a_run_without_a_validation_says_so(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "short", "--trainer.max_steps=3") == 0
    assert "it was never validated" in capsys.readouterr().out
    assert run("fit", "meant", "--trainer.max_steps=3", "--trainer.limit_val_batches=0") == 0
    assert "never validated" not in capsys.readouterr().out
    # A finished run that is continued has nothing to do, and was validated before.
    assert run("fit", "long") == 0 and run("fit", "long", "--ckpt_path=last") == 0
    assert "never validated" not in capsys.readouterr().out


def test_a_trial_leaves_nothing(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("fit", "trial", "--trainer.fast_dev_run=true") == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "config.yaml"]


@pytest.mark.parametrize("crash", [5, 8, 11])
def test_a_resumed_run_is_the_undisturbed_one(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    modules: list[ToyModule] = []
    monkeypatch.setattr(ToyModule, "on_fit_start", lambda self: modules.append(self), raising=False)
    assert run("fit", "whole") == 0
    ToyModule.crash_at = crash
    with pytest.raises(RuntimeError, match="power cut"):
        run("fit", "cut")
    ToyModule.crash_at = None
    torch.manual_seed(99)
    # Event files are read by name: by the second they began in, then by their number in this process as text (10 < 9).
    time.sleep(1 - time.time() % 1)
    # Other logging, no sanity check, more workers: all may change.
    free = ["--trainer.num_sanity_val_steps=0", "--data.workers=2", "--trainer.max_time=00:01:00:00"]
    assert run("fit", "cut", "--ckpt_path=last", *free) == 0
    whole, first, second = modules
    saved = crash // 4 * 4
    assert first.trace[:saved] + second.trace == whole.trace
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    # Events that the first process wrote after its checkpoint are gone: every step once, and as in the whole run.
    found, expected = events(tmp_path / "cut"), events(tmp_path / "whole")
    for tag in expected.Tags()["scalars"]:
        steps = [event.step for event in found.Scalars(tag)]
        # Lightning itself writes "epoch" twice in a step with validation.
        assert tag == "epoch" or max(Counter(steps).values()) == 1, (tag, steps)
        if not tag.startswith("throughput/"):
            assert [(e.step, e.value) for e in found.Scalars(tag)] == [(e.step, e.value) for e in expected.Scalars(tag)]
    for tag in ("val/importance/0",):
        assert [e.step for e in found.Images(tag)] == [e.step for e in expected.Images(tag)]
    assert [e.step for e in found.Histograms("health/kl")] == [e.step for e in expected.Histograms("health/kl")]


def test_a_warned_run_saves_requeues_and_goes_on_at_the_next_step(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(CONFIG)
    saving = {"class_path": "StepCheckpoint", "init_args": {"every_n_train_steps": 1000, "save_last": True}}
    noting = {"class_path": "Preemption", "init_args": {"requeue": ["touch", f"{tmp_path}/requeued-{{job}}"]}}
    config["trainer"]["callbacks"][-1:] = [saving, noting]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    modules: list[ToyModule] = []
    monkeypatch.setattr(ToyModule, "on_fit_start", lambda self: modules.append(self), raising=False)
    assert run("fit", "whole") == 0
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def warn(self: ToyModule, batch: Any, number: int) -> None:
        if number == 5 and len(modules) == 2:  # no step that validates
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(ToyModule, "on_train_batch_start", warn, raising=False)
    assert run("fit", "warned") == 0
    last = tmp_path / "warned" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert (tmp_path / "requeued-17").exists()
    assert run("fit", "warned", "--ckpt_path=last") == 0
    whole, first, second = modules
    assert len(first.trace) == 6 and first.trace + second.trace == whole.trace
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    found, expected = events(tmp_path / "warned"), events(tmp_path / "whole")
    for tag in ("train/loss", "val/loss"):
        assert [(e.step, e.value) for e in found.Scalars(tag)] == [(e.step, e.value) for e in expected.Scalars(tag)]


def test_events_are_duplicated_without_the_purge(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The proof that the test above can fail.
    monkeypatch.setattr("pgp_lightning.training.run.RunRecord.on_train_start", lambda *_: None)
    ToyModule.crash_at = 7
    with pytest.raises(RuntimeError, match="power cut"):
        run("fit", "cut")
    ToyModule.crash_at = None
    assert run("fit", "cut", "--ckpt_path=last") == 0
    steps = Counter(event.step for event in events(tmp_path / "cut").Scalars("train/loss"))
    assert steps[4] == steps[5] == 2


def test_a_run_continues_under_its_own_configuration(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "a") == 0
    capsys.readouterr()
    changed = ["--model.lr=0.02", "--data.batch_size=4", "--trainer.gradient_clip_val=1", "--seed_everything=8"]
    beta = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    assert run("fit", "a", "--ckpt_path=last", *changed, *beta) == 2
    line = error_line(capsys)
    for words in (
        "model.lr 0.01 -> 0.02",
        "data.batch_size 2 -> 4",
        "trainer.gradient_clip_val none -> 1",
        "seed_everything 7 -> 8",
        "callbacks.EarlyStopping none -> present",
        "--trainer.default_root_dir NEW --ckpt_path",
    ):
        assert words in line, words + line
    assert run("fit", "a", "--ckpt_path=last", "--trainer.max_steps=13") == 2
    assert "trainer.max_steps 12 -> 13" in error_line(capsys)
    assert run("fit", "a", "--ckpt_path=last", "--trainer.accumulate_grad_batches=2") == 2
    assert "1 micro-batches per optimiser step, now it would take 2" in error_line(capsys)


def test_a_checkpoint_file_never_overrides_the_configuration(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules: list[ToyModule] = []
    monkeypatch.setattr(ToyModule, "on_fit_start", lambda self: modules.append(self), raising=False)
    assert run("fit", "a") == 0
    file = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"another configuration: .*model.lr 0.01 -> 0.05.*trainer.max_steps 12 -> 14"):
        assert run("fit", "b", f"--ckpt_path={file}", "--model.lr=0.05", "--trainer.max_steps=14") == 0
    assert modules[1].lr == 0.05 and modules[1].hparams["lr"] == 0.05
    assert [step for step, *_ in modules[1].trace] == [12, 13]
    saved = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert saved["ckpt_path"] is None and saved["model"]["init_args"]["lr"] == 0.05
    with pytest.warns(UserWarning, match=r"another configuration: model.lr 0.01 -> 0.03"):
        assert run("validate", "a", f"--ckpt_path={file}", "--model.lr=0.03", "--trainer.max_steps=99") == 0
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    capsys.readouterr()
    assert run("fit", "c", f"--ckpt_path={tmp_path / 'text.ckpt'}") == 2
    assert "could not read it" in error_line(capsys)


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pgp_lightning", "fit", "--trainer.max_stepz=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "usage" not in done.stderr


@pytest.mark.full
@pytest.mark.distributed
def test_two_processes_keep_both_random_states(run: Callable[..., int], tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"] = 8
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    root = tmp_path / "two"
    extra = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true",
        f"--trainer.default_root_dir={root}",
    ]
    command = [sys.executable, "-m", "pgp_lightning", "fit", "-c", str(tmp_path / "config.yaml"), *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped after 12 optimiser steps") == 1
    assert len(list(root.glob("events.*"))) == 1
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["callbacks"]["RandomState"]["processes"]) == 2 == state["run"]["micro_batches"]
    # The same number of micro-batches per step on one process: goes on, but not bitwise, which is said.
    resume = ["--ckpt_path=last", "--trainer.accumulate_grad_batches=2"]
    with pytest.warns(UserWarning, match="random states of 2 processes, now there are 1"):
        assert run("fit", "two", *resume) == 0


def test_importing_the_door_stays_light() -> None:
    code = (
        "import sys, pgp_lightning.cli; print(any(m.partition('.')[0] in ('torch', 'lightning') for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "False"
