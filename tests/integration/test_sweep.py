"""`pgp sweep` as users call it: two rows of seconds, a kill in the middle, a row that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pgp_lightning.tools import main
from tests.integration.failing import fails
from tests.integration.small_run import small_config, write_config, write_manifest
from tests.trace import hold, release

ROOT = Path(__file__).parents[2]
CONTROL = "pgp_lightning.pruners.guided.Guided"


def write_sweep(folder: Path, **rows: Any) -> Path:
    """Write a sweep over the small run; `faster` doubles the learning rate, `broken` cannot work."""
    manifest = write_manifest(folder, folder / "data")
    config = small_config(manifest, steps=4, save_every=2)
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


ROWS: dict[str, Any] = {
    "default": {"seeds": [0, 1], "another_question": True},
    "faster": {"overlays": ["faster"], "seeds": [0, 1]},
    "broken": {"overlays": ["broken"]},
    "beta": {"overlays": ["beta"]},
}
FEW: dict[str, Any] = ROWS | {"default": {**ROWS["default"], "seeds": [0]}}
FEW.pop("faster")


class Swept(NamedTuple):
    """A sweep that is finished: where it lies, what it printed, what went wrong, and the runs that did not."""

    folder: Path
    printed: str
    error: str
    runs: list[tuple[str, int]]

    @property
    def out(self) -> Path:
        return self.folder / "out"


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pgp_lightning.tools", "sweep", *map(str, words)]


def kill_while_training(sweep: Path) -> None:
    """Begin a sweep and kill it, and what it has started, when its first run has saved for the first time."""
    root = sweep.parent / "out" / "default" / "seed0"
    hold(root, 6)  # after its first checkpoint, before its last
    process = subprocess.Popen(
        command(sweep, "--rows", "default", "--seeds", "0"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    while not (root / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    release(root)
    assert not (root / "guide").exists()


@pytest.fixture(scope="module", params=["few", pytest.param("killed", marks=pytest.mark.full)])
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Few rows of one seed; or all, of a sweep that was killed while it trained and then went on."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = FEW if request.param == "few" else ROWS
    sweep = write_sweep(folder, **rows)
    if request.param == "killed":
        kill_while_training(sweep)
    done = subprocess.run(command(sweep, "--jobs", 2), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr  # for the broken row alone
    runs = [(name, seed) for name, row in rows.items() if name != "broken" for seed in row.get("seeds", [0])]
    return Swept(folder, done.stdout, done.stderr, runs)


def test_every_run_is_trained_exported_and_scored(swept: Swept):
    out, printed = swept.out, swept.printed
    runs = {f"{row}_seed{seed}" for row, seed in swept.runs}
    assert {str(path.parent.relative_to(out)).replace("/", "_") for path in out.glob("*/*/guide")} == runs
    answers = {path.stem for path in (out / "answers").glob("*.jsonl")}
    rows = {*runs, "grid", "uniform", "random", "oracle", "default_seed0_another_question"}  # all, and the controls
    assert answers >= {"full", *(f"{name}@{budget}" for name in rows for budget in (5, 20))}
    assert all(f"{name} finished" in printed for name in runs) and f"{len(runs) + 1}/{len(runs) + 1}" in printed

    figures = json.loads((out / "sweep.json").read_text())
    assert figures.keys() == runs
    assert [step for step, _ in figures["beta_seed0"]["curve"]] == [2, 4]
    for found in figures.values():
        assert found["curve"][-1][0] == 4  # a kill between checkpoint and validation costs a point
        assert {"kl", "gate", "accuracy", "accuracy_blind", "mass/relevant"} <= found.keys()
    assert figures["beta_seed0"]["beta"] == [pytest.approx(0.9)] * 2

    table = (out / "sweep.md").read_text()
    for name in (*runs, "full", "grid", "oracle", "default_seed0_another_question"):
        assert f"| {name} | " in table
    assert "| beta | default | 0 | " in table
    assert ("| faster | default | mean | " in table) == (("faster", 1) in swept.runs)
    assert table in printed
    assert "<svg" in (out / "curves_default.svg").read_text()


@pytest.mark.full
@pytest.mark.parametrize("swept", ["killed"], indirect=True)
def test_a_resumed_run_is_the_undisturbed_one(swept: Swept, tmp_path: Path):
    assert main(["sweep", str(write_sweep(tmp_path, default={"seeds": [0]}))]) == 0
    ours, other = (folder / "default" / "seed0" / "guide" for folder in (swept.out, tmp_path / "out"))
    for name in ("adapter_model.safetensors", "bottleneck.safetensors"):
        assert (ours / name).read_bytes() == (other / name).read_bytes()


def test_what_is_finished_is_not_done_again(swept: Swept, capsys: pytest.CaptureFixture[str]):
    files = [path for path in swept.out.rglob("*") if path.suffix in (".ckpt", ".jsonl", ".json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    table, (row, seed) = (swept.out / "sweep.md").read_text(), swept.runs[-1]
    assert main(["sweep", str(swept.folder / "sweep"), "--rows", row, "--seeds", str(seed)]) == 0
    assert table in capsys.readouterr().out
    changed = {path.name for path, time_ in before.items() if path.stat().st_mtime_ns != time_}
    assert changed <= {"sweep.json"}


def test_a_run_is_not_taken_for_one_of_another_configuration(swept: Swept, capsys: pytest.CaptureFixture[str]):
    overlay, words = swept.folder / "sweep" / "beta.yaml", ["sweep", str(swept.folder / "sweep"), "--rows", "beta"]
    written = overlay.read_text()
    overlay.write_text(f"# the same\n{written}")
    assert main(words) == 0
    overlay.write_text(written.replace("0.9", "0.8"))
    assert main(words) == 1
    overlay.write_text(written)
    error = capsys.readouterr().err
    assert "beta_seed0 failed: " in error and "beta.yaml changed" in error


def test_a_row_that_fails_does_not_stop_the_others(swept: Swept):
    (line,) = swept.error.splitlines()
    assert line.startswith("error: broken_seed0 failed: exit code 2: error: ") and "learning_rate" in line
    assert "broken_seed0 failed" in swept.printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rows", "nothing"], "no row is called nothing: expected some of default"),
        (["--seeds", "7"], "none of the rows has a run of seed 7"),
        (["--jobs", "0"], "jobs must be at least 1"),
    ],
)
def test_a_wrong_call_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str):
    assert reason in fails(["sweep", str(write_sweep(tmp_path, default={})), *words], capsys)
