from __future__ import annotations

import inspect
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from pgp_lightning.bottleneck import GaussianBottleneck
from pgp_lightning.errors import ConfigError
from pgp_lightning.selection import keep_top
from pgp_lightning.training import callbacks
from pgp_lightning.training.callbacks import BetaAnnealing, LogLine, RandomState, total_steps
from pgp_lightning.training.health import PosteriorHealth, channel_divergence
from pgp_lightning.training.images import draw_importance, draw_sample, reassemble
from pgp_lightning.training.run import differences, last_checkpoint
from pgp_lightning.vlm.tiles import TileGrid
from tests.standins import GRID, ToyGuide, toy_batch
from tests.unit.training.looking_on import Recorder, trainer

# BetaAnnealing


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.5), (0.5, 0.2)])
def test_beta_counts_optimiser_steps_and_is_the_same_after_a_resume(start: float, end: float) -> None:
    def betas(first: int, accumulate: int) -> list[float]:
        callback, module, state = BetaAnnealing(start, end, 0.2), SimpleNamespace(beta=None), trainer(global_step=first)
        callback.on_train_start(state, module)
        found = []
        for batch in range(30 * accumulate):
            state.global_step = first + batch // accumulate
            callback.on_train_batch_start(state, module, None, batch)
            found.append(module.beta)
        return found[::accumulate]

    # Twin: 20 equal stairs from start to end, then level.
    expected = [start + (end - start) * min(step, 20) / 20 for step in range(40)]
    assert betas(0, 1) == pytest.approx(expected[:30], abs=1e-12)
    assert betas(0, 3) == betas(0, 1)
    assert betas(10, 1)[:20] == betas(0, 1)[10:]


def test_beta_of_a_checkpoint_weighs_its_validation() -> None:
    trained, module = BetaAnnealing(warmup_fraction=0.5), SimpleNamespace(beta=None)
    trained.on_train_start(trainer(global_step=25), module)
    fresh, other = BetaAnnealing(warmup_fraction=0.5), SimpleNamespace(beta=None)
    fresh.on_validation_start(trainer(), other)
    assert other.beta is None
    fresh.load_state_dict(trained.state_dict())
    fresh.on_validation_start(trainer(), other)
    assert other.beta == module.beta == pytest.approx(0.35)


def test_beta_refuses_what_cannot_work() -> None:
    for wrong in ({"start": -0.1}, {"end": math.inf}, {"end": math.nan}, {"warmup_fraction": 1.1}):
        with pytest.raises(ConfigError):
            BetaAnnealing(**wrong)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        total_steps(trainer(max_steps=-1, estimated_stepping_batches=math.inf))
    assert total_steps(trainer(max_steps=-1, estimated_stepping_batches=7)) == 7


# RandomState


def draws() -> list[float]:
    return [
        float(torch.rand(())), random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())
    ]  # fmt: skip


def test_steps_draw_from_a_stream_of_their_own(tmp_path: Path) -> None:
    def steps(callback: RandomState, count: int, between: int) -> list[list[float]]:
        found = []
        for step in range(count):
            callback.on_train_batch_start(trainer(), None, None, step)
            found.append(draws())
            callback.on_train_batch_end(trainer(), None, None, None, step)
            for _ in range(between):  # a validation, a new loader
                draws()
        return found

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    whole = steps(RandomState(), 6, between=0)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    first = RandomState()
    assert steps(first, 3, between=4) == whole[:3]

    # The state survives a checkpoint that may hold nothing but tensors and plain values.
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    second = RandomState()
    second.load_state_dict(state)
    second.on_train_start(trainer(), None)
    draws()
    assert steps(second, 3, between=1) == whole[3:]


def test_a_checkpoint_inside_a_step_holds_the_present_state() -> None:
    callback = RandomState()
    callback.on_train_batch_end(trainer(), None, None, None, 0)
    callback.on_train_batch_start(trainer(), None, None, 1)
    draws()
    state, expected = callback.state_dict(), draws()
    other = RandomState()
    other.load_state_dict(state)
    other.on_train_start(trainer(), None)
    other.on_train_batch_start(trainer(), None, None, 0)
    assert draws() == expected


def test_states_of_other_processes() -> None:
    callback = RandomState()
    callback.load_state_dict({"processes": [callbacks._random_state()]})
    with pytest.warns(UserWarning, match="random states of 1 processes, now there are 2"):
        callback.on_train_start(trainer(world_size=2, global_rank=1), None)


# LogLine


def test_log_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock.now)
    metrics = {"train/loss": torch.tensor(1.5), "train/kl": 0.25, "train/beta": 0.2, "val/loss": 2.0}

    def run(callback: LogLine) -> str:
        state = trainer(callback_metrics=metrics)
        callback.on_train_start(state, None)
        for step in range(1, 6):
            clock.now += 10
            state.global_step = step
            callback.on_train_batch_end(state, None, None, toy_batch(0), step)
        callback.on_validation_end(state, None)
        return capsys.readouterr().out

    assert run(LogLine(5)).splitlines() == [
        "step 5/100  loss 1.5  kl 0.25  beta 0.2  0.2 samples/s  eta 0:15:50",
        "validation at step 5  val/loss 2",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(LogLine(5)) == ""
    with pytest.raises(ConfigError):
        LogLine(0)


# PosteriorHealth


def record(bottleneck: GaussianBottleneck, states: torch.Tensor) -> Any:
    with torch.no_grad():
        posterior = bottleneck(states)
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[0, -2:] = False
    return SimpleNamespace(
        divergence=bottleneck.divergence(posterior).detach(), mask=mask, posterior=posterior,
        visual=states * 2, states=states, latents=states * 3,
    )  # fmt: skip


def test_health_figures_equal_a_slow_twin() -> None:
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(6)
    with torch.no_grad():
        bottleneck.prior_mean.normal_()
        bottleneck.prior_log_variance.normal_()
        # Channel 2 is dead: its posterior is its prior, exactly.
        for head, bias in ((bottleneck.gate_head, -100.0), (bottleneck.log_variance_head, 0.0)):
            head[-1].weight[2] = 0
            head[-1].bias[2] = bias
        bottleneck.prior_log_variance[2] = 0
    step = record(bottleneck, torch.randn(2, 5, 6))
    figures = PosteriorHealth.figures(step, bottleneck)

    tokens = [(b, i) for b in range(2) for i in range(5) if step.mask[b, i]]
    channels = channel_divergence(step, bottleneck)
    dead = 0
    for j in range(6):
        total = 0.0
        for b, i in tokens:
            mean, log_variance = float(step.posterior.mean[b, i, j]), float(step.posterior.log_variance[b, i, j])
            other, spread = float(bottleneck.prior_mean[j]), math.exp(float(bottleneck.prior_log_variance[j]))
            ratio = math.exp(log_variance) / spread
            total += 0.5 * (ratio - 1 - math.log(ratio) + (mean - other) ** 2 / spread)
        assert float(channels[j]) == pytest.approx(total / len(tokens), rel=1e-4, abs=1e-6)
        dead += total / len(tokens) < 1e-4
    assert dead == 1 and figures["dead_channels"] == pytest.approx(1 / 6)
    squares = [float(step.states[b, i, j]) ** 2 for b, i in tokens for j in range(6)]
    rms = math.sqrt(sum(squares) / len(squares))
    assert figures["rms_states"] == pytest.approx(rms, rel=1e-5)
    assert figures["rms_visual"] == pytest.approx(2 * rms, rel=1e-5)
    assert figures["rms_latents"] == pytest.approx(3 * rms, rel=1e-5)
    assert figures["gate_mean"] == pytest.approx(sum(float(step.posterior.gate[b, i].mean()) for b, i in tokens) / 8)


def test_health_warns_once_per_episode_and_not_again_after_a_resume(recwarn: pytest.WarningsRecorder) -> None:
    bottleneck, log, state = GaussianBottleneck(4), Recorder(), trainer()
    state.loggers = [log]
    well = record(bottleneck, torch.randn(2, 5, 4))
    collapsed = SimpleNamespace(**vars(well) | {"divergence": torch.full((2, 5), 1e-4)})
    exploded = SimpleNamespace(**vars(well) | {"divergence": torch.full((2, 5), math.inf)})
    closed = SimpleNamespace(**vars(well) | {"posterior": well.posterior._replace(gate=torch.zeros(2, 5, 4))})

    def look(callback: PosteriorHealth, *steps: Any) -> list[str]:
        recwarn.clear()
        callback.on_train_start(state, None)
        for step in steps:
            state.global_step += 1
            module = SimpleNamespace(last=step, guide=SimpleNamespace(bottleneck=bottleneck))
            callback.on_train_batch_end(state, module, None, None, 0)
            callback.on_train_batch_end(state, module, None, None, 1)  # a micro-batch without an optimiser step
        return [str(warning.message) for warning in recwarn]

    callback = PosteriorHealth(every_n_steps=1)
    found = look(callback, well, collapsed, collapsed, well, collapsed, exploded, closed)
    assert [word for line in found for word in ("collapsed", "explodes", "closed") if word in line] == [
        "collapsed", "collapsed", "explodes", "closed"
    ]  # fmt: skip
    assert "lower beta" in found[0] and "at step 2" in found[0]
    resumed = PosteriorHealth(every_n_steps=1)
    resumed.load_state_dict(callback.state_dict())
    assert look(resumed, closed) == []
    assert all(math.isfinite(value) for _, figures in log.figures for value in figures.values())
    assert look(PosteriorHealth(every_n_steps=50), *[collapsed] * 10) == []
    for wrong in ({"every_n_steps": 0}, {"collapsed": 0}, {"collapsed": 5, "exploded": 4}):
        with pytest.raises(ConfigError):
            PosteriorHealth(**wrong)


# Pictures


@pytest.mark.parametrize("thumbnail", [True, False])
def test_reassemble_equals_a_loop(thumbnail: bool) -> None:
    grid = TileGrid(3, 2, 2, thumbnail)
    tiles = np.random.default_rng(0).integers(0, 256, (grid.tiles, 3, 4, 4), dtype=np.uint8)
    image, small = reassemble(tiles, grid)
    assert image.shape == (8, 12, 3)
    for y in range(8):
        for x in range(12):
            assert (image[y, x] == tiles[y // 4 * 3 + x // 4, :, y % 4, x % 4]).all()
    assert (small is None) != thumbnail
    if small is not None:
        assert (small == tiles[-1].transpose(1, 2, 0)).all()
    with pytest.raises(ValueError, match="tiles of the grid"):
        reassemble(tiles[:-1], grid)


def test_the_picture_shows_the_tokens_where_they_are() -> None:
    grid = TileGrid(2, 1, 2, thumbnail=True)
    tiles = np.full((3, 3, 8, 8), 200, np.uint8)
    importance, kept = np.zeros(12), np.zeros(12, bool)
    importance[6], kept[6] = 5.0, True  # lower left token of the second tile
    picture = draw_importance(tiles, grid, importance, kept, size=64)
    # Without text: margin 4, then the map 64 x 32 beside the thumbnail's, and below what is kept.
    heat, keep = picture[4 : 4 + 32, 4 : 4 + 64].astype(int), picture[4 + 32 + 4 :][:32, 4 : 4 + 64].astype(int)
    for x0, y0, x1, y1 in grid.rectangles()[:8]:
        x, y = int((x0 + x1) / 2 * 64), int((y0 + y1) / 2 * 32)
        mine = bool(np.isclose([x0, y0], [0.5, 0.5]).all())
        assert (heat[y, x, 0] > heat[y, x, 2]) == mine  # warm, elsewhere blue
        assert (keep[y, x] == 200).all() == mine
    framed = draw_importance(tiles, grid, importance, kept, kept, size=64)
    changed = (framed != picture).any(axis=2)
    assert changed[4 + 16, 4 + 32 : 4 + 48].all() and not changed[4 + 24, 4 + 34 : 4 + 45].any()
    assert not changed[:, 4 + 64 + 4 :].any()  # the thumbnail has no true token


def test_a_question_is_drawn_with_its_own_image() -> None:
    batch = toy_batch(3, rows=3)
    batch.request.images[:] = [2, 0, 1]
    batch.request.questions[0] = "was steht auf dem Schild? 什么"
    importance = torch.full((3, GRID.tokens + 2), -torch.inf)
    importance[:, : GRID.tokens] = ToyGuide()(batch.request).detach()
    picture = draw_sample(batch, importance, 0, size=32)
    kept = keep_top(importance[:1], 0.11)[0, :12].numpy()
    expected = draw_importance(
        batch.request.tiles[6:9].numpy(), GRID, importance[0, :12].numpy(), kept,
        batch.request.relevant[0].numpy(), f"Q: {batch.request.questions[0]}\nA: 3", 32,
    )  # fmt: skip
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert np.array_equal(picture, expected)
    assert not np.array_equal(picture, draw_sample(batch, importance, 1, size=32))


# One run = one folder


def test_differences_names_what_matters_and_nothing_else() -> None:
    def config(**given: Any) -> dict[str, Any]:
        beta = {"class_path": "x.BetaAnnealing", "init_args": {"end": 0.5}}
        bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar", "init_args": {"refresh_rate": 1}}
        trainer = {"max_steps": 5, "log_every_n_steps": 50, "devices": 1, "callbacks": [beta, bar]}
        guide = {"class_path": "G", "init_args": {"r": 4}}
        return {
            "seed_everything": 1,
            "model": {"class_path": "a.PGP", "init_args": {"lr": 1e-5, "guide": guide}},
            "data": {"class_path": "a.Data", "init_args": {"workers": 1, "lanes": 64}},
            "trainer": trainer | given,
            "ckpt_path": None,
        }  # fmt: skip

    watchers = config()["trainer"]["callbacks"][:1]
    old, new = config(), config(log_every_n_steps=1, devices=8, max_time="1:0:0:0", callbacks=watchers)
    new["data"]["init_args"]["workers"], new["ckpt_path"] = 8, "x"
    new["model"]["init_args"]["option_of_a_newer_version"] = None
    assert differences(old, new) == []
    new["data"]["init_args"] |= {"cache": "x", "cache_gib": 3.0, "allow_pipe": True}
    new["data"]["init_args"] |= {"mixing": "random", "group_batches": 1}  # as it was before these could be chosen
    assert differences(old, new) == differences(new, old) == []
    new["data"]["init_args"]["mixing"] = "even"
    assert differences(old, new) == ["data.mixing random -> even"]
    del new["data"]["init_args"]["mixing"]
    read_from_yaml = config()
    read_from_yaml["model"]["init_args"]["lr"] = "1e-05"
    assert differences(old, read_from_yaml) == []
    new["model"]["init_args"]["guide"]["init_args"]["r"] = 8
    new["trainer"]["callbacks"][0]["init_args"]["end"] = 0.7
    new["trainer"]["max_steps"] = 6
    assert differences(old, new) == [
        "callbacks.BetaAnnealing.end 0.5 -> 0.7", "model.guide.r 4 -> 8", "trainer.max_steps 5 -> 6"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("gradient_clip_algorithm", None, "value"),
        ("gradient_clip_val", 1.0, 0.5),
        ("limit_train_batches", None, 0.5),
        ("max_epochs", None, 2),
        ("max_steps", 5, 6),
        ("overfit_batches", 0.0, 1),
        ("precision", "bf16-true", "32-true"),
    ],
)
def test_a_trainers_option_that_changes_what_is_learned_is_a_difference(key: str, old: object, new: object) -> None:
    assert key in inspect.signature(Trainer).parameters

    def config(**trainer: object) -> dict[str, Any]:
        return {"seed_everything": 1, "model": {}, "data": {}, "trainer": trainer}

    shown = "none" if old is None else old
    assert differences(config(**{key: old}), config(**{key: new})) == [f"trainer.{key} {shown} -> {new}"]
    # A key that was not written counts as none.
    assert differences(config(), config(**{key: new})) == [f"trainer.{key} none -> {new}"]
    assert differences(config(**{key: new}), config(**{key: new})) == []


def test_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"last\.ckpt to continue from, found none: leave --ckpt_path out"):
        last_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step=4.ckpt").touch()
    with pytest.raises(ConfigError, match=r"step=4\.ckpt.*save_last: true"):
        last_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert last_checkpoint(tmp_path).name == "last.ckpt"
