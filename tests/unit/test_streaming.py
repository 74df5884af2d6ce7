"""The benchmark of the data path: its variants do the same work, and what it counts is what the loader does."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.grouping import SlotEstimate
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.vlm.loading import load_processor

FOLDER = Path(__file__).parents[2] / "benchmarks"
SAMPLES = 64


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; it imports its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import streaming

    return streaming


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder in which the records are written once."""
    return tmp_path_factory.mktemp("records")


def bench_of(benchmark, folder):
    reader = ConversationReader(load_processor("embedded:guide"))
    return benchmark.Bench(benchmark.write_sources(folder, SAMPLES), reader, batch_size=2, workers=0, passes=1)


def test_the_script_measures_every_variant_on_the_same_pixels(benchmark, records, tmp_path, capsys):
    file = tmp_path / "streaming.json"
    command = ["--samples", str(SAMPLES), "--batch-size", "2", "--repeats", "1", "--workers", "0"]
    benchmark.main([*command, "--folder", str(records), "--json", str(file)])
    speed = json.loads(file.read_text())["speed"]
    loaders = {"ours", "ours, groups of 8", "webdataset"}
    assert {"files, plain reads", "files, tarfile", "decode and tile alone", "bare"} | loaders <= speed[
        "variants"
    ].keys()
    for variant in speed["variants"].values():
        assert variant["speed"] > 0 and variant["of_bare"] > 0 and len(variant["seconds"]) == 1
    assert speed["variants"]["files, plain reads"]["of_bare"] > 1
    # Every record's tiles, as the reader makes them.
    bench = bench_of(benchmark, records)
    expected = {
        r.key: benchmark.zlib.crc32(bench.reader(r).tiles.tobytes()) for r in benchmark.in_memory(bench.sources)
    }
    assert len(expected) == SAMPLES
    assert speed["checksum"] == benchmark.zlib.crc32(json.dumps(sorted(expected.items())).encode())
    printed = capsys.readouterr().out
    for name in ("litdata", "datasets"):
        assert (f"{name}: not installed, left out" in printed) != any(one.startswith(name) for one in speed["variants"])


def test_every_loader_is_measured_with_workers_too(benchmark, records):
    others = {"another": lambda workers: iter([range(workers)])}
    variants = benchmark.variants_of(bench_of(benchmark, records), others, 2)
    for name in ("bare", "ours", "ours, groups of 8", "another"):
        assert variants[name].limit == "bare" and variants[name].workers == 0
        assert variants[f"{name}, 2 workers"].limit == "bare, 2 workers" and variants[f"{name}, 2 workers"].workers == 2
    assert [list(variants[name].make()) for name in ("another", "another, 2 workers")] == [[range(0)], [range(2)]]


def test_a_variant_that_does_other_work_is_refused(benchmark, records):
    bench = bench_of(benchmark, records)
    coarse = replace(bench, reader=replace(bench.reader, max_tiles=1))
    bare = benchmark.variants_of(bench, {}, 0)["bare"]
    other = benchmark.variants_of(coarse, {}, 0)["ours"]
    with pytest.raises(SystemExit, match="other went through 64 records"):
        benchmark.check_same({"bare": bare, "other": other}, SAMPLES)
    short = benchmark.Variant(lambda: [range(SAMPLES - 1)])
    with pytest.raises(SystemExit, match="short went through 63"):
        benchmark.check_same({"bare": bare, "short": short}, SAMPLES)


def test_the_clock_runs_between_the_edges_of_a_pass(benchmark, monkeypatch):
    now = [0.0]

    def pieces():
        for number in range(100):
            # Workers start before the first piece and stop after the last ones.
            now[0] += 50 if number == 0 or number > 95 else 1
            yield range(2)

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    variant = benchmark.Variant(pieces, workers=2)
    benchmark.time_pass(variant, 200)
    assert variant.seconds == [0.5] and variant.speeds == [1.0]


def test_variants_without_workers_are_timed_by_turns_and_each_by_its_own_pieces(benchmark, monkeypatch):
    now, order = [0.0], []

    def pieces(name, seconds, start):
        now[0] += start  # what comes before the first piece is in the edge that is left out
        for _ in range(80):
            now[0] += seconds
            order.append(name)
            yield range(4)

    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(benchmark.time, clock, lambda: now[0])
    slow, fast = (benchmark.Variant(lambda each=each: pieces(*each)) for each in (("slow", 8, 99), ("fast", 2, 77)))
    benchmark.time_in_turns([slow, fast], 320, benchmark.random.Random(0))
    assert slow.seconds == slow.processor == [2.0] and fast.seconds == fast.processor == [0.5]
    assert slow.receiving == fast.receiving == [0.0]
    assert order.count("slow") == order.count("fast") == 80
    runs = [len(list(run)) for _, run in itertools.groupby(order)]
    assert max(runs) == 8 and len(runs) > 20  # pieces of 16 records, of one or of two turns in a row


def test_shares_are_taken_turn_by_turn(benchmark):
    one, other = (benchmark.Variant(list, workers=2, seconds=list(s)) for s in ((1, 8, 30), (2, 4, 90)))
    one.processor, other.processor = [1.0, 0.0, 2.0], [1.0, 1.0, 8.0]
    assert benchmark.ratio({"a": one, "b": other}, "a", "b") == (2.0, 4.0)


@pytest.mark.parametrize("group", [1, 8])
def test_padding_is_that_of_the_loaders_batches(benchmark, records, group):
    import streaming_sections as sections

    bench = bench_of(benchmark, records)
    shards, lengths = ShardReader(32), {}
    for source in bench.sources:
        for shard in source.shards:
            for number in range(shard.samples):
                text = shards.read_text(shard, number)
                lengths[shard.path, number] = (
                    sections.length(bench.reader, text),
                    SlotEstimate(bench.reader)(text, lambda: (1, 1)),
                )
    mixture = benchmark.mix(bench.sources, 4, group)
    found = list(sections.lengths_of_batches(mixture, lengths))
    seen = []
    for batch in TrainingLoader(mixture, bench.reader, mixture.batches_per_epoch):
        request = batch.request
        rows = zip(request.questions, batch.answers, request.counts, request.systems, strict=True)
        seen.append([bench.reader.processor.prompt_length(*row) for row in rows])
    assert sorted(found) == sorted(seen)
    slots = [pad_sequence([torch.ones(length) for length in rows]) for rows in seen]
    empty = sum(int((batch == 0).sum()) for batch in slots)
    assert sections.padding(found) == pytest.approx(empty / sum(batch.numel() for batch in slots))


def test_the_slope_is_of_least_squares(benchmark):
    import streaming_sections as sections

    generator = np.random.default_rng(0)
    x = list(generator.uniform(0, 1e4, 50))
    y = [3.5 * one + 1e8 + float(generator.normal()) for one in x]
    assert sections.slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_processor_seconds_and_processes_are_of_children_too(benchmark):
    import streaming_sections as sections

    before = sections.processor_seconds(sections.processes())
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", spin], **pipes) as child:
        child.stdout.readline()
        mine = sections.processes()
        assert {os.getpid(), child.pid} <= set(mine)
        assert sections.processor_seconds(mine) - before >= 0.25
        assert sections.resident([child.pid]) > 2**20
        child.communicate(b"\n")
    assert sections.resident([child.pid]) == 0
