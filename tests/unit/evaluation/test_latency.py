"""Timing: what is timed, how often, and that nothing stays on the model. No test needs anything to be fast."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from pgp_lightning.evaluation import latency
from pgp_lightning.evaluation.latency import (
    Load,
    PhaseTimes,
    Timing,
    measure,
    peak_memory,
    phase_times,
    sweep,
    table,
    take_turns,
)
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import KeepAll
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.internvl import InternVL
from tests.tiny import GRIDS, QUESTIONS, tiny_model, tiny_processor, tiny_request

SLOW = 0.05


class SlowGuide(Guide):
    """Ranks tokens by their place, and takes its time."""

    def forward(self, request):
        time.sleep(SLOW)
        widest = max(request.counts)
        place = torch.arange(widest, dtype=torch.float32).expand(len(request), -1)
        return place.masked_fill(place >= torch.tensor(request.counts)[:, None], -torch.inf)


@pytest.fixture
def vlm() -> InternVL:
    vlm = InternVL(tiny_model().eval(), tiny_processor(), "test")
    vlm.visual_tokens(tiny_request().tiles)  # transformers leaves hooks of its own on a model that has run
    return vlm


def slowed(module: nn.Module) -> None:
    module.register_forward_hook(lambda *given: time.sleep(SLOW))


def test_a_timing_is_median_and_range():
    assert Timing.of([3.0, 1.0, 2.0, 10.0]) == Timing(2.5, 1.0, 10.0)
    assert str(Timing(2.5, 1.0, 10.0)) == "2.5 s (1 to 10)"


def test_measure_counts_its_runs():
    runs: list[str] = []
    found = measure(lambda: runs.append("a"), repeats=3, warmup=2)
    assert len(runs) == 5 and 0 <= found.low <= found.median <= found.high
    runs.clear()
    seconds = take_turns({"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, repeats=2, warmup=1)
    assert "".join(runs) == "ababab" and {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}
    assert measure(lambda: time.sleep(SLOW), repeats=1, warmup=0).median >= SLOW


def test_a_device_is_waited_for_before_and_after(monkeypatch):
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    measure(lambda: waits.append("run"), repeats=1, warmup=0, device="cuda:0")
    assert waits == [torch.device("cuda:0"), "run", torch.device("cuda:0")]


def test_peak_memory_is_the_cuda_allocators(monkeypatch):
    calls: list[str] = []
    assert peak_memory(lambda: calls.append("run")) is None and calls == ["run"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_memory(lambda: calls.append("run"), "cuda") == 123
    assert calls == ["run", "reset", "run"]


def test_a_sweep_builds_each_batch_size():
    ran: list[int] = []
    loads = sweep(lambda rows: lambda: ran.append(rows), (1, 4), repeats=2, warmup=1)
    assert ran == [1] * 4 + [4] * 4  # the last of each for memory
    assert [load.rows for load in loads] == [1, 4] and loads[1].peak is None
    assert loads[1].throughput == pytest.approx(4 / loads[1].seconds.median)


def test_the_command_prints_a_row_for_each_batch_size(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["latency", "--sizes", "1", "2", "--repeats", "1", "--new-tokens", "2"])
    latency.main()
    head, line, *rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()
    ]
    assert head[0] == "rows" and head[-1] == "speed-up" and len(line) == len(head)
    assert [row[0] for row in rows] == ["1", "2"]
    for row in rows:
        found = dict(zip(head, row, strict=True))
        assert float(found["full, rows/s"]) > 0 and float(found["pruned, rows/s"]) > 0
        assert float(found["speed-up"].removesuffix("x")) > 0
        assert found["full, s"].endswith(")") and found["pruned, s"].endswith(")")


def test_the_table_says_what_the_loads_are():
    full, short = Load(4, Timing(2.0, 1.0, 3.0), 3 * 2**30), Load(4, Timing(0.5, 0.5, 1.0), 2**30)
    head, line, row = table([full], [short]).splitlines()
    assert row == "| 4 | 2 s (1 to 3) | 2 | 3.00 | 0.5 s (0.5 to 1) | 8 | 1.00 | 4.00x |"
    assert head.count("|") == line.count("|") == row.count("|")
    assert "GiB" in head
    assert "GiB" not in table([replace(full, peak=None)], [replace(short, peak=None)])


@pytest.mark.parametrize("slow", ["guide", "vision", "prefill and decode", ""])
def test_each_phase_has_its_own_time(vlm, slow):
    request = tiny_request(QUESTIONS[:2], GRIDS[:2])
    inputs = prompt_inputs(vlm, request)
    if slow == "vision":
        slowed(vlm.vision_tower)
    if slow == "prefill and decode":
        slowed(vlm.decoder)
    calls: list[object] = []
    vlm.decoder.register_forward_hook(lambda *given: calls.append(given[0]))
    hooks = hooks_of(vlm.model)
    guide = SlowGuide() if slow == "guide" else None
    pruner = KeepAll() if guide is None else Guided(guide, layer=1, keep_ratio=0.5)
    found = phase_times(vlm, inputs, pruner, request, new_tokens=3)
    assert isinstance(found, PhaseTimes) and found.peak is None
    assert 1 <= len(found.decode) == len(calls) - 1
    assert found.vision > 0 and found.prefill > 0
    assert found.guide + found.vision + found.prefill + sum(found.decode) <= found.total
    slept = {
        "guide": found.guide,
        "vision": found.vision,
        "prefill and decode": min([found.prefill, *found.decode]),
        "": SLOW,
    }
    assert slept[slow] >= SLOW
    assert hooks_of(vlm.model) == hooks


def test_hooks_go_when_the_run_fails(vlm, monkeypatch):
    request = tiny_request(QUESTIONS[:1], GRIDS[:1])
    hooks = hooks_of(vlm.model)

    def fail(*given, **rest):
        assert hooks_of(vlm.model) > hooks
        raise RuntimeError("no answer")

    monkeypatch.setattr(latency, "generate", fail)
    with pytest.raises(RuntimeError, match="no answer"):
        phase_times(vlm, prompt_inputs(vlm, request), KeepAll(), request)
    assert hooks_of(vlm.model) == hooks


def test_a_guide_that_is_the_answer_model_is_not_taken_for_it(vlm, monkeypatch):
    """Its runs before the answer belong to the guide; on a clock that stands still but for what is slow."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(latency, "_now", lambda device: sum(slept))

    class Same(SlowGuide):
        def forward(self, request):
            vlm.visual_tokens(request.tiles)
            return super().forward(request)

    request = tiny_request(QUESTIONS[:1], GRIDS[:1])
    slowed(vlm.vision_tower)
    found = phase_times(vlm, prompt_inputs(vlm, request), Guided(Same()), request, new_tokens=1)
    assert (found.guide, found.vision, found.total) == pytest.approx((2 * SLOW, SLOW, 3 * SLOW))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
