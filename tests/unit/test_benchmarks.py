"""The benchmark of the training step: its baselines compute what the guide computes, and its counts are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; it imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import two_pass_step

    return two_pass_step


def small_guide(benchmark, seed=0, **options):
    """InternVL2.5-1B with everything reduced that its closed forms take from the configuration."""
    config = benchmark.internvl2_5_1b()
    config.vision_config.image_size, config.vision_config.hidden_size = (56, 56), 48
    config.vision_config.num_attention_heads, config.vision_config.intermediate_size = 3, 80
    config.vision_config.num_hidden_layers, config.image_seq_length = 2, 4
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 56, 7, 1
    text.intermediate_size, text.vocab_size, text.num_hidden_layers = 72, 100, 3
    text.layer_types = text.layer_types[:3]
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    guide = benchmark.build_guide(model, "1b", **options)
    rule = benchmark.replace(guide.vlm.processor.rule, tile_size=56, tokens_per_side=2)
    guide.vlm.processor = benchmark.replace(guide.vlm.processor, rule=rule)
    for name, parameter in guide.named_parameters():
        if "lora_B" in name:  # starts at 0, where A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return guide


def bench_of(benchmark, guide, tiles=3):
    return benchmark.Bench(guide, benchmark.build_sample(guide, "1b", tiles, torch.device("cpu")))


def gradients(bench, variant):
    bench.prepare(variant)
    torch.manual_seed(1)
    loss = bench.step(variant)()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in bench.guide.named_parameters() if p.requires_grad}


def test_the_baselines_take_the_same_step(benchmark):
    bench = bench_of(benchmark, small_guide(benchmark, lora_dropout=0.0))
    loss, expected = gradients(bench, "ours")
    for variant in ("a", "b", "checkpointed"):
        other, found = gradients(bench, variant)
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tiles", [pytest.param(1, marks=pytest.mark.full), 3])
def test_closed_forms_equal_torchs_counter(benchmark, tiles):
    bench = bench_of(benchmark, small_guide(benchmark), tiles)
    for variant in benchmark.VARIANTS:
        looked = bench.look(variant)
        assert looked.flops == looked.counted
        # Shapes are all it takes.
        dry = bench.dry().look(variant)
        assert (dry.counted, dry.start_bytes, dry.peak_bytes) == (looked.counted, looked.start_bytes, looked.peak_bytes)


def test_gradient_checkpointing_of_the_guide_saves_memory_and_changes_no_gradient(benchmark):
    peaks, found = [], []
    for checkpointing in (False, True):
        guide = small_guide(benchmark, gradient_checkpointing=checkpointing)
        assert guide.arguments["base"] == "1b, random weights"
        sample = benchmark.build_sample(guide, "1b", 9, torch.device("cpu"))
        torch.manual_seed(1)
        with benchmark.LiveBytes(guide) as tally:
            benchmark.ours(guide, sample).backward()
        peaks.append(tally.peak - tally.start)
        found.append({name: p.grad for name, p in guide.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert peaks[1] < 0.7 * peaks[0]


def test_live_bytes_counts_storages_once_and_while_they_live(benchmark):
    layer = nn.Linear(8, 8, bias=False)
    with benchmark.LiveBytes(layer) as tally:
        assert tally.start == 8 * 8 * 4
        a = torch.zeros(1000, dtype=torch.float64)
        b = a[10:].view(-1, 10).T
        assert tally.bytes == tally.start + 8000
        c = (b + 1) * 2
        assert tally.bytes == tally.start + 8000 + 7920
        assert tally.peak == tally.start + 8000 + 2 * 7920
        del a, c
        assert tally.bytes == tally.start + 8000
        del b
        assert tally.bytes == tally.start


def test_live_bytes_sees_what_the_graph_keeps(benchmark):
    x = torch.zeros(1000, requires_grad=True)
    with benchmark.LiveBytes() as tally:
        y = x.exp().sin().sum()  # both intermediates are saved: exp's result, sine's argument, are one
        assert tally.bytes == 4000 + 4
        y.backward()
        del y
        assert tally.bytes == 4000  # the gradient


@pytest.mark.full
def test_the_script_runs_at_embedded_size(run_script, tmp_path):
    asked = ["--size", "embedded", "--tiles", 1, "--repeats", 1, "--threads", 1]
    printed = run_script(FOLDER / "two_pass_step.py", *asked, "--json", tmp_path / "step.json")
    (result,) = json.loads((tmp_path / "step.json").read_text())
    assert result["ratios"]["a"]["flops"] > 1 and result["ratios"]["b"]["flops"] > result["ratios"]["a"]["flops"]
    assert "matmul peak" in printed
