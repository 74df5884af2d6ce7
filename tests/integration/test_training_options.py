"""Options of the trainer through the command line: those that work, up to the export, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning.cli import main
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.tools import main as pgp
from tests.integration.small_run import small_config, write_config, write_manifest
from tests.trace import read_trace

pytestmark = pytest.mark.filterwarnings("ignore")
AVERAGE = ["--trainer.callbacks+=WeightAverage", "--trainer.callbacks.decay=0.5"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> Path:
    """A configuration of a tiny model whose data lies ready."""
    folder = tmp_path_factory.mktemp("config")
    manifest = write_manifest(folder, folder / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    given = small_config(manifest)
    given["data"]["init_args"]["base"] = given["model"]["init_args"]["guide"]["init_args"]["base"] = tiny_base
    return write_config(folder, given)


@pytest.fixture
def run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `lightning` on a run's folder and return exit code and what it printed."""

    def call(subcommand: str, *extra: str) -> tuple[int, str, str]:
        code = main([subcommand, "-c", str(config), f"--trainer.default_root_dir={tmp_path / 'run'}", *extra])
        return code, *capsys.readouterr()

    return call


def scalars(root: Path, tag: str) -> list[float]:
    return [event.value for event in EventAccumulator(str(root)).Reload().Scalars(tag)]


def test_an_average_of_the_weights_is_validated_resumed_and_exported(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    root = tmp_path / "run"
    assert run("fit", *AVERAGE)[0] == 0
    checkpoint: dict[str, Any] = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    average, current = checkpoint["state_dict"], checkpoint["current_weights"]
    assert any(not torch.equal(average[name], current[name]) for name in current)
    _, out, _ = run("validate", "--ckpt_path=last")
    assert f"{scalars(root, 'val/kl')[-1]:.8f}"[:8] in out
    code, _, error = run("fit", "--ckpt_path=last")
    assert code == 2 and "callbacks.WeightAverage present -> none" in error
    assert pgp(["export", str(root), str(tmp_path / "guide"), "--verify"]) == 0
    guide = PosteriorGuide.from_pretrained(tmp_path / "guide")
    assert all(torch.equal(value, average[f"guide.{name}"]) for name, value in guide.trainable().items())


def test_overfitting_sees_the_same_records_and_its_loss_falls(run: Callable[..., tuple[int, str, str]], tmp_path: Path):
    longer = ["--trainer.max_steps=40", "--trainer.val_check_interval=80"]
    assert run("fit", "--trainer.overfit_batches=1", *longer)[0] == 0
    trace = read_trace(tmp_path / "run")
    shown = [{(key, turn) for key, turn, _ in line["samples"]} for line in trace]
    assert len(shown) == 80 and all(one == shown[0] for one in shown)
    losses = scalars(tmp_path / "run", "train/reconstruction")
    assert losses[-1] < 0.5 * losses[0], losses
    code, _, error = run("fit", "--ckpt_path=last", *longer)
    assert code == 2 and "trainer.overfit_batches 1 -> 0" in error


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--trainer.precision=bf16-true", "trainer.precision bf16-true"),
        ("--trainer.limit_train_batches=3", "trainer.limit_train_batches 3"),
        ("--trainer.strategy=ddp_spawn", "ddp_spawn"),
    ],
)
def test_what_is_refused_leaves_no_run(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, option: str, words: str
):
    code, _, error = run("fit", option)
    assert code == 2 and words in error and not (tmp_path / "run").exists()
    if "precision" in option:  # which rounds what was trained wherever it is looked at
        code, _, error = run("validate", option)
        assert code == 2 and words in error
