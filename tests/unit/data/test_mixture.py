"""The order: what it is a function of, and what it promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pgp_lightning.data.index import Shard
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder, StreamSource, check_topology
from pgp_lightning.errors import ConfigError


def source(name: str, sizes: list[int], repeat: float = 1.0) -> StreamSource:
    """Return a source of which only the numbers matter."""
    return StreamSource(name, tuple(Shard(Path(f"{name}-{i}.tar"), n, 0, "") for i, n in enumerate(sizes)), repeat)


def epoch_of(mixture: Mixture, epoch: int) -> list[tuple[str, Path, int]]:
    """Return the records of an epoch, lane after lane."""
    orders = [SourceOrder(s, mixture.seed, number) for number, s in enumerate(mixture.sources)]
    plan, found = EpochPlan(mixture, epoch), []
    for number in range(mixture.lanes):
        lane = Lane(plan, number)
        for _ in range(int(plan.counts[number].sum())):
            which, candidates = lane.take()
            shard, record = orders[which].locate(next(candidates))
            found.append((mixture.sources[which].name, shard.path, record))
    return found


def test_a_pass_is_a_permutation_and_every_pass_another() -> None:
    order = SourceOrder(source("a", [5, 1, 9]), seed=3, number=0)
    passes = [[order.locate(15 * lap + i) for i in range(15)] for lap in range(3)]
    everything = {(shard.path.name, record) for shard in order.source.shards for record in range(shard.samples)}
    for one in passes:
        assert len(one) == 15 and {(shard.path.name, record) for shard, record in one} == everything
        # One shard after the other: a reader has one open at a time.
        names = [shard.path.name for shard, _ in one]
        assert sum(a != b for a, b in pairwise(names)) == 2
    assert passes[0] != passes[1] != passes[2]
    assert all(0 <= record < shard.samples for one in passes for shard, record in one)


@pytest.mark.parametrize("sizes", [([40, 40, 17], [31], [5]), ([64], [64], [64]), ([1] * 50, [1], [30, 2])])
@pytest.mark.parametrize(("lanes", "batch_size", "window"), [(4, 3, 7), (1, 1, 1000), (8, 2, 1)])
def test_every_record_once_per_epoch_but_for_the_remainder(
    sizes: tuple[list[int], ...], lanes: int, batch_size: int, window: int
) -> None:
    sources = tuple(source(f"s{number}", shards) for number, shards in enumerate(sizes))
    mixture = Mixture(sources, 5, lanes, batch_size, window)
    total = sum(map(sum, sizes))
    seen: Counter[tuple[str, Path, int]] = Counter()
    for epoch in range(4):
        records = epoch_of(mixture, epoch)
        assert (
            len(records) == total // (lanes * batch_size) * lanes * batch_size == mixture.batches_per_epoch * batch_size
        )
        if epoch == 0:
            assert max(Counter(records).values()) == 1 and total - len(records) < lanes * batch_size
        seen.update(records)
        for one in sources:  # what an epoch left over opens the next one: nothing falls behind
            counts = [seen[one.name, shard.path, i] for shard in one.shards for i in range(shard.samples)]
            assert max(counts) - min(counts) <= 1
        shares = Counter(name for name, *_ in records)
        for one in sources:
            assert abs(shares[one.name] - len(records) * one.samples / total) < 1


def test_repeat_means_passes_per_epoch() -> None:
    mixture = Mixture(
        (source("half", [40], 0.5), source("twice", [10, 10], 2.0), source("once", [20])), lanes=4, batch_size=5
    )
    for epoch in range(2):
        seen = Counter(epoch_of(mixture, epoch))
        per_source = {one.name: [n for key, n in seen.items() if key[0] == one.name] for one in mixture.sources}
        assert per_source == {"half": [1] * 20, "twice": [2] * 20, "once": [1] * 20}
    both = Counter(epoch_of(mixture, 0) + epoch_of(mixture, 1))
    assert [n for key, n in both.items() if key[0] == "half"] == [1] * 40


def test_the_order_depends_on_seed_epoch_and_window_alone() -> None:
    mixture = Mixture((source("a", [50, 50]), source("b", [28])), seed=1, lanes=8, batch_size=2, window=10)
    assert epoch_of(mixture, 0) == epoch_of(replace(mixture), 0)
    others = [epoch_of(mixture, 1), *(epoch_of(replace(mixture, **{k: 4}), 0) for k in ("seed", "window"))]
    for other in others:
        assert other != epoch_of(mixture, 0)


def test_sources_are_mixed_record_by_record() -> None:
    mixture = Mixture((source("a", [500]), source("b", [500])), lanes=1, batch_size=1, window=10)
    names = [name for name, *_ in epoch_of(mixture, 0)]
    changes = sum(a != b for a, b in pairwise(names))
    assert 400 < changes < 600


def test_a_lane_can_begin_anywhere() -> None:
    mixture = Mixture((source("a", [40, 31]), source("b", [9])), seed=2, lanes=2, batch_size=1, window=6)
    plan = EpochPlan(mixture, 1)

    def rest(first: int) -> list[tuple[int, list[int]]]:
        lane = Lane(plan, 1, first)
        return [(which, list(positions)) for which, positions in (lane.take() for _ in range(40 - first))]

    whole = rest(0)
    for first in range(40):
        assert rest(first) == whole[first:]


def test_substitutes_are_the_window_and_then_the_rest_of_the_source() -> None:
    mixture = Mixture((source("a", [60]),), lanes=1, batch_size=1, window=20)
    lane = Lane(EpochPlan(mixture, 0), 0)
    windows = [list(lane.take()[1]) for _ in range(60)]
    for number, candidates in enumerate(windows):
        low = number // 20 * 20
        assert sorted(candidates[:20]) == list(range(low, low + 20))
        assert candidates[20:] == list(range(low + 20, low + 60))
    assert sorted(candidates[0] for candidates in windows) == list(range(60))


def test_lanes_share_out_exactly_what_an_epoch_takes() -> None:
    mixture = Mixture(tuple(source(f"s{i}", [n]) for i, n in enumerate([997, 31, 5])), lanes=16, batch_size=4)
    plan = EpochPlan(mixture, 3)
    assert plan.counts.sum(axis=0).tolist() == list(mixture.takes)
    assert set(plan.counts.sum(axis=1)) == {sum(mixture.takes) // 16}
    assert np.array_equal(plan.offsets + plan.counts, np.cumsum(plan.counts, axis=0))


def test_settings_that_cannot_work() -> None:
    with pytest.raises(
        ConfigError, match=r"epoch of 30 records is less than one round .* 64 x 4: set lanes to 4 or less"
    ):
        Mixture((source("a", [30]),), lanes=64, batch_size=4)
    for name in ("lanes", "batch_size", "window"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            Mixture((source("a", [30]),), **{"lanes": 1, name: 0})


def test_topologies() -> None:
    for ranks, workers in ((1, 0), (1, 4), (4, 1), (8, 8), (64, 0)):
        check_topology(64, ranks, workers)
    with pytest.raises(
        ConfigError, match=r"64 lanes cannot be dealt to 4 ranks x 3 workers: set workers to one of \[1, 2, 4"
    ):
        check_topology(64, 4, 3)
    with pytest.raises(
        ConfigError, match=r"3 ranks x 2 workers: use a number of ranks that divides .* lanes to 60 or 66"
    ):
        check_topology(64, 3, 2)
