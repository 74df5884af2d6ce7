"""`pgp sweep` as users call it: two rows of seconds, a kill in the middle, a row that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.small_run import small_config, write_config, write_manifest

ROOT = Path(__file__).parents[2]
CONTROL = "pgp_lightning.pruners.guided.Guided"


def write_sweep(folder: Path, **rows: Any) -> Path:
    """Write a sweep over the small run; `faster` doubles the learning rate, `broken` cannot work."""
    manifest = write_manifest(folder, folder / "data")
    config = small_config(manifest, steps=4, save_every=2)
    config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "Trace" not in c["class_path"]]
    config["trainer"]["val_check_interval"] = 4  # micro-batches: twice in a run
    base = write_config(folder, config)
    sweep = folder / "sweep"
    sweep.mkdir()
    overlays = {
        "faster": {"model": {"init_args": {"learning_rate": 0.002}}},
        "broken": {"model": {"init_args": {"learning_rate": -1.0}}},
        "beta": {"trainer": {"callbacks+": [{"class_path": "BetaAnnealing", "init_args": {"start": 0.9, "end": 0.9}}]}},
    }
    for name, overlay in overlays.items():
        (sweep / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
    grid = {"class_path": CONTROL, "init_args": {"guide": {"class_path": "pgp_lightning.guides.simple.UniformGuide"}}}
    written = {
        "base": str(base),
        "output": str(folder / "out"),
        "reference": "default",
        "figures_images": 4,
        "benchmark": {"manifest": str(manifest), "keep_ratios": [0.05, 0.2], "questions_per_image": 2,
                      "max_new_tokens": 2, "methods": {"grid": grid}},
        "rows": rows,
    }  # fmt: skip
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return sweep


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pgp_lightning.tools", "sweep", *map(str, words)]
    # Sums of floats depend on the number of threads, which --jobs shares out.
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=one)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that was killed while it trained, and then went on."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = write_sweep(
        folder,
        default={"seeds": [0, 1], "another_question": True},
        faster={"overlays": ["faster"], "seeds": [0, 1]},
        beta={"overlays": ["beta"]},
    )
    words = [sys.executable, "-m", "pgp_lightning.tools", "sweep", str(sweep), "--rows", "default", "--seeds", "0"]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, env=one
    )
    log, deadline = folder / "out" / "default" / "seed0" / "fit.log", time.monotonic() + 200
    while not list(log.parent.glob("checkpoints/last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (log.parent / "guide").exists()
    done = run(sweep, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_every_run_is_trained_exported_and_scored(swept: tuple[Path, str]):
    out, printed = swept
    runs = {f"{row}_seed{seed}" for row, seed in
            (("default", 0), ("default", 1), ("faster", 0), ("faster", 1), ("beta", 0))}  # fmt: skip
    assert {str(path.parent.relative_to(out)).replace("/", "_") for path in out.glob("*/*/guide")} == runs
    answers = {path.stem for path in (out / "answers").glob("*.jsonl")}
    rows = {*runs, "grid", "uniform", "random", "oracle", "default_seed0_another_question"}  # all, and the controls
    assert answers >= {"full", *(f"{name}@{budget}" for name in rows for budget in (5, 20))}
    assert all(f"{name} finished" in printed for name in runs) and "5/5" in printed

    figures = json.loads((out / "sweep.json").read_text())
    assert figures.keys() == runs
    assert [step for step, _ in figures["default_seed1"]["curve"]] == [2, 4]
    assert figures["beta_seed0"]["beta"] == [pytest.approx(0.9)] * 2
    assert {"kl", "gate", "accuracy", "accuracy_blind", "mass/relevant"} <= figures["faster_seed1"].keys()

    table = (out / "sweep.md").read_text()
    for name in (*runs, "full", "grid", "oracle", "default_seed0_another_question"):
        assert f"| {name} | " in table
    assert "| faster | default | mean | " in table and "| beta | default | 0 | " in table
    assert table in printed
    assert "<svg" in (out / "curves_default.svg").read_text()


def test_a_resumed_run_is_the_undisturbed_one(swept: tuple[Path, str], tmp_path: Path):
    sweep = write_sweep(tmp_path, default={"seeds": [0]})
    assert run(sweep).returncode == 0
    ours, other = (folder / "default" / "seed0" / "guide" for folder in (swept[0], tmp_path / "out"))
    for name in ("adapter_model.safetensors", "bottleneck.safetensors"):
        assert (ours / name).read_bytes() == (other / name).read_bytes()


def test_what_is_finished_is_not_done_again(swept: tuple[Path, str]):
    out, _ = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".ckpt", ".jsonl", ".json")}
    table = (out / "sweep.md").read_text()
    done = run(out.parent / "sweep", "--rows", "faster", "--seeds", "1")
    assert done.returncode == 0 and table in done.stdout
    changed = {path.name for path, time_ in before.items() if path.stat().st_mtime_ns != time_}
    assert changed <= {"sweep.json"}


def test_a_run_is_not_taken_for_one_of_another_configuration(swept: tuple[Path, str]):
    out, _ = swept
    overlay = out.parent / "sweep" / "faster.yaml"
    written = overlay.read_text()
    overlay.write_text(f"# the same\n{written}")
    assert run(out.parent / "sweep", "--rows", "faster", "--seeds", "0").returncode == 0
    overlay.write_text(written.replace("0.002", "0.003"))
    done = run(out.parent / "sweep", "--rows", "faster", "--seeds", "0")
    overlay.write_text(written)
    assert done.returncode == 1 and "faster_seed0 failed: " in done.stderr and "faster.yaml changed" in done.stderr


def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path):
    sweep = write_sweep(tmp_path, broken={"overlays": ["broken"]}, default={"seeds": [0]})
    done = run(sweep, "--jobs", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: broken_seed0 failed: exit code 2: error: ") and "learning_rate" in done.stderr
    assert "| default_seed0 | " in done.stdout and "broken_seed0 failed" in done.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rows", "nothing"], "no row is called nothing: expected some of default"),
        (["--seeds", "7"], "none of the rows has a run of seed 7"),
        (["--jobs", "0"], "jobs must be at least 1"),
    ],
)
def test_a_wrong_call_is_refused(tmp_path: Path, words: list[str], reason: str):
    done = run(write_sweep(tmp_path, default={}), *words)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1
