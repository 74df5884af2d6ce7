"""The benchmark of the pruned prefill: what it predicts is what runs, and its hook clock sees our hooks alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; it imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import prune_speed

    return prune_speed


def bench_of(benchmark, batch=1, layers=None):
    model = benchmark.build("tiny", layers, torch.float32, torch.device("cpu"))
    return benchmark.Bench(model, tiles=5, text=60, batch=batch, rows_too=True)


def counted(step) -> int:
    def attention(query, key, value, *rest, **options):
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_predicted_is_what_runs(benchmark, batch):
    bench = bench_of(benchmark, batch)
    assert list(bench.cases) == ["full", "5 %, L = 0", "5 %, short prompt", "5 %, L = 2", "FastV 5 %, L = 2",
                                 "20 %, L = 9", "FastV 20 %, L = 9"]  # fmt: skip
    for name, case in bench.cases.items():
        assert counted(partial(bench.run, case)) == case.flops, name
    # The short prompt is what pruning before the first layer leaves, without our package.
    assert bench.cases["5 %, L = 0"].flops == bench.cases["5 %, short prompt"].flops


def test_layers_below_a_budgets_are_the_last(benchmark):
    assert "20 %, L = 2" in bench_of(benchmark, layers=3).cases


def test_the_clock_of_hooks_runs_in_hooks_only(benchmark):
    bench = bench_of(benchmark, layers=3)
    case = bench.cases["5 %, L = 2"]
    bench.watch(case)
    layers, now = bench.model.model.language_model.layers, [0.0]

    def clock():
        now[0] += 0.001  # a look takes a millisecond, and nothing else any time but for what is slow
        return now[0]

    def take_long(*given):
        now[0] += 10.0

    bench._now = clock
    # Slow layers are no hooks of ours.
    handles = [layer.mlp.register_forward_hook(take_long) for layer in layers]
    bench.watch(case)
    for handle in handles:
        handle.remove()
    assert case.hooks[1] < 0.01
    pruner = case.pruner
    before_layer = pruner.before_layer

    def slowly(depth, state):
        take_long()
        return before_layer(depth, state)

    pruner.before_layer = slowly
    bench.watch(case)
    assert case.hooks[2] > 0.99
    assert all(0 < around < 1 for around in case.around)


def test_the_script_runs_on_a_tiny_shape(run_script, tmp_path):
    asked = ["--shape", "tiny", "--layers", 3, "--repeats", 2, "--threads", 1, "--rows"]
    printed = run_script(FOLDER / "prune_speed.py", *asked, "--json", tmp_path / "speed.json")
    (result,) = json.loads((tmp_path / "speed.json").read_text())
    cases = result["cases"]
    assert cases["full"]["ratio"] == cases["full"]["predicted"] == 1
    pruned = [one for one in cases.values() if one["hooks"] is not None]
    assert len(pruned) == 5 and all(0 < one["predicted"] < 1 for one in pruned)
    assert "time to FLOPs: at most" in printed
