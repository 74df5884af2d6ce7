"""Shares of the sources over an epoch and over any stretch, and the order that older checkpoints go on with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_world import PictureBuilder, WordProcessor, global_order, plain_source, stream_source
from hypothesis import given, settings
from hypothesis import strategies as st

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.loader import FORMERLY, TrainingLoader
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder, StreamSource
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError

# The mixture of InternVL's fine-tuning, scaled down by 40.
REAL = (102_025, 157_712, 665_058, 200_000, 18_317, 12_413, 10_211, 72_318, 29_765)
SKEWED = tuple(size // 40 for size in REAL)


def golden() -> dict[str, Any]:
    """Return what the code gave before there were weights, mixing and groups."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "order.json").read_text())
    return content


def test_the_order_of_older_checkpoints_has_not_changed() -> None:
    expected = golden()
    sources = (plain_source("a", [40, 40, 17]), plain_source("b", [31]), plain_source("c", [5], 2.0))
    mixture = Mixture(sources, seed=7, lanes=4, batch_size=3, window=8)
    orders = [SourceOrder(one, 7, number) for number, one in enumerate(sources)]
    found: list[list[str]] = []
    lanes: dict[tuple[int, int], Lane] = {}
    for batch in range(67):
        epoch, within = divmod(batch, mixture.batches_per_epoch)
        place = epoch, within % 4
        lane = lanes.setdefault(place, Lane(EpochPlan(mixture, epoch), place[1]))
        for _ in range(3):
            which, candidates = lane.take()
            due = next(candidates)
            pair = [orders[which].locate(position) for position in (due, next(candidates, due))]
            found.append([f"{shard.path.stem}:{record}" for shard, record in pair])
    assert [due for due, _ in found[:200]] == expected["records"]
    assert [other for _, other in found[:200]] == expected["first_substitutes"]
    assert list(mixture.takes) == expected["takes"]


def test_a_checkpoint_from_before_goes_on(sources: tuple[StreamSource, ...], tmp_path: Path) -> None:
    write_source(tmp_path / "broken", PictureBuilder("broken", 40, broken=(3, 4, 5, 20, 39)), 11, progress=False)
    broken = stream_source(tmp_path / "broken", allowed_rejects=0.5)
    mixture = Mixture((*sources, broken), seed=7, lanes=4, batch_size=2, window=8)
    loader = TrainingLoader(mixture, ConversationReader(WordProcessor()), 100)
    state = loader.state_dict()
    for key in FORMERLY:  # settings that it does not know
        del state["identity"][key]
    loader.load_state_dict({**state, "global_batches": 40})
    keys = [key for batch in loader for key in batch.keys]
    assert keys == golden()["loader_keys"][80:]
    for change in ({"weights": "sqrt"}, {"mixing": "even"}, {"group_batches": 2}):
        name, value = next(iter(change.items()))
        other = TrainingLoader(replace(mixture, **change), ConversationReader(WordProcessor()), 100)
        with pytest.raises(ConfigError, match=f"{name} was .* and is {value!r}"):
            other.load_state_dict(state)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 5000), min_size=1, max_size=9),
    repeats=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=9, max_size=9),
    weights=st.sampled_from(["count", "sqrt", "explicit"]),
    batch_size=st.integers(1, 4),
)
def test_shares_of_an_epoch_are_exact(sizes: list[int], repeats: list[float], weights: Any, batch_size: int) -> None:
    sources = tuple(
        replace(plain_source(f"s{number}", [size], repeats[number]), weight=1.0 + number)
        for number, size in enumerate(sizes)
    )
    mixture = Mixture(sources, lanes=4, batch_size=batch_size, weights=weights)
    lengths = [round(one.repeat * one.samples) for one in sources]
    parts = {
        "count": lengths,
        "sqrt": [one.repeat * one.samples**0.5 for one in sources],
        "explicit": [1.0 + number for number in range(len(sources))],
    }[weights]
    total = sum(lengths) // (4 * batch_size) * 4 * batch_size
    assert sum(mixture.takes) == total  # the epoch is as long as ever
    for take, part in zip(mixture.takes, parts, strict=True):
        assert abs(take - total * part / sum(parts)) < 1


@pytest.mark.parametrize("weights", ["count", "sqrt"])
def test_any_2000_records_have_the_shares(weights: Any) -> None:
    sources = tuple(plain_source(f"s{number}", [size]) for number, size in enumerate(SKEWED))
    mixture = Mixture(sources, seed=1, lanes=64, batch_size=4, weights=weights, mixing="even")
    parts = np.sqrt(SKEWED) if weights == "sqrt" else np.array(SKEWED)
    order = np.concatenate([global_order(mixture, epoch) for epoch in range(2)])  # and across an epoch's end
    worst = 0.0
    for number, share in enumerate(parts / parts.sum()):
        seen = np.concatenate([[0], np.cumsum(order == number)])
        worst = max(worst, float(np.abs((seen[2000:] - seen[:-2000]) / 2000 - share).max()))
    print(f"{weights}: the worst of {len(order) - 1999} stretches is off by {worst:.2%}")
    assert worst < 0.01


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    lanes=st.sampled_from([1, 4, 16]),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_even_mixing_is_off_by_less_than_its_bound(sizes: list[int], lanes: int, batch_size: int, seed: int) -> None:
    sizes[0] += lanes * batch_size  # at least one round
    sources = tuple(plain_source(f"s{number}", [size]) for number, size in enumerate(sizes))
    mixture = Mixture(sources, seed, lanes, batch_size, mixing="even")
    order, total = global_order(mixture, 3), sum(mixture.takes)
    for number, take in enumerate(mixture.takes):
        seen = np.cumsum(order == number)
        assert seen[-1] == take
        assert np.abs(seen - np.arange(1, total + 1) * take / total).max() < 1 + len(sizes) * take / total
    plan = EpochPlan(mixture, 3)
    assert plan.counts.sum(axis=0).tolist() == list(mixture.takes)
    assert set(plan.counts.sum(axis=1).tolist()) == {total // lanes}
    assert np.array_equal(plan.offsets + plan.counts, np.cumsum(plan.counts, axis=0))


def test_more_of_a_source_is_more_of_its_passes() -> None:
    sources = tuple(
        replace(plain_source(name, [size]), weight=weight) for name, size, weight in (("a", 90, 1.0), ("b", 10, 4.0))
    )
    mixture = Mixture(sources, lanes=2, batch_size=5, window=7, weights="explicit", mixing="even")
    assert mixture.takes == (20, 80) and mixture.passes == (20 / 90, 8.0)
    orders = [SourceOrder(one, 0, number) for number, one in enumerate(sources)]
    seen: Counter[tuple[str, int]] = Counter()
    for epoch in range(9):
        plan = EpochPlan(mixture, epoch)
        for number in range(2):
            lane = Lane(plan, number)
            for _ in range(50):
                which, candidates = lane.take()
                seen[sources[which].name, orders[which].locate(next(candidates))[1]] += 1
    assert {n for key, n in seen.items() if key[0] == "a"} == {2} and len(seen) == 100
    assert {n for key, n in seen.items() if key[0] == "b"} == {72}


def test_weights_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="weights are explicit, but these sources have no weight above 0: a"):
        Mixture((plain_source("a", [90]),), lanes=1, weights="explicit")
    tiny = (replace(plain_source("a", [90]), weight=1.0), replace(plain_source("b", [9]), weight=1e-6))
    with pytest.raises(ConfigError, match="'explicit' give source 'b' no record in an epoch of 99"):
        Mixture(tiny, lanes=1, weights="explicit")
    with pytest.raises(ConfigError, match="these sources have no record: b: leave them out"):
        Mixture((plain_source("a", [90]), plain_source("b", [0])), lanes=1)
    with pytest.raises(ConfigError, match="group_batches must be at least 1, got 0"):
        Mixture((plain_source("a", [90]),), lanes=1, group_batches=0)
