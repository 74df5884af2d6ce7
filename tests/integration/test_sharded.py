"""The strategies of configs/overlays on two CPU processes train what one process trains, save it, and go on."""

from __future__ import annotations

import importlib.util
import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pgp_lightning.cli import main as lightning
from pgp_lightning.tools import main as pgp
from pgp_lightning.training.run import checkpoints, last_checkpoint
from tests.integration.small_run import ROOT, small_config, write_config, write_manifest
from tests.trace import read_trace

STEPS, SAVED = 6, 4
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[deepspeed]'"
)
STRATEGIES = [
    pytest.param("ddp", marks=pytest.mark.slow),  # test_two_processes.py trains by it every time
    "fsdp2",
    pytest.param("deepspeed_zero2", marks=needs_deepspeed),
    pytest.param("deepspeed_zero3", marks=needs_deepspeed),
]
full = pytest.mark.full  # seconds of several processes each


def overlay(strategy: str) -> dict[str, Any]:
    """Return what an overlay says, on two CPU processes instead of GPUs."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "overlays" / f"{strategy}.yaml").read_text())
    trainer = content["trainer"] | {"accelerator": "cpu", "devices": 2, "precision": "32-true"}
    arguments = trainer["strategy"]["init_args"]
    if strategy.startswith("deepspeed"):
        del arguments["timeout"]  # a text, which only the parser of the real class understands
        trainer["strategy"] = {"class_path": "tests.deepspeed_cpu.CPUDeepSpeed", "dict_kwargs": arguments}
    else:
        arguments["process_group_backend"] = "gloo"
    if strategy == "fsdp2":
        arguments["data_parallel_size"] = 2
    trainer["callbacks+"] = [{"class_path": "GlobalBatch", "init_args": {"records": 8}}]  # 2 x 2 x 2
    return {**content, "trainer": trainer}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, whose random numbers differ from process to process; all others belong to samples."""
    folder = tmp_path_factory.mktemp("sharded")
    manifest = write_manifest(folder, folder / "data")
    assert pgp(["shards", "build", str(manifest)]) == 0
    config = small_config(manifest, STEPS, save_every=2)
    config["model"]["init_args"]["guide"]["init_args"]["lora_dropout"] = 0.0
    config["trainer"]["callbacks"].append({"class_path": "tests.deepspeed_cpu.Start"})
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "StepCheckpoint":
            callback["init_args"]["save_top_k"] = -1
    return write_config(folder, config)


def fit(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pgp_lightning", "fit", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def single(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with as many micro-batches a step."""
    root = tmp_path_factory.mktemp("single") / "run"
    done = fit("--config", str(config), f"--trainer.default_root_dir={root}", "--trainer.accumulate_grad_batches=4")
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def weights(root: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    path = root / "checkpoints" / name
    found: dict[str, torch.Tensor] = torch.load(
        path / "consolidated.ckpt" if path.is_dir() else path, weights_only=True
    )["state_dict"]
    return found


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_saves_goes_on_and_is_exported(
    strategy: str, config: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = tmp_path / "overlay.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(overlay(strategy)))
    configs = ["--config", str(config), "--config", str(path)]
    done = fit(*configs, f"--trainer.default_root_dir={root}")
    assert done.returncode == 0, done.stderr[-3000:]

    start = json.loads((root / "start.json").read_text())
    assert start["lora_B"] == 0 < start["lora_A"]
    traces = [read_trace(root, rank) for rank in range(2)]
    mine = [line["samples"] for lines in zip(*traces, strict=True) for line in lines]
    assert mine == [line["samples"] for line in read_trace(single)]
    apart = difference(weights(root), weights(single))

    resumed = tmp_path / "resumed"
    saved = root / "checkpoints" / f"epoch=0-step={SAVED}.ckpt"
    done = fit(*configs, f"--trainer.default_root_dir={resumed}", f"--ckpt_path={saved}")
    assert done.returncode == 0, done.stderr[-3000:]
    again = difference(weights(resumed), weights(root))
    assert read_trace(resumed)[0]["batch"] == SAVED * 2

    assert pgp(["export", str(root), str(tmp_path / "guide"), "--verify"]) == 0
    assert "greatest difference 0" in capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{strategy}: {apart:.1e} from one process after {STEPS} steps, {again:.1e} after a resume")
    assert apart < 1e-4 and again < 1e-5

    last = root / "checkpoints" / "last.ckpt"
    if last.is_dir():
        a_folder_that_was_not_finished_is_no_checkpoint(root, config, capsys)
        only_what_is_trained_is_saved(last, capsys)


def a_folder_that_was_not_finished_is_no_checkpoint(
    root: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = root / "checkpoints" / "last.ckpt"
    done = fit("--config", str(config), f"--trainer.default_root_dir={root.parent / 'x'}", f"--ckpt_path={last}")
    assert done.returncode == 2 and "is a folder of shards" in done.stderr, done.stderr[-2000:]
    (last / "consolidated.ckpt").unlink()
    assert [path.name for path in checkpoints(root)] == [f"epoch=0-step={n}.ckpt" for n in (2, 4, 6)]
    with pytest.warns(UserWarning, match="was not written to its end: going on from .*step=6"):
        assert last_checkpoint(root).name == "epoch=0-step=6.ckpt"
    assert pgp(["export", str(last), str(root.parent / "broken")]) == 2
    assert "has no consolidated.ckpt, so it was not written to its end" in capsys.readouterr().err


def only_what_is_trained_is_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = sum(path.stat().st_size for path in (ROOT / "pgp_lightning/embedded/models/guide").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with capsys.disabled():
        print(f"  a checkpoint has {size / 1e6:.1f} MB, optimiser and all; the frozen base {base / 1e6:.1f} MB")
    words = {word for path in folder.rglob("*model_states.pt") for word in words_of(path)}
    held = {word for word in words if word.startswith("guide.") and word.endswith((".weight", ".bias"))}
    trained = {name for name in held if "lora_" in name or "bottleneck." in name}
    # The head is tied to the embedding: the one is kept, the other named as its twin.
    assert trained and {name.removeprefix("guide.model.base_model.model.") for name in held - trained} <= {
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
    }


def words_of(file: Path) -> set[str]:
    """Return all texts in a file of torch's, names of weights among them; nothing of it is unpickled."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return {word for _, word, _ in pickletools.genops(archive.read(pickled)) if isinstance(word, str)}


@full
@needs_deepspeed
def test_half_precision_leaves_positions_alone(config: Path, single: Path, tmp_path: Path) -> None:
    path, root = tmp_path / "overlay.yaml", tmp_path / "run"
    content = overlay("deepspeed_zero2")
    content["trainer"]["precision"] = "bf16-mixed"
    path.write_text(yaml.safe_dump(content))
    done = fit("--config", str(config), "--config", str(path), f"--trainer.default_root_dir={root}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((root / "start.json").read_text())["rotary"] == ["torch.float32"]
    found = weights(root)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert 0 < difference(found, weights(single)) < 0.02


@full
def test_a_checkpoint_of_another_strategy_is_refused(config: Path, single: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]'")
    path, root = tmp_path / "overlay.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(overlay("deepspeed_zero2")))
    shutil.copytree(single, root)
    done = fit("--config", str(config), "--config", str(path), f"--trainer.default_root_dir={root}", "--ckpt_path=last")
    assert done.returncode == 2 and "is one file" in done.stderr and "Traceback" not in done.stderr


@full
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--trainer.callbacks+=GlobalBatch", "--trainer.callbacks.records=5"],
            "5 records per optimiser step cannot be",
        ),
        (
            ["--trainer.callbacks+=GlobalBatch", "--trainer.callbacks.records=6"],
            "batch_size 2 does not divide: set data",
        ),
        (["--data.init_args.workers=3"], "lanes"),
        (["--model.init_args.guide.init_args.attention=flash_attention_2"], "flash"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(
    config: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    common = [
        "--trainer.devices=2",
        "--trainer.accumulate_grad_batches=1",
        f"--trainer.default_root_dir={tmp_path}/run",
    ]
    done = fit("--config", str(config), *common, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and all(words in line for line in lines), lines
    assert not read_trace(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["one_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_an_overlay_for_gpus_is_refused_where_there_are_none(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning"])
    configs = ["--config=configs/pgp.yaml", f"--config=configs/overlays/{strategy}.yaml"]
    assert lightning(["fit", *configs, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and any(word in last.lower() for word in ("cuda", "gpu", "deepspeed")), last
    assert not (tmp_path / "run").exists()
