"""The build of the embedded pair: from nothing to two models, and on after an interruption anywhere."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pgp_lightning.embedded import build, stages, tower
from pgp_lightning.embedded.corpus import Item, pick
from pgp_lightning.embedded.probe import probe_recall
from pgp_lightning.embedded.stages import run_stage, step_rng
from pgp_lightning.embedded.world import RULE, SPLITS, TYPES, draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.vlm.loading import load_processor
from pgp_lightning.vlm.request import Request


class Toy(nn.Module):
    """A module with dropout, whose loss draws from the step's generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)
        self.steps: list[int] = []

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.steps.append(step)
        values = torch.from_numpy(step_rng(0, "toy", step).normal(size=(8, 4))).float()
        loss = self.layer(self.drop(values)).square().mean()
        return loss, {"loss": loss.item()}


def stage(module: Toy, folder: Path, **options: Any) -> bool:
    return run_stage("toy", folder, module, module.loss, **{
        "steps": 12, "learning_rate": 0.1, "seed": 1, "warmup": 3, "save_every": 5, "log_every": 4, **options
    })  # fmt: skip


def test_an_interrupted_stage_ends_as_an_undisturbed_one(tmp_path: Path):
    whole, cut, rest = Toy(), Toy(), Toy()
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    assert stage(whole, tmp_path / "whole") is True
    real = cut.loss

    def stop(step: int) -> Any:
        if step == 7:
            raise KeyboardInterrupt
        return real(step)

    cut.loss = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stage(cut, tmp_path / "cut")
    torch.manual_seed(99)
    assert stage(rest, tmp_path / "cut") is True
    assert rest.steps == list(range(5, 12))  # from the last checkpoint on
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))
    assert (tmp_path / "whole" / "toy.log").read_text().startswith("4 loss ")
    # A finished stage is loaded, not trained.
    done = Toy()
    assert stage(done, tmp_path / "cut") is False and done.steps == []
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), whole.parameters(), strict=True))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_stage_with_another_seed_is_another_stage(tmp_path: Path):
    one, other = Toy(), Toy()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    stage(one, tmp_path / "a")
    stage(other, tmp_path / "b", seed=2)
    assert not torch.equal(one.layer.weight, other.layer.weight)


def test_a_stage_stops_on_a_loss_that_is_not_finite(tmp_path: Path):
    toy = Toy()
    toy.loss = lambda step: (torch.tensor(float("nan")), {})  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the loss of stage toy is nan at step 0"):
        stage(toy, tmp_path)


def items(kinds: list[int]) -> list[Item]:
    return [Item(kind, [number], [], np.zeros(320, dtype=bool)) for number, kind in enumerate(kinds)]


def test_questions_are_drawn_by_type_first():
    rng = np.random.default_rng(0)
    pool = items([0] * 18 + [1] * 2)
    drawn = [pick(pool, 1, rng)[0].type for _ in range(400)]
    assert 140 < sum(drawn) < 260  # each type half of the time, however common
    weighed = [pick(pool, 1, rng, {1: 3.0})[0].type for _ in range(400)]
    assert 260 < sum(weighed) < 340
    for count in (1, 5, 99):
        chosen = pick(pool, count, rng)
        assert len(chosen) == len({item.question[0] for item in chosen}) == min(count, 20)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints at every step, and a probe and tower batches of a few moments."""
    often = partial(run_stage, save_every=1)
    monkeypatch.setattr(build, "run_stage", often)
    monkeypatch.setattr(tower, "run_stage", often)
    monkeypatch.setattr(build, "probe_recall", partial(probe_recall, steps=3))
    monkeypatch.setattr(build, "train_tower", partial(tower.train_tower, scenes_per_step=1))


def run(folder: Path, *extra: str) -> None:
    work, models = folder / "work", folder / "models"
    size = ["--steps", "2", "--scenes", "8", "--threads", str(torch.get_num_threads())]
    build.main(["--folder", str(work), "--models", str(models), *size, *extra])


@pytest.mark.slow
def test_the_build_runs_and_continues_where_it_was_interrupted(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = {"guide": 2, "guide_before_question_blind": 1, "answer_model": 2}  # and their stages
    run(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole" / "models").iterdir()} == set(names)
    for name, count in names.items():
        report = json.loads((tmp_path / "whole" / "models" / name / "report.json").read_text())
        assert 0 <= report["image_first"]["mean"] <= 1 and report["steps"] == 2 * count
        assert set(report["image_first"]) <= {"mean", *TYPES}
        assert ("probe_recall" in report) == name.startswith("guide")

    # Stop at every step there is, one after the other: each call gets one step further.
    real, stops = stages.step_rng, 0

    def tired(seed: int, stage: str, step: int) -> np.random.Generator:
        if step == 1 and (stage, step) not in seen:
            seen.add((stage, step))
            raise KeyboardInterrupt
        return real(seed, stage, step)

    seen: set[tuple[str, int]] = set()
    monkeypatch.setattr(build, "step_rng", tired)
    run(tmp_path / "cut", "--only", "tower")
    for _ in range(9):
        try:
            run(tmp_path / "cut")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4
    for name in names:
        first, second = (load_file(tmp_path / f / "models" / name / "model.safetensors") for f in ("whole", "cut"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not list((tmp_path / "cut").rglob("*.part")) and not list((tmp_path / "cut").rglob("*.tmp"))

    # What was built works as the package's own models do.
    base = str(tmp_path / "cut" / "models" / "guide")
    assert load_processor(base).rule == RULE
    tiles = tower.scene_tiles(draw_scene("test", 0))
    scores = PosteriorGuide(base).eval()(Request(["how many red shapes"], tiles, [RULE.grid(256, 256)]))
    assert scores.shape == (1, 320) and scores.isfinite().all()


def test_the_splits_of_the_build_are_not_those_of_the_records():
    assert {"pretrain", "pretrain_val", "tower"} <= set(SPLITS) and len(set(SPLITS.values())) == len(SPLITS)
