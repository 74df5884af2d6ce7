"""Planning a sweep, and what its tables are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.sweep import Sweep
from pgp_lightning.evaluation.sweep_report import _Answers, _beta_chart, _curves, _differences
from pgp_lightning.evaluation.sweep_run import Run, Trainings, file_lock, is_trained, learning_curve
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
    early = runs[1].folder / "checkpoints" / "epoch=0-step=100.ckpt"
    early.touch()  # a kill came before last.ckpt
    assert sweep.command(runs[1])[-2:] == ["--ckpt_path", str(early)]
    (early.parent / "last.ckpt").touch()
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
        ({"rows": {}}, "expected rows"),
        ({"figures_images": 0}, "at least one of figures_images"),
        ({"rows": {"default": {}, "more": {"seeds": [0, 4]}}}, r"has no run of seeds \[4\]"),
        ({"rows": {"de/fault": {}}, "reference": "de/fault"}, "a row's name is of letters"),
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
    assert found["beta"] == pytest.approx([0.249, 0.399])
    (tmp_path / "nothing").mkdir()
    assert learning_curve(tmp_path / "nothing") == {"curve": [], "steps_to_90": None, "beta": None}


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


def test_a_row_is_compared_with_the_same_seed_of_its_reference(tmp_path: Path):
    right = {"ref_seed0": "10", "ref_seed1": "01", "row_seed0": "11", "row_seed1": "01", "row_seed2": "00"}
    places = (("a", 0), ("b", 0))
    write(tmp_path, {
        f"{name}@5": [answer(*place, correct=digit == "1", recall=0.5)
                      for place, digit in zip(places, digits, strict=True)]
        for name, digits in right.items()
    })  # fmt: skip
    runs = [Run(*name.split("_seed"), tmp_path)._replace(seed=int(name[-1])) for name in right]
    head, *rows = _differences(_Answers(tmp_path), runs, lambda row: "ref")
    assert head[:3] == ["row", "against", "seed"] and len(head) == 5
    found = {row[2]: row[3].split(" ")[0] for row in rows}
    # 11 minus 10, 01 minus 01, no reference for seed 2, and the mean of the first two.
    assert found == {"0": "+50.0", "1": "+0.0", "2": "", "mean": "+25.0"}


def test_curves_show_every_row_that_has_one(tmp_path: Path):
    runs = [Run("a", 0, tmp_path), Run("a", 1, tmp_path), Run("b", 0, tmp_path), Run("lost", 0, tmp_path)]
    curves = ([[50, 0.2], [100, 0.4]], [[50, 0.4], [100, 0.6], [150, 0.7]], [[50, 0.1]], [])
    figures = {run.name: {"curve": curve} for run, curve in zip(runs, curves, strict=True)}
    drawn = _curves(runs, figures, "a")
    assert drawn.count("<polyline") == 2 and "a, step 100" in drawn and "step 150" not in drawn and "lost" not in drawn
    assert _curves(runs[3:], figures, "a") == ""


def test_recall_is_drawn_against_beta(tmp_path: Path):
    names = ["a_seed0", "b_seed0"]
    write(tmp_path, {f"{n}@5": [answer("a", 0, recall=0.5), answer("b", 0, recall=0.7)] for n in names})
    drawn = _beta_chart([(0.2, Run("a", 0, tmp_path)), (1.5, Run("b", 0, tmp_path))], _Answers(tmp_path))
    assert drawn.count("<polyline") == 2 and "recall at 5 %" in drawn and "beta 1.5" in drawn


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path):
    run = Run("row", 0, tmp_path)
    with file_lock(run.log, wait=False), pytest.raises(ConfigError, match="another process is training"):
        Trainings(1)(run, ["fit"])


def test_after_a_stop_nothing_begins(tmp_path: Path):
    trainings = Trainings(1)
    trainings.stop()
    trainings(Run("row", 0, tmp_path), ["fit"])
    assert (tmp_path / "fit.log").read_text() == ""


def test_what_is_no_checkpoint_of_ours_is_not_trained(tmp_path: Path):
    assert not is_trained(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for content, trained in (({"global_step": 4}, False), ({"global_step": 4, "run": record(4)}, True),
                             ({"global_step": 4, "run": record(5)}, False),
                             ({"global_step": 4, "run": record(-1)}, False)):  # fmt: skip
        torch.save(content, tmp_path / "checkpoints" / "last.ckpt")
        assert is_trained(tmp_path) is trained


def record(steps: int) -> dict[str, Any]:
    return {"config": {"trainer": {"max_steps": steps}}}


def test_the_command_of_every_overlay_names_rows_that_there_are():
    folder = Path(__file__).parents[3] / "configs" / "ablations"
    sweep = Sweep.load(folder)
    for path in folder.glob("*.yaml"):
        line = next(line for line in path.read_text().splitlines() if line.startswith("#   "))
        words = line.removeprefix("#   ").split()
        if words[:2] != ["pgp", "sweep"] or "--rows" not in words:
            assert path.stem in ("sweep", "every_row")
            continue
        parsed = words[words.index("--rows") + 1]
        assert sweep.runs([parsed], [0]) and path.stem in sweep.rows[parsed].overlays, path
