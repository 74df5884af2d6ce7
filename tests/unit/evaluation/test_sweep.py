"""Planning a sweep, and what its tables are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.sweep import Sweep
from pgp_lightning.evaluation.sweep_report import Run, _Answers, learning_curve
from tests.unit.evaluation.results_made import answer, write

BENCHMARK = {"manifest": "data_manifests/embedded.yaml", "keep_ratios": [0.05]}


def write_sweep(folder: Path, **changes: Any) -> Path:
    for name in ("base", "one", "two"):
        (folder / f"{name}.yaml").write_text("trainer: {}\n")
    rows = {"default": {"seeds": [0, 1]}, "other": {"overlays": ["one", "two"], "seeds": [1]}}
    content = {"base": str(folder / "base.yaml"), "output": str(folder / "out"), "reference": "default",
               "every_row": ["one"], "benchmark": {**BENCHMARK, "methods": {}}, "rows": rows}  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return folder


def test_a_run_is_trained_with_its_overlays_and_its_seed(tmp_path: Path):
    sweep = Sweep.load(write_sweep(tmp_path))
    runs = sweep.runs()
    assert [(run.row, run.seed) for run in runs] == [("default", 0), ("other", 1), ("default", 1)]
    words = sweep.command(runs[1])
    configs = [Path(words[i + 1]).stem for i, word in enumerate(words) if word == "--config"]
    assert configs == ["base", "one", "one", "two"] and words[0] == "fit"
    options = dict(zip(words[9::2], words[10::2], strict=True))
    assert options == {
        "--trainer.default_root_dir": str(tmp_path / "out" / "other" / "seed1"),
        "--seed_everything": "1", "--model.init_args.seed": "1", "--data.init_args.seed": "1",
    }  # fmt: skip
    (runs[1].folder / "checkpoints").mkdir(parents=True)
    (runs[1].folder / "checkpoints" / "last.ckpt").touch()
    assert sweep.command(runs[1])[-2:] == ["--ckpt_path", "last"]
    assert [run.name for run in sweep.runs(["default"], [1])] == ["default_seed1"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": {"default": {"overlays": ["three"]}}}, "three.yaml, which does not exist"),
        ({"rows": {"default": {"seeds": [1, 1]}}}, "expected different seeds"),
        ({"rows": {"default": {"seeds": []}}}, "expected different seeds"),
        ({"rows": {"default": {"reference": "lost"}}}, "its reference 'lost' is no row"),
        ({"reference": "lost"}, "its reference 'lost' is no row"),
        ({"rows": {"default": {"seed": 1}}}, "seed"),
        ({"rows": {"de/fault": {}}, "reference": "de/fault"}, "a row is called with letters"),
        ({"every_rows": ["one"]}, "every_rows"),
        ({"benchmark": {**BENCHMARK, "keep_ratios": [2.0], "methods": {}}}, "keep_ratios"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        Sweep.load(write_sweep(tmp_path, **changes))


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"expected a folder with a sweep\.yaml"):
        Sweep.load(tmp_path)


def test_the_learning_curve_is_read_from_the_events(tmp_path: Path):
    writer = SummaryWriter(str(tmp_path))
    for step, recall in ((49, 0.4), (99, 0.71), (149, 0.74), (199, 0.8)):
        writer.add_scalar("val/recall@5", recall, step, walltime=1000 + step)
        writer.add_scalar("train/beta", 0.2 + step / 1000, step, walltime=1000 + step)
    writer.close()
    found = learning_curve(tmp_path)
    assert [step for step, _ in found["curve"]] == [50, 100, 150, 200]
    assert found["steps_to_90"] == 150  # 0.9 x 0.8 = 0.72 lies above the value at 100
    assert found["beta"] == pytest.approx([0.249, 0.399]) and found["minutes"] == pytest.approx(150 / 60)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="have no val/recall@5"):
        learning_curve(tmp_path / "nothing")


def test_a_difference_over_seeds_is_the_mean_of_the_paired_differences(tmp_path: Path):
    right: dict[str, list[int]] = {"a@5": [1, 1, 0, 0], "b@5": [0, 1, 0, 0], "c@5": [1, 1, 1, 0], "d@5": [0, 0, 1, 0]}
    recall: dict[str, list[float | None]] = {"a@5": [1.0, 0.5, None, 0.5], "b@5": [0.5, 0.5, None, 0.0],
              "c@5": [1.0, 1.0, None, 1.0], "d@5": [0.0, 1.0, None, 1.0]}  # fmt: skip
    places = (("a", 0), ("a", 1), ("b", 0), ("c", 0))
    write(tmp_path, {
        name: [answer(*place, correct=bool(digit), recall=share)
               for place, digit, share in zip(places, right[name], recall[name], strict=True)]
        for name in right
    })  # fmt: skip
    answers = _Answers(tmp_path)
    accuracy, found = answers.minus([("a", "b"), ("c", "d")], "5")
    twin = [((1 - 0) + (1 - 0)) / 2, ((1 - 1) + (1 - 0)) / 2, ((0 - 0) + (1 - 1)) / 2, 0.0]
    assert accuracy.mean == pytest.approx(sum(twin) / 4)
    assert found is not None and found.mean == pytest.approx(((0.5 + 1.0) / 2 + 0.0 + (0.5 + 0.0) / 2) / 3)
    assert accuracy.low <= accuracy.mean <= accuracy.high
    single, _ = answers.minus([("a", "b")], "5")
    assert single.mean == pytest.approx(0.25)


def test_a_run_knows_its_files(tmp_path: Path):
    run = Run("row", 3, tmp_path)
    assert run.name == "row_seed3" and run.guide == tmp_path / "guide" and run.figures.name == "figures.json"
