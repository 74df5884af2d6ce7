"""The overlays of real models over the default configuration, with tiny checkpoints in the place of the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pgp_lightning.cli import main as lightning
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.tools import main as pgp
from tests.integration.small_run import ROOT, write_manifest
from tests.originals import download

OVERLAYS = ROOT / "configs" / "overlays"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    path = write_manifest(folder, folder / "data")
    assert pgp(["shards", "build", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def original_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An original-layout checkpoint with its tokenizer, as a download has them."""
    return str(download(tmp_path_factory.mktemp("original"), "internvl_qwen2"))


@pytest.mark.parametrize(("overlay", "fixture"), [("internvl2_5_1b", "original_base"), ("llava_1_5", "llava_base")])
def test_an_overlay_trains_and_exports(
    overlay: str,
    fixture: str,
    manifest: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
):
    base, root = request.getfixturevalue(fixture), tmp_path / "run"
    written = yaml.safe_load((OVERLAYS / f"{overlay}.yaml").read_text())
    settings = {
        # What stands for the model and the mixture of the overlay,
        "model.init_args.guide.init_args.base": base,
        "data.init_args.base": base,
        "data.init_args.manifest": manifest,
        # and what makes the run short. There are eleven micro-batches a step, as by the overlay's own numbers.
        "data.init_args.batch_size": 1,
        "data.init_args.val_batch_size": 2,
        "data.init_args.limit_val_records": 2,
        "data.init_args.workers": 0,
        "data.init_args.lanes": 4,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 22,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": root,
    }
    words = ["fit", f"--config={ROOT / 'configs' / 'pgp.yaml'}", f"--config={OVERLAYS / f'{overlay}.yaml'}"]
    words += [f"--{key}={value}" for key, value in settings.items()]
    words += ["--trainer.callbacks+=GlobalBatch", "--trainer.callbacks.records=11"]
    assert lightning(words) == 0
    assert "stopped after 2 optimiser steps" in capsys.readouterr().out
    used = yaml.safe_load((root / "config.yaml").read_text())
    assert written["trainer"]["callbacks+"] == [{"class_path": "GlobalBatch", "init_args": {"records": 176}}]
    assert 11 * written["data"]["init_args"]["batch_size"] == 176
    assert used["model"]["init_args"]["guide"]["init_args"]["dtype"] == "bfloat16"
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    weights = checkpoint["state_dict"]
    assert checkpoint["global_step"] == 2 and checkpoint["run"]["micro_batches"] == 11 and weights
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # Both factors of the adapter moved away from where they start: the second one is zero there.
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
    assert pgp(["export", str(root), str(tmp_path / "guide"), "--verify"]) == 0
    guide = PosteriorGuide.from_pretrained(tmp_path / "guide")
    assert guide.vlm.family == ("llava" if overlay == "llava_1_5" else "internvl") and guide.vlm.base == base


@pytest.mark.parametrize("overlay", ["internvl2_5_1b", "llava_1_5"])
def test_the_doctor_says_what_an_overlay_lacks(
    overlay: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    configs = ["--config", "configs/pgp.yaml", "--config", str(OVERLAYS / f"{overlay}.yaml")]
    assert pgp(["doctor", *configs]) == 1
    base = yaml.safe_load((OVERLAYS / f"{overlay}.yaml").read_text())["data"]["init_args"]["base"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert any(base in line and f"hf download {base}" in line for line in lines), lines
