"""Batches grouped by size: the same in every topology, resumable inside a block, with less padding."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from data_world import WordProcessor, global_order, picture, plain_source, stream_source
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import simulated, stream

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.grouping import Place, SlotEstimate, lane_batches
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, StreamSource
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm.tiles import TileRule

PROCESSOR = WordProcessor(TileRule(tile_size=8, tokens_per_side=2, max_tiles=12), max_length=400)
READER = ConversationReader(PROCESSOR)


@dataclass(frozen=True)
class SizedBuilder:
    """Makes records of very different sizes; they state width and height, or not."""

    name: str
    size: int
    states: bool = True
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        draw = random.Random(f"{self.name} {index}")
        width, height = draw.choice([(8, 8), (8, 8), (8, 8), (24, 16), (64, 24), (32, 24), (96, 8)])
        question = "why " * draw.choice([2, 3, 5, 8, 40])
        record = {"turns": [{"question": question, "answer": "so"}, {"question": "and " * 300, "answer": "no"}]}
        stated = {"width": width, "height": height} if self.states else {}
        image = b"not an image" if index in self.broken else picture(index, width, height)
        return f"{self.name}-{index:04d}", image, "png", record | stated

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamSource, ...]:
    """Three sources of records of all sizes, one of which does not state them, one with records out of use."""
    root = tmp_path_factory.mktemp("sized")
    builders = (SizedBuilder("a", 230), SizedBuilder("b", 61, states=False), SizedBuilder("c", 40, broken=(3, 17)))
    for builder in builders:
        write_source(root / builder.name, builder, 29, progress=False)
    return tuple(stream_source(root / builder.name, allowed_rejects=0.2) for builder in builders)


def grouped(sources: tuple[StreamSource, ...], **changes: Any) -> Mixture:
    """Return a mixture of 4 lanes, 4 records a batch and blocks of 6 batches: 20 in a lane's epoch, so 3 and 2 more."""
    return Mixture(sources, **{"seed": 3, "lanes": 4, "batch_size": 4, "window": 16, "group_batches": 6, **changes})


def test_every_topology_delivers_the_same_grouped_batches(
    sized: tuple[StreamSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = grouped(sized)
    expected = stream(mixture, 1, 0, stop=96, reader=READER)
    assert mixture.batches_per_epoch == 80 and list(expected) == list(range(96))
    assert [index for batch in expected.values() for index in batch[1]] == list(range(384))
    assert sum((Counter(batch[3]) for batch in expected.values()), Counter())["c/bad-image"] >= 2
    for ranks, workers in ((2, 2), (1, 4)):
        assert simulated(mixture, ranks, workers, 0, 96, monkeypatch, READER) == expected


def test_resuming_inside_a_block_is_the_undisturbed_stream(
    sized: tuple[StreamSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = grouped(sized)
    expected = stream(mixture, 1, 0, stop=96, reader=READER)
    for first in range(1, 30):  # every batch of the first block of every lane, and of the next
        found = stream(mixture, 1, 0, first, first + 8, READER)
        assert found == {number: expected[number] for number in range(first, first + 8)}
    for first in range(0, 88, 4):  # on other ranks and workers, across the end of the epoch
        found = simulated(mixture, 2, 2, first, first + 8, monkeypatch, READER)
        assert found == {number: expected[number] for number in range(first, first + 8)}


def test_every_record_once_per_epoch_with_2_ranks_of_2_workers(
    sized: tuple[StreamSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({}, {"group_batches": 1}, {"mixing": "even"}):
        mixture = grouped(sized[:2], **changes)
        per_epoch = mixture.batches_per_epoch
        found = simulated(mixture, 2, 2, 0, 3 * per_epoch, monkeypatch, READER)
        everything = {f"a-{i:04d}" for i in range(230)} | {f"b-{i:04d}" for i in range(61)}
        seen: Counter[str] = Counter()
        for epoch in range(3):
            keys = [key for n in range(epoch * per_epoch, (epoch + 1) * per_epoch) for key in found[n][0]]
            # All but the remainder that does not fill a round, which opens the next epoch.
            assert len(keys) == 288 and (epoch or len(set(keys)) == 288) and set(keys) <= everything
            seen.update(keys)
        assert max(seen.values()) - min(seen.values()) <= 1 and set(seen) == everything


def test_the_order_of_sources_is_the_planned_one(sized: tuple[StreamSource, ...]) -> None:
    for mixing in ("random", "even"):
        mixture = grouped(sized[:2], group_batches=1, mixing=mixing)
        loader = TrainingLoader(mixture, READER, mixture.batches_per_epoch)
        names = [name for batch in loader for name in batch.sources]
        assert names == [sized[number].name for number in global_order(mixture, 0)]


def lengths_of(mixture: Mixture, reader: ConversationReader) -> list[list[int]]:
    """Return the prompt lengths of an epoch's batches."""
    lengths = []
    for batch in TrainingLoader(mixture, reader, mixture.batches_per_epoch):
        rows = zip(batch.request.questions, batch.answers, batch.request.counts, strict=True)
        lengths.append([reader.processor.prompt_length(*row) for row in rows])
    return lengths


def waste(lengths: list[list[int]]) -> float:
    """Return the share of padding in batches of these prompt lengths."""
    return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)


def test_grouping_at_least_halves_the_padding(sized: tuple[StreamSource, ...]) -> None:
    before, after = (lengths_of(grouped(sized, group_batches=group), READER) for group in (1, 6))
    assert sorted(map(len, before)) == sorted(map(len, after))
    print(f"padding: {waste(before):.1%} of slots without grouping, {waste(after):.1%} with blocks of 6 batches of 4")
    assert waste(after) < waste(before) / 2


def blocks(plan: EpochPlan, lane: int, slots: Any, first: int = 0) -> list[list[tuple[int, int]]]:
    """Return a lane's batches as sources and positions."""
    return [
        [(source, next(candidates)) for source, candidates in batch] for batch in lane_batches(plan, lane, first, slots)
    ]


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    lanes=st.sampled_from([1, 2, 4]),
    mixing=st.sampled_from(["random", "even"]),
    modulus=st.sampled_from([1, 3, 50]),
    data=st.data(),
)
def test_a_block_holds_its_records_sorted(
    group: int, batch_size: int, lanes: int, mixing: Any, modulus: int, data: st.DataObject
) -> None:
    sources = (plain_source("a", [70, 21]), plain_source("b", [30]))
    mixture = Mixture(sources, 5, lanes, batch_size, 8, mixing=mixing, group_batches=group)
    plan, lane = EpochPlan(mixture, 1), lanes - 1

    def slots(source: int, position: int) -> int:
        return (position * 37 + source) % modulus

    found = blocks(plan, lane, slots)
    plain = Lane(plan, lane)
    due = [(source, next(candidates)) for source, candidates in (plain.take() for _ in range(len(found) * batch_size))]
    assert len(found) == mixture.batches_per_epoch // lanes
    for start in range(0, len(found), group):
        block = found[start : start + group]
        records = due[start * batch_size : (start + group) * batch_size]
        ordered = sorted(records, key=lambda record: slots(*record)) if len(block) > 1 else records
        expected = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        assert sorted(block) == sorted(expected)
    first = data.draw(st.integers(0, len(found)))
    assert blocks(plan, lane, slots, first) == found[first:]


def test_substitutes_stay_with_the_place() -> None:
    mixture = Mixture((plain_source("a", [60]),), lanes=1, batch_size=2, window=20, group_batches=5)
    plain = Lane(EpochPlan(mixture, 0), 0)
    expected = sorted(list(plain.take()[1]) for _ in range(60))
    places: list[Place] = [
        place for batch in lane_batches(EpochPlan(mixture, 0), 0, 0, lambda *_: 1) for place in batch
    ]
    assert sorted(list(candidates) for _, candidates in places) == expected


def no_size() -> tuple[int, int]:
    raise AssertionError("the image need not be opened")


def test_the_estimate_is_visual_tokens_and_a_quarter_of_the_text() -> None:
    estimate = SlotEstimate(READER)
    turns = '"turns": [{"question": "why why why", "answer": "so"}, {"question": "%s", "answer": ""}]' % ("x" * 400)
    text = f'{{"width": 64, "height": 24, {turns}}}'.encode()
    assert PROCESSOR.rule.grid(64, 24).tokens == 44 and estimate(text, no_size) == 44 + 13 // 4
    assert SlotEstimate(replace(READER, turns="all"))(text, no_size) == 44 + 100
    assert estimate(text, no_size, max_tiles=1) == 4 + 3
    assert SlotEstimate(replace(READER, max_length=20))(text, no_size) == 20
    assert estimate(f"{{{turns}}}".encode(), lambda: (8, 8)) == 4 + 3
    for bad in (b"{}", b"[]", b"{", None, b'{"turns": []}', b'{"turns": [{"question": 1}]}', b"[" * 100_000):
        assert estimate(bad, no_size) == 0

    for kind in (DataError, ConfigError):  # of a damaged shard, and of a machine that cannot read it

        def failing(kind: type[Exception] = kind) -> tuple[int, int]:
            raise kind("the shard ends early")

        with pytest.raises(kind, match="the shard ends early"):
            estimate(f'{{"width": true, "height": 24, {turns}}}'.encode(), failing)


def test_what_grouping_depends_on_is_part_of_the_identity(sized: tuple[StreamSource, ...], tmp_path: Path) -> None:
    state = TrainingLoader(grouped(sized), READER, 10).state_dict()
    for reader, message in (
        (replace(READER, max_length=100), "max_length was 400 and is 100"),
        (replace(READER, max_tiles=2), r"max_tiles was \[12, 12, 12\] and is \[2, 2, 2\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingLoader(grouped(sized), reader, 10).load_state_dict(state)
        plain = grouped(sized, group_batches=1)  # where they change nothing about the order
        TrainingLoader(plain, reader, 10).load_state_dict(TrainingLoader(plain, READER, 10).state_dict())
    limited = (replace(sized[0], max_tiles=3), *sized[1:])
    with pytest.raises(ConfigError, match=r"is \[3, 12, 12\]"):
        TrainingLoader(grouped(limited), READER, 10).load_state_dict(state)
    plain = TrainingLoader(grouped(limited, group_batches=1), READER, 10)  # what the batches hold, if not their order
    with pytest.raises(ConfigError, match=r"continued: own_max_tiles was {} and is {'a': 3}\. Restore"):
        plain.load_state_dict(TrainingLoader(grouped(sized, group_batches=1), READER, 10).state_dict())
    with pytest.raises(ConfigError, match=r"continued: group_batches was 6 and is 1\. Restore"):
        TrainingLoader(grouped(sized, group_batches=1), READER, 10).load_state_dict(state)


def test_a_source_has_its_own_limit_of_tiles(sized: tuple[StreamSource, ...]) -> None:
    limited = (replace(sized[0], max_tiles=1), replace(sized[1], max_tiles=100), sized[2])
    counts: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    for batch in TrainingLoader(grouped(limited), replace(READER, max_tiles=6), 60):
        for name, count in zip(batch.sources, batch.request.counts, strict=True):
            counts[name].add(count // 4)
    assert counts["a"] == {1} and max(counts["b"]) == 13 and 1 < max(counts["c"]) <= 7
