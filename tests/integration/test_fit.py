"""Training through the command line: what a run leaves, what a crash costs (nothing), and what becomes of a guide."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning.data.module import InstructionData
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.tools import main as pgp
from pgp_lightning.training.command_line import RunCLI
from tests.integration.small_run import ROOT, fit_command, small_config, wait_for_trace, write_config, write_manifest
from tests.trace import hold, read_trace, release

STEPS = 8
KILL_SEED = 0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose data lies ready."""
    folder = tmp_path_factory.mktemp("config")
    manifest = write_manifest(folder, folder / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    return write_config(folder, small_config(manifest, STEPS))


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    root = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(fit_command(config, root), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stopped after {STEPS} optimiser steps" in done.stdout
    return root


def events(root: Path) -> EventAccumulator:
    return EventAccumulator(str(root), size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0)).Reload()


def state(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Compare nested containers of tensors and plain values, bit by bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{number}]")
    else:
        assert one == other, where


@pytest.mark.contract
def test_the_events_hold_every_figure(whole: Path):
    found = events(whole)
    scalars = set(found.Tags()["scalars"])
    terms = ["loss", "kl", "reconstruction", "beta"]
    terms += [f"{term}/{source}" for term in ("kl", "reconstruction") for source in ("objects", "reading")]
    expected = {f"{split}/{term}" for split in ("train", "val") for term in terms}
    expected |= {"val/recall@5", "val/recall@11", "val/recall@20", "val/reconstruction_accuracy", "health/gate_mean"}
    assert expected <= scalars
    for tag in scalars:
        assert all(math.isfinite(event.value) for event in found.Scalars(tag)), tag
    for tag in ("train/loss", "train/kl", "train/beta"):
        assert [event.step for event in found.Scalars(tag)] == list(range(STEPS)), tag
    assert [event.step for event in found.Scalars("val/loss")] == [STEPS // 2 - 1, STEPS - 1]
    betas = [event.value for event in found.Scalars("train/beta")]
    assert betas == pytest.approx([0.2, 0.35] + [0.5] * 6)  # warm-up of a fifth: two of eight steps
    rates = [event.value for event in found.Scalars("lr-AdamW/pg1")]
    assert max(rates) == pytest.approx(1e-3) and rates[-1] < 1e-4
    for number in (0, 1):
        images = found.Images(f"val/importance/{number}")
        assert [image.step for image in images] == [STEPS // 2 - 1, STEPS - 1]
        assert np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string))).std() > 10


def test_the_logged_loss_is_the_mean_of_the_micro_batches(whole: Path):
    trace, found = read_trace(whole), events(whole)
    assert [line["batch"] for line in trace] == list(range(2 * STEPS))
    for tag in ("loss", "kl"):
        values = [float.fromhex(line[tag]) for line in trace]
        # Lightning divides the loss of a micro-batch by their number before it hands it on.
        means = [(a + b) / (1 if tag == "loss" else 2) for a, b in zip(values[::2], values[1::2], strict=True)]
        assert [event.value for event in found.Scalars(f"train/{tag}")] == pytest.approx(means, rel=1e-5)


def test_the_checkpoint_is_small_and_plain(whole: Path):
    found = state(whole)
    assert found["global_step"] == STEPS
    assert all("lora_" in name or "bottleneck." in name for name in found["state_dict"])
    assert found["run"]["config"]["model"]["init_args"]["guide"]["init_args"]["base"] == "embedded:guide"
    assert yaml.safe_load((whole / "config.yaml").read_text())["trainer"]["max_steps"] == STEPS


def test_a_killed_run_goes_on_as_if_nothing_had_happened(config: Path, whole: Path, tmp_path: Path):
    root, stop = tmp_path / "run", random.Random(KILL_SEED).randrange(5, 2 * STEPS - 2)
    print(f"killed when {stop} micro-batches are traced (KILL_SEED {KILL_SEED})")
    hold(root, stop + 1)  # one more than is waited for, in the midst of which it may be killed
    process = subprocess.Popen(fit_command(config, root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    wait_for_trace(process, root, stop)
    process.kill()  # SIGKILL: nothing can be tidied up
    release(root)
    out, error = process.communicate()
    assert process.returncode == -9, f"it ended before it was killed at {stop}: {out!r} {error!r}"
    first = len(read_trace(root))
    assert first >= stop

    done = subprocess.run(
        fit_command(config, root, "--ckpt_path=last"), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    expected, found = read_trace(whole), read_trace(root)
    begun = found[first]["batch"]
    assert 0 < begun <= first and begun % 4 == 0, (stop, first, begun)  # at the last checkpoint, every second step
    # Every line of either process is the undisturbed run's: same samples, same loss and KL to the last bit.
    assert found[:first] == expected[:first], (stop, first, begun)
    assert found[first:] == expected[begun:], (stop, first, begun)
    mine, theirs = state(root), state(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(mine[key], theirs[key], key)
    for tag in ("train/loss", "train/kl", "val/loss", "val/recall@20"):
        one, other = ([(e.step, e.value) for e in events(r).Scalars(tag)] for r in (root, whole))
        assert one == other, tag


@pytest.fixture
def look(config: Path, whole: Path) -> Callable[[str], dict[str, float]]:
    """Call `lightning validate` or `test` on the run and return the figures."""

    def call(subcommand: str) -> dict[str, float]:
        arguments = [subcommand, "--config", str(config), f"--trainer.default_root_dir={whole}", "--ckpt_path=last"]
        trainer = RunCLI.run(arguments).trainer
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    return call


def test_validate_finds_the_figures_of_the_run(look: Callable[[str], dict[str, float]], whole: Path):
    files = sorted(whole.rglob("*"))
    figures, found = look("validate"), events(whole)
    for tag in ("val/loss", "val/kl", "val/recall@20", "val/reconstruction/reading"):
        assert figures[tag] == pytest.approx(found.Scalars(tag)[-1].value, rel=1e-5)
    assert sorted(whole.rglob("*")) == files


def test_test_has_its_own_figures_and_controls(look: Callable[[str], dict[str, float]]):
    figures = look("test")
    for percent in (5, 11, 20):
        for control in ("", "/another_question", "/random"):
            assert 0 <= figures[f"test/recall@{percent}{control}"] <= 1
    assert "test/kl/objects" in figures and math.isfinite(figures["test/kl"])


def test_an_exported_guide_scores_like_the_run(
    whole: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "guides" / "mine"
    assert pgp(["export", str(whole), str(folder), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "verified: " in out and "greatest difference 0\n" in out
    facts = json.loads((folder / "guide.json").read_text())
    assert facts["training"]["optimiser_steps"] == STEPS and facts["arguments"]["base"] == "embedded:guide"
    guide = PosteriorGuide.from_pretrained(folder)
    data = InstructionData(**yaml.safe_load(config.read_text())["data"]["init_args"])
    batch = next(iter(data.sample("val", 4)))
    scores = guide(batch.request)
    assert scores.shape == (len(batch), 320) and (scores >= 0).all()
    # A second export would mix two guides; a source without a run has none.
    assert pgp(["export", str(whole), str(folder)]) == 2
    assert pgp(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert "mine exists: choose another folder" in errors[0] and "last.ckpt" in errors[1]
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["guides", "mine"]


def test_the_artefact_of_other_weights_is_noticed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from pgp_lightning.training.export import load_guide, verify_guide

    guide, _ = load_guide(whole)
    with torch.no_grad():
        guide.bottleneck.prior_mean += 0.01
    guide.save_pretrained(tmp_path / "spoiled")
    compared, worst = verify_guide(whole, tmp_path / "spoiled", records=2)
    assert compared == 2 * 4 * 320 and worst > 0


def test_the_doctor_finds_this_configuration_well(config: Path, capsys: pytest.CaptureFixture[str]):
    assert pgp(["doctor", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "train/objects" in out and "40 records in 3 shards" in out and "checks passed" in out


@pytest.mark.distributed
def test_two_processes_share_the_work_of_one(config: Path, whole: Path, tmp_path: Path):
    root = tmp_path / "two"
    two = ["--trainer.devices=2", "--trainer.accumulate_grad_batches=1", "--trainer.max_steps=2"]
    two += ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    done = subprocess.run(fit_command(config, root, *two), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped after 2 optimiser steps") == 1
    assert len(list(root.glob("events.*"))) == 1
    # Micro-batch g of a step on one process is rank g's on two. Before the first update the terms are the same; the
    # shorter run has no warm-up of beta, and one process divides a loss by the two micro-batches of its steps.
    single = read_trace(whole)
    for rank in (0, 1):
        trace = read_trace(root, rank)
        assert [line["samples"] for line in trace] == [line["samples"] for line in single[rank:4:2]]
        loss, kl = (float.fromhex(trace[0][key]) for key in ("loss", "kl"))
        other, other_kl = (float.fromhex(single[rank][key]) for key in ("loss", "kl"))
        assert kl == pytest.approx(other_kl, rel=1e-4)
        assert loss - 0.5 * kl == pytest.approx(2 * other - 0.2 * other_kl, rel=1e-4)
    found, expected = events(root), events(whole)
    for tag in ("train/reconstruction", "train/kl", "train/kl/objects", "train/reconstruction/reading"):
        assert found.Scalars(tag)[0].value == pytest.approx(expected.Scalars(tag)[0].value, rel=1e-3), tag
    assert {"val/recall@20", "val/kl/objects"} <= set(found.Tags()["scalars"])
    assert state(root)["global_step"] == 2
