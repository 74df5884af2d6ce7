"""How fast training goes, over all processes, and what a run that breaks off says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pgp_lightning.data.collate import Item, collate
from pgp_lightning.data.conversation import Conversation, Turn
from pgp_lightning.training import throughput
from pgp_lightning.training.throughput import FailureReport, Throughput, figures
from pgp_lightning.vlm.tiles import TileGrid
from tests.standins import GRID, toy_batch
from tests.unit.training.looking_on import Recorder, trainer


def test_steps_and_waiting_count_but_no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    log, callback = Recorder(), Throughput()

    def gather(ranks: list[torch.Tensor], own: torch.Tensor) -> None:
        for rank in ranks:
            rank.copy_(own)

    monkeypatch.setattr(throughput.dist, "all_gather", gather)
    loader = SimpleNamespace(waited=7.0)
    state = trainer(loggers=[log], world_size=2, log_every_n_steps=2, train_dataloader=loader)
    module = SimpleNamespace(device="cpu", passes_ended=None)
    callback.on_train_start(state, module)
    for batch in range(4):  # two micro-batches per step: 3 s of work each, 1 s of waiting, 50 s of validation
        callback.on_train_batch_start(state, module, toy_batch(0), batch)
        clock.now += 1.5
        module.passes_ended = clock.now
        clock.now += 0.5  # an exchange with the other process
        callback.on_before_backward(state, module, torch.zeros(()))
        clock.now += 1
        state.global_step = (batch + 1) // 2
        callback.on_train_batch_end(state, module, None, toy_batch(0), batch)
        clock.now += 1
        loader.waited += 0.75  # the rest of the pause is an exchange again
        if batch == 1:
            callback.on_validation_start(state, module)
            clock.now += 50
        if batch == 2:
            callback.on_save_checkpoint(state, module, {})
            clock.now += 20
    assert [step for step, _ in log.figures] == [1]
    found = log.figures[0][1]
    assert found["throughput/samples_per_second"] == pytest.approx(4 * 2 * 2 / 13)
    assert found["throughput/visual_tokens_per_second"] == pytest.approx(4 * 2 * GRID.tokens * 2 / 13)
    assert found["throughput/data_wait_share"] == pytest.approx(0.75 / 13)
    assert found["throughput/tiles_mean"] == found["throughput/tiles_max"] == GRID.tiles
    assert found["throughput/slowest_rank_lag"] == 0
    assert 0.05 < found["throughput/peak_memory_gib"] < 100


def test_figures_over_processes_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(5, 9, generator=generator, dtype=torch.float64) + 0.1
    ranks[3, 6] = 4.0  # waits for its data
    found = figures(ranks)
    rows = ranks.tolist()
    longest = max(row[7] for row in rows)
    own = [row[6] + row[8] for row in rows]
    expected = {
        "samples_per_second": sum(row[0] for row in rows) / longest,
        "visual_tokens_per_second": sum(row[1] for row in rows) / longest,
        "data_wait_share": sum(row[6] / row[7] for row in rows) / 5,
        "data_wait_share_max": max(row[6] / row[7] for row in rows),
        "peak_memory_gib": max(row[5] for row in rows),
        "tiles_mean": sum(row[3] for row in rows) / sum(row[2] for row in rows),
        "tiles_max": max(row[4] for row in rows),
        "slowest_rank": 3,
        "slowest_rank_lag": max(own) / (sum(own) / 5) - 1,
    }
    assert found == pytest.approx(expected)
    assert figures(ranks[:1]).keys() == expected.keys() - {"data_wait_share_max", "slowest_rank", "slowest_rank_lag"}
    assert all(math.isfinite(value) for value in figures(torch.zeros(1, 9, dtype=torch.float64)).values())


def test_what_was_at_hand_when_a_run_broke_off(capsys: pytest.CaptureFixture[str]) -> None:
    grid = TileGrid(columns=2, rows=1, tokens_per_side=2, thumbnail=True)
    tiles = torch.zeros(3, 3, 8, 8, dtype=torch.uint8).numpy()
    batch = collate([Item(Conversation("key-7", (Turn("what is it", "red"),), tiles, grid), "charts", 7)])
    state, callback = trainer(global_rank=3, global_step=17), FailureReport()
    callback.on_exception(state, None, RuntimeError("before any batch"))
    callback.on_train_batch_start(state, None, batch, 0)
    callback.on_exception(state, None, KeyboardInterrupt())
    assert capsys.readouterr().err == ""
    record = "charts/key-7 (3 tiles, 12 visual tokens, 10 + 3 characters)"
    callback.on_exception(state, None, torch.OutOfMemoryError("CUDA out of memory"))
    assert capsys.readouterr().err == f"rank 3 ran out of memory at optimiser step 17 on {record}\n"
    callback.on_exception(state, None, RuntimeError("something else"))
    assert capsys.readouterr().err == f"rank 3 broke off at optimiser step 17 on {record}\n"
    callback.on_train_batch_end(state, None, None, batch, 0)
    callback.on_exception(state, None, RuntimeError("between batches"))
    assert capsys.readouterr().err == ""
