"""Loaders: one order for every topology, exact resume, and honest accounts of what cannot be used."""

from __future__ import annotations

import platform
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_world import SIZES, PictureBuilder, stream_source
from topologies import READER, simulated, stream, summary

from pgp_lightning.data.loader import EvaluationLoader, TrainingLoader
from pgp_lightning.data.mixture import Mixture, StreamSource
from pgp_lightning.data.rejects import RejectTally
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError, DataError


def mixture_of(sources: tuple[StreamSource, ...], **changes: Any) -> Mixture:
    """Return a mixture of 4 lanes and 2 records a batch: 16 batches an epoch."""
    return Mixture(sources, **{"seed": 7, "lanes": 4, "batch_size": 2, "window": 8, **changes})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> StreamSource:
    """A source of 40 records, five of which cannot be used."""
    folder = tmp_path_factory.mktemp("broken") / "broken"
    write_source(folder, PictureBuilder("broken", 40, broken=(3, 4, 5, 20, 39)), 11, progress=False)
    return stream_source(folder, allowed_rejects=0.5)


@pytest.mark.parametrize("bad", [False, True])
def test_every_topology_delivers_the_same_batches(
    sources: tuple[StreamSource, ...], broken: StreamSource, monkeypatch: pytest.MonkeyPatch, bad: bool
) -> None:
    mixture = mixture_of((*sources, broken) if bad else sources)
    expected = stream(mixture, 1, 0)
    assert list(expected) == list(range(40))
    assert [index for number in range(40) for index in expected[number][1]] == list(range(80))
    assert stream(mixture, 2, 0) == stream(mixture, 4, 0) == expected
    for ranks, workers in ((2, 2), (1, 4), (4, 1), (1, 2)):
        for first in (0, 4, 20):
            found = simulated(mixture, ranks, workers, first, 40, monkeypatch)
            assert found == {number: batch for number, batch in expected.items() if number >= first}


def test_worker_processes_deliver_the_same_batches(sources: tuple[StreamSource, ...]) -> None:
    mixture = mixture_of(sources)
    assert stream(mixture, 1, 2, first=3, stop=20) == stream(mixture, 1, 0, first=3, stop=20)


def test_resuming_anywhere_is_the_undisturbed_stream(sources: tuple[StreamSource, ...], broken: StreamSource) -> None:
    mixture = mixture_of((*sources, broken))
    expected = stream(mixture, 1, 0, stop=60)
    generator = random.Random(0)
    for _ in range(12):  # stop at random places, each time on another number of ranks
        first = 4 * generator.randrange(1, 15)
        ranks = generator.choice((1, 2, 4))
        found = stream(mixture, ranks, 0, first, 60)
        assert found == {number: batch for number, batch in expected.items() if number >= first}


def test_state_is_what_was_consumed(sources: tuple[StreamSource, ...]) -> None:
    expected = stream(mixture_of(sources), 1, 0)
    processed = 0
    loader = TrainingLoader(mixture_of(sources), READER, 40, processed=lambda: processed)
    for number, _ in enumerate(loader):
        assert loader.state_dict()["global_batches"] == number  # delivered, but training has not finished with it
        processed = number + 1
        assert loader.state_dict()["global_batches"] == number + 1
        if number == 16:
            break
    again = TrainingLoader(mixture_of(sources), READER, 40)
    again.load_state_dict(loader.state_dict())
    assert [summary(batch) for batch in again] == [expected[number] for number in range(17, 40)]
    # The stream does not begin again when a loader is iterated twice.
    twice = TrainingLoader(mixture_of(sources), READER, 20)
    assert [summary(batch) for _ in range(2) for batch in twice] == list(expected.values())
    assert len(twice) == 20


@pytest.mark.parametrize("repeat", [2, 6, 20])  # within a round of the lanes, beyond one, and beyond an epoch
def test_the_first_batches_come_over_and_over(
    sources: tuple[StreamSource, ...], monkeypatch: pytest.MonkeyPatch, repeat: int
) -> None:
    mixture = mixture_of(sources)
    once, expected = stream(mixture, 1, 0), stream(mixture, 1, 0, repeat=repeat)
    for number, (keys, indices, epoch, rejected, pixels) in expected.items():
        assert (keys, epoch, rejected, pixels) == (once[number % repeat][0], *once[number % repeat][2:])
        assert indices == once[number][1]  # whose noise is new each time
    assert stream(mixture, 2, 0, repeat=repeat) == expected
    for ranks, workers, first in ((1, 2, 0), (1, 4, 12), (2, 2, 4)):
        found = simulated(mixture, ranks, workers, first, 40, monkeypatch, repeat=repeat)
        assert found == {number: batch for number, batch in expected.items() if number >= first}
    state = TrainingLoader(mixture, READER, 40, repeat=repeat).state_dict()
    for other in (None, 2 * repeat):  # the same number of each of twice as many processes is another one
        with pytest.raises(ConfigError, match=f": overfit_batches x processes was {repeat} and is {other}. Re"):
            TrainingLoader(mixture, READER, 40, repeat=other).load_state_dict(state)
    del state["identity"]["overfit_batches x processes"]  # as before there was such a thing
    TrainingLoader(mixture, READER, 40).load_state_dict(state)
    with pytest.raises(ConfigError, match=f"overfit_batches x processes was None and is {repeat}"):
        TrainingLoader(mixture, READER, 40, repeat=repeat).load_state_dict(state)


def test_an_unusable_record_that_comes_over_and_over_counts_once(tmp_path: Path) -> None:
    write_source(tmp_path / "flawed", PictureBuilder("flawed", 100, broken=(0,)), 50, progress=False)
    mixture = mixture_of((stream_source(tmp_path / "flawed", allowed_rejects=0.01),))  # a manifest's default
    expected = stream(mixture, 1, 0, stop=120, repeat=2)
    assert sum(len(batch[0]) for batch in expected.values()) == 240
    assert all("flawed-0000" not in batch[0] for batch in expected.values())
    assert {number: batch[3] for number, batch in expected.items() if batch[3]} == {0: {"flawed/bad-image": 1}}
    assert stream(mixture, 2, 0, stop=120, repeat=2) == expected
    assert stream(mixture, 1, 0, 60, 120, repeat=2) == {n: expected[n] for n in range(60, 120)}  # a resumed run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"lanes": 8}, "lanes was 4 and is 8"),
        ({"batch_size": 1}, "batch_size was 2 and is 1"),
        ({"window": 9}, "window was 8 and is 9"),
    ],
)
def test_another_order_is_refused(sources: tuple[StreamSource, ...], change: dict[str, int], message: str) -> None:
    state = TrainingLoader(mixture_of(sources), READER, 40).state_dict()
    with pytest.raises(ConfigError, match=message):
        TrainingLoader(mixture_of(sources, **change), READER, 40).load_state_dict(state)


def test_other_data_turns_or_ranks_are_refused(sources: tuple[StreamSource, ...]) -> None:
    state = TrainingLoader(mixture_of(sources), READER, 40).state_dict()
    repeated = (replace(sources[0], repeat=2.0), *sources[1:])
    with pytest.raises(ConfigError, match="manifest was"):
        TrainingLoader(mixture_of(repeated), READER, 40).load_state_dict(state)
    with pytest.raises(ConfigError, match="turns was 'first' and is 'all'"):
        TrainingLoader(mixture_of(sources), replace(READER, turns="all"), 40).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"6 micro-batches do not divide by 4 ranks: use one of \[1, 2\]"):
        TrainingLoader(mixture_of(sources), READER, 40, ranks=4).load_state_dict({**state, "global_batches": 6})
    with pytest.raises(ConfigError, match="4 lanes cannot be dealt to 1 ranks x 3 workers"):
        TrainingLoader(mixture_of(sources), READER, 40, workers=3)


def test_unusable_records_are_counted_once_and_replaced_by_the_same_source(broken: StreamSource) -> None:
    mixture = Mixture((broken,), lanes=2, batch_size=2, window=5)
    rejected: Counter[str] = Counter()
    keys = []
    for batch in TrainingLoader(mixture, READER, mixture.batches_per_epoch):
        assert len(batch) == 2
        rejected.update(batch.rejected)
        keys += batch.keys
    assert rejected == {"broken/bad-image": 5}
    assert len(keys) == 40 and len(set(keys)) == 35
    assert not {"broken-0003", "broken-0004", "broken-0005", "broken-0020", "broken-0039"} & set(keys)


def test_too_many_unusable_records_stop_a_run(broken: StreamSource) -> None:
    def run(share: float, workers: int = 0) -> None:
        mixture = Mixture((replace(broken, allowed_rejects=share),), lanes=2, batch_size=2)
        for _ in TrainingLoader(mixture, READER, mixture.batches_per_epoch, workers=workers):
            pass

    run(0.125)
    with pytest.raises(DataError, match=r"'broken' in .*broken: \d+ of \d+ .* allowed are 10.0%: bad-image 5. Repair"):
        run(0.1)
    with pytest.raises(DataError, match=r"allowed are 0\.0%: bad-image [12]\. Repair"):
        run(0.0)


def test_a_source_of_which_nothing_can_be_used(tmp_path: Path) -> None:
    write_source(tmp_path / "all", PictureBuilder("all", 30, broken=tuple(range(30))), progress=False)
    mixture = Mixture((stream_source(tmp_path / "all", allowed_rejects=1.0),), lanes=2, batch_size=2)
    with pytest.raises(DataError, match=r"'all' in .*: none of 30 records in a row can be used: bad-image 30"):
        next(iter(TrainingLoader(mixture, READER, 10)))


def test_a_search_for_a_usable_record_ends(tmp_path: Path) -> None:
    write_source(tmp_path / "all", PictureBuilder("all", 1001, broken=tuple(range(1001))), progress=False)
    mixture = Mixture((stream_source(tmp_path / "all", allowed_rejects=1.0),), lanes=1, batch_size=1)
    with pytest.raises(DataError, match=r"'all' in .*: none of 1000 records in a row can be used: bad-image 1000 "):
        next(iter(TrainingLoader(mixture, READER, 10)))


def test_the_tally_allows_for_bad_luck_but_not_for_bad_data(sources: tuple[StreamSource, ...]) -> None:
    shard = replace(sources[0].shards[0], samples=100_000)
    source = StreamSource("s", (shard,), allowed_rejects=0.01)
    tally = RejectTally((source,))
    tally.add(Counter(s=99), {"s/no-image": 50})  # half of them, but too few to judge by
    with pytest.raises(DataError, match="50 of 100 records"):
        tally.add(Counter(s=1), {"s/too-long": 0})
    tally = RejectTally((source,))
    tally.add(Counter(s=1000), {"s/no-image": 15})  # 10 expected, 19 is three standard deviations more
    with pytest.raises(DataError, match=r"20 of 1000 records \(2.0%\) .*: no-image 15, too-long 5"):
        tally.add(Counter(), {"s/too-long": 5})


def test_damaged_shards_are_named_even_from_a_worker(tmp_path: Path) -> None:
    write_source(tmp_path / "a", PictureBuilder("a", 12), 6, progress=False)
    mixture = Mixture((stream_source(tmp_path / "a"),), lanes=2, batch_size=2)
    shard = tmp_path / "a" / "a-00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    damage = r"^.*a-00001.tar has 3000 bytes, index.json promises \d+: copy it again"
    with pytest.raises(DataError, match=damage) as caught:
        list(TrainingLoader(mixture, READER, 6, workers=1))
    assert "Traceback" not in str(caught.value)
    shard.unlink()
    with pytest.raises(DataError, match=r"a-00001.tar is missing"):
        list(TrainingLoader(mixture, READER, 6))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 200])
def test_evaluation_sees_every_record_once_in_order(
    sources: tuple[StreamSource, ...], ranks: int, batch_size: int
) -> None:
    loaders = [EvaluationLoader(sources, READER, batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    found = [list(loader) for loader in loaders]
    merged = [batch for step in zip(*found, strict=True) for batch in step]
    keys = [key for batch in merged for key in batch.keys]
    assert keys == [f"{name}-{number:04d}" for name, size in SIZES.items() for number in range(size)]
    assert [index for batch in merged for index in batch.indices] == list(range(sum(SIZES.values())))
    assert max(map(len, merged)) - min(map(len, merged)) <= 1 and max(map(len, merged)) <= batch_size + 1
    assert [batch.keys for batch in loaders[0]] == [batch.keys for batch in found[0]]  # and again


def test_evaluation_with_workers_and_a_limit(sources: tuple[StreamSource, ...]) -> None:
    limited = list(EvaluationLoader(sources, READER, 8, limit=30))
    names = Counter(name for batch in limited for name in batch.sources)
    assert sum(names.values()) == 30 and names == {"large": 22, "middle": 7, "small": 1}
    assert limited[-1].keys[-1] == "small-0000" and limited[-1].indices[-1] == 97 + 31
    workers = list(EvaluationLoader(sources, READER, 8, limit=30, workers=2))
    for one, other in zip(limited, workers, strict=True):
        assert summary(one) == summary(other)
        assert torch.equal(one.request.tiles, other.request.tiles)
    assert sum(len(batch) for batch in EvaluationLoader(sources, READER, 8, limit=10_000)) == 133
    with pytest.raises(ConfigError, match="1 evaluation records cannot be split over 2 ranks"):
        EvaluationLoader(sources, READER, 8, ranks=2, limit=1)


def test_evaluation_leaves_out_what_cannot_be_used(broken: StreamSource) -> None:
    batches = list(EvaluationLoader((broken,), READER, 3))
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == 35
    assert sum((Counter(batch.rejected) for batch in batches), Counter()) == {"broken/bad-image": 5}
    assert sum(len(batch) for batch in EvaluationLoader((broken,), READER, 1)) == 35
    with pytest.raises(DataError, match="no record of an evaluation batch can be used"):
        list(EvaluationLoader((broken,), READER, 1, rank=0, ranks=2))
    # Rejects were seen all the same, beside others (batches of two or three records) and alone.
    for batch_size, words in ((3, r"3 of 8 records \(37\.5%\)"), (1, r"3 of 6 records \(50\.0%\)")):
        with pytest.raises(DataError, match=rf"{words} cannot be used, allowed are 5\.0%: bad-image 3\."):
            list(EvaluationLoader((replace(broken, allowed_rejects=0.05),), READER, batch_size))


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_a_worker_keeps_the_memory_it_frees() -> None:
    code = """
import resource, sys
import numpy as np
from pgp_lightning.data.loader import _keep_freed_memory
if sys.argv[1] == "keep":
    _keep_freed_memory()
def work():
    buffers = [np.ones(size << 20, dtype=np.uint8) for size in (1, 2, 3, 3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", code, way], capture_output=True, check=True, text=True).stdout)
        for way in ("keep", "leave")
    }
    assert faults["keep"] < 200 and faults["leave"] > 10 * faults["keep"], faults
