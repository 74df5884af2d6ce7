"""Damaged shards: a strict source names them and stops, a lenient one replaces their records and counts them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_world import PictureBuilder, plain_source, stream_source
from topologies import READER, simulated, stream

from pgp_lightning.data.loader import EvaluationLoader, TrainingLoader
from pgp_lightning.data.manifest import Build, Source
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, StreamSource
from pgp_lightning.data.rejects import RejectTally
from pgp_lightning.data.writing import build_source, write_source
from pgp_lightning.errors import ConfigError, DataError


@pytest.fixture(params=["missing", "truncated", "garbage"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> StreamSource:
    """A source of 120 records, of whose ten shards the fourth is damaged."""
    write_source(tmp_path / "d", PictureBuilder("d", 120), 12, progress=False)
    shard = tmp_path / "d" / "d-00003.tar"
    if request.param == "missing":
        shard.unlink()
    elif request.param == "truncated":
        shard.write_bytes(shard.read_bytes()[:4000])
    else:
        shard.write_bytes(b"x" * shard.stat().st_size)
    return stream_source(tmp_path / "d", allowed_rejects=0.1)


def mixture_of(source: StreamSource, **changes: Any) -> Mixture:
    """Return a mixture of 4 lanes, with windows that fit into a shard: 60 batches of 2 in an epoch."""
    return Mixture((source,), **{"seed": 2, "lanes": 4, "batch_size": 2, "window": 6, **changes})


@pytest.mark.parametrize("group", [1, 3])
def test_a_strict_source_names_the_shard(damaged: StreamSource, group: int) -> None:
    mixture = mixture_of(damaged, group_batches=group)
    with pytest.raises(DataError, match=r"d-00003\.tar") as caught:
        list(TrainingLoader(mixture, READER, mixture.batches_per_epoch))
    assert type(caught.value) is DataError
    with pytest.raises(DataError, match=r"d-00003\.tar"):
        list(EvaluationLoader((damaged,), READER, 4))


@pytest.mark.parametrize("group", [1, 3])
def test_a_lenient_source_replaces_its_records(
    damaged: StreamSource, group: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lenient = replace(damaged, on_damage="substitute")
    mixture = mixture_of(lenient, group_batches=group)
    with caplog.at_level(logging.WARNING):
        expected = stream(mixture, 1, 0, stop=60)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "d-00003.tar" in warnings[0]  # once, though twelve records were due
    rejected = sum((Counter(batch[3]) for batch in expected.values()), Counter())
    assert rejected == {"d/damaged-shard": 12}
    keys = [key for batch in expected.values() for key in batch[0]]
    lost = {f"d-{number:04d}" for number in range(36, 48)}
    assert len(keys) == 120 and set(keys) == {f"d-{number:04d}" for number in range(120)} - lost
    assert max(Counter(keys).values()) <= 3  # no record stands in for a whole window
    assert simulated(mixture, 2, 2, 0, 60, monkeypatch) == expected
    found = simulated(mixture, 1, 4, 28, 60, monkeypatch)
    assert found == {number: batch for number, batch in expected.items() if number >= 28}


def test_the_first_unusable_records_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tuple(range(3, 39, 3))
    write_source(tmp_path / "d", PictureBuilder("d", 40, broken), 10, progress=False)
    source = stream_source(tmp_path / "d", allowed_rejects=1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rejected = sum((Counter(batch.rejected) for batch in EvaluationLoader((source,), READER, 4)), Counter())
    assert rejected == {"d/bad-image": 12}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 20 and told[:10] == told[10:]  # of each pass
    for number, line in zip(broken[:10], told[:10], strict=True):
        shard = tmp_path / "d" / f"d-{number // 10:05d}.tar"
        assert line.startswith(f"d/bad-image: record {number % 10} of {shard} cannot be used: d-{number:04d}: ")
        assert "0x" not in line


def test_more_damage_than_allowed_stops_the_run(damaged: StreamSource) -> None:
    lenient = replace(damaged, on_damage="substitute", allowed_rejects=0.09)
    with pytest.raises(
        DataError, match=r"'d' in .*: 1[12] of \d+ records .* allowed are 9\.0%: damaged-shard 1[12]\. "
    ):
        list(TrainingLoader(mixture_of(lenient), READER, 60))


def test_evaluation_leaves_damaged_shards_out(damaged: StreamSource) -> None:
    batches = list(EvaluationLoader((replace(damaged, on_damage="substitute"),), READER, 8))
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [f"d-{number:04d}" for number in range(120) if not 36 <= number < 48]
    assert sum((Counter(batch.rejected) for batch in batches), Counter()) == {"d/damaged-shard": 12}


def test_a_source_with_damage_can_be_opened_when_it_is_lenient(tmp_path: Path) -> None:
    write_source(tmp_path / "d", PictureBuilder("d", 30), 10, progress=False)
    (tmp_path / "d" / "d-00001.tar").unlink()
    source = Source("d", "train", tmp_path / "d", tmp_path / "m.yaml", max_tiles=3, weight=2.0)
    with pytest.raises(DataError, match=r"d-00001\.tar is missing"):
        StreamSource.load(source)
    opened = StreamSource.load(replace(source, on_damage="substitute"))
    assert (opened.samples, opened.max_tiles, opened.weight, opened.on_damage) == (30, 3, 2.0, "substitute")
    assert replace(source, on_damage="substitute").index().shards == opened.shards


def test_a_lenient_source_is_still_one_of_its_builder(tmp_path: Path) -> None:
    build = Build("data_world.PictureBuilder", {"name": "d", "size": 30}, 10)
    source = Source("d", "train", tmp_path / "d", tmp_path / "m.yaml", on_damage="substitute", build=build)
    build_source(source, progress=False)
    (tmp_path / "d" / "d-00001.tar").unlink()
    assert build_source(source, progress=False).samples == 30
    with pytest.raises(ConfigError, match="was built with other settings: size"):
        build_source(replace(source, build=replace(build, init_args={"name": "d", "size": 31})), progress=False)


def test_a_source_that_is_all_damage_ends_with_a_message(tmp_path: Path) -> None:
    write_source(tmp_path / "d", PictureBuilder("d", 30), 10, progress=False)
    for shard in (tmp_path / "d").glob("*.tar"):
        shard.unlink()
    source = replace(stream_source(tmp_path / "d", allowed_rejects=1.0), on_damage="substitute")
    with pytest.raises(DataError, match=r"none of 30 records in a row can be used: damaged-shard 30 .*is missing"):
        next(iter(TrainingLoader(mixture_of(source), READER, 4)))


def test_a_search_passes_any_number_of_records_that_are_damaged(tmp_path: Path) -> None:
    write_source(tmp_path / "d", PictureBuilder("d", 2001), 2000, progress=False)  # a shard of 2,000, and one of 1
    (tmp_path / "d" / "d-00000.tar").unlink()
    source = replace(stream_source(tmp_path / "d", allowed_rejects=1.0), on_damage="substitute")
    for seed in range(8):  # the one that can be used is anywhere, so for some of them beyond a thousand
        mixture = Mixture((source,), seed, lanes=1, batch_size=1, window=2001)
        assert next(iter(TrainingLoader(mixture, READER, 1))).keys == ["d-2000"]


def test_places_of_one_window_have_substitutes_of_their_own() -> None:
    source = replace(plain_source("a", [60]), on_damage="substitute")
    lane = Lane(EpochPlan(Mixture((source,), lanes=1, window=20), 0), 0)
    places = [list(lane.take()[1]) for _ in range(20)]
    assert all(sorted(candidates) == list(range(60)) for candidates in places)
    assert sorted(candidates[20] for candidates in places) == list(range(20, 60, 2))


def test_a_heap_of_damage_is_judged_over_a_pass() -> None:
    source = replace(plain_source("s", [100_000]), allowed_rejects=0.01)
    tally = RejectTally((source,))
    tally.add(Counter(s=2000), {"s/damaged-shard": 900, "s/bad-image": 25})
    with pytest.raises(DataError, match=r"1001 of 2000 records .*: bad-image 26, damaged-shard 975"):
        tally.add(Counter(), {"s/damaged-shard": 75, "s/bad-image": 1})
