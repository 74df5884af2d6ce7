"""What the records of a split are like: sizes of images and texts, tiles, prompt slots, and what cannot be used.

Every record's JSON is read and checked, all of its turns, but no image is decoded: its size is what the record states,
or stands in the image's header if it states none. So the reasons counted here are those of `ConversationReader` that
can be told without a model and without pixels; `bad-relevant`, `too-long` and images that do not decode are not.
A record that cannot be used counts under its reason and in no other figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from pgp_lightning.data.build_pool import run_tasks
from pgp_lightning.data.conversation import limited_rule, open_image, read_system, read_turns, stated_size
from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.manifest import Manifest, OnDamage, Source
from pgp_lightning.data.mixture import Mixture, StreamSource
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.data.rejects import DAMAGED
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm.processor import Processor
from pgp_lightning.vlm.tiles import TileGrid, TileRule

__all__ = ["PERCENTILES", "Gauge", "SourceStatistics", "SplitStatistics", "Summary", "measure_split", "summarise"]

PERCENTILES = (5, 50, 95, 99)
_OF_RECORDS = ("turns", "width", "height", "bytes", "tiles", "system_characters")
_OF_TURNS = ("question_characters", "answer_characters")
_OF_TOKENS = ("question_tokens", "answer_tokens", "slots")


@dataclass(frozen=True)
class Summary:
    """Figures of one quantity; a percentile is the least value that so many per cent of the values do not exceed."""

    count: int
    mean: float
    most: int
    percentiles: tuple[int, ...]

    @property
    def median(self) -> int:
        """The value at 50 per cent."""
        return self.percentiles[PERCENTILES.index(50)]


def summarise(values: np.ndarray) -> Summary | None:
    """Return the figures of int (n,), None if there is no value."""
    if not (count := len(values)):
        return None
    ordered = np.sort(values)
    ranks = [-(-percent * count // 100) - 1 for percent in PERCENTILES]
    return Summary(count, float(ordered.mean()), int(ordered[-1]), tuple(int(ordered[rank]) for rank in ranks))


@dataclass(frozen=True)
class Gauge:
    """How records are measured; picklable for worker processes.

    Args:
        rule: how images are tiled, before a source's own limit.
        processor: of the model whose tokens and prompt slots are counted; None for characters alone.
        cache: where shards with a URL are fetched to.
    """

    rule: TileRule = field(default_factory=TileRule)
    processor: Processor | None = None
    cache: ShardCache | None = None

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of what is measured, of records first, then of turns."""
        return _OF_RECORDS + _OF_TURNS + (_OF_TOKENS if self.processor else ())

    def measure(self, reader: ShardReader, shard: Shard, number: int, max_tiles: int | None) -> dict[str, list[int]]:
        """Return a record's values by quantity: one each of the record, and one for every turn.

        Of `system_characters` there is none if the record has no system text of its own.

        Raises:
            UnusableRecord: if it cannot be used.
            DataError: if the shard is not as the index promises.
        """
        key, size = reader.describe(shard, number)
        if size is None:
            raise UnusableRecord("no-image", f"{key} has no image")
        record, turns = read_turns(RawRecord(key, None, reader.read_text(shard, number)), "all")
        system = read_system(key, record)
        width, height = stated_size(record) or open_image(key, reader.read(shard, number).image or b"").size
        try:
            grid = _grid(limited_rule(self.rule, max_tiles), width, height)
        except ValueError as error:
            raise UnusableRecord("bad-image", f"{key}: {error}") from error
        found = {"turns": [len(turns)], "width": [width], "height": [height], "bytes": [size], "tiles": [grid.tiles]}
        found["system_characters"] = [] if system is None else [len(system)]
        found["question_characters"] = [len(turn.question) for turn in turns]
        found["answer_characters"] = [len(turn.answer) for turn in turns]
        if (model := self.processor) is not None:
            found["question_tokens"] = [len(model.encode(turn.question)) for turn in turns]
            found["answer_tokens"] = [len(model.encode(turn.answer)) for turn in turns]
            found["slots"] = [model.prompt_length(turn.question, turn.answer, grid.tokens, system) for turn in turns]
        return found


@lru_cache(maxsize=4096)
def _grid(rule: TileRule, width: int, height: int) -> TileGrid:
    return rule.grid(width, height)


@dataclass(frozen=True)
class SourceStatistics:
    """Figures of one source, or of all.

    Args:
        name: of the source.
        shards: how many it has.
        samples: records in them.
        records: those that were looked at.
        rejected: reason to number of raw records that were left out when the shards were built.
        unusable: reason to number of records looked at that cannot be used.
        values: int32 (records used,) or (turns used,) by quantity.
        tokens_per_tile: visual tokens of a tile.
        share: its part of an epoch, None where there is none.
    """

    name: str
    shards: int
    samples: int
    records: int
    rejected: Mapping[str, int]
    unusable: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    tokens_per_tile: int
    share: float | None = None

    def of(self, quantity: str) -> np.ndarray:
        """Return the values of a quantity, `pixels` and `visual_tokens` among them, int (n,)."""
        if quantity == "pixels":
            return np.asarray(self.values["width"].astype(np.int64) * self.values["height"])
        if quantity == "visual_tokens":
            return np.asarray(self.values["tiles"].astype(np.int64) * self.tokens_per_tile)
        return self.values[quantity]


@dataclass(frozen=True)
class SplitStatistics:
    """Figures of a split's sources.

    Args:
        manifest: the manifest's file.
        split: its name.
        sources: the figures, in the manifest's order.
        gauge: how they were measured.
        first: how many records of each source were looked at, None for all.
    """

    manifest: str
    split: str
    sources: tuple[SourceStatistics, ...]
    gauge: Gauge
    first: int | None = None

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of all that `SourceStatistics.of` knows."""
        return (*self.gauge.quantities, "pixels", "visual_tokens")

    @cached_property
    def total(self) -> SourceStatistics:
        """The figures of all sources together."""
        parts = self.sources
        shared = [part.share for part in parts if part.share is not None]
        return SourceStatistics(
            name="all sources",
            shards=sum(part.shards for part in parts),
            samples=sum(part.samples for part in parts),
            records=sum(part.records for part in parts),
            rejected=sum((Counter(part.rejected) for part in parts), Counter()),
            unusable=sum((Counter(part.unusable) for part in parts), Counter()),
            values={name: np.concatenate([part.values[name] for part in parts]) for name in self.gauge.quantities},
            tokens_per_tile=self.gauge.rule.tokens_per_side**2,
            share=sum(shared) if shared else None,
        )

    @property
    def over_length(self) -> int:
        """Turns that are longer than the model's limit at the finest tiling; a reader gives them fewer tiles."""
        model = self.gauge.processor
        return 0 if model is None else int((self.total.values["slots"] > model.max_length).sum())


class _Task(NamedTuple):
    """The first records of one shard."""

    source: int
    shard: Shard
    records: int
    max_tiles: int | None
    on_damage: OnDamage


class _Measured(NamedTuple):
    values: dict[str, np.ndarray]
    unusable: Counter[str]


def measure_split(
    manifest: Manifest,
    split: str,
    gauge: Gauge,
    first: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> SplitStatistics:
    """Go once through the sources of a split, whose indices are on this machine.

    Args:
        manifest: the manifest.
        split: one of its splits.
        gauge: how records are measured.
        first: look at the first so many records of each source; by default at all.
        workers: worker processes, each a shard at a time; 0 measures in this one.
        progress: called after every shard with the number of records looked at, and of all that will be.

    Raises:
        ConfigError: if there is no such split, a source is not built, or a number is out of its range.
        DataError: if an index or, of a source with `on_damage: fail`, a shard is damaged.
    """
    if (first is not None and first < 1) or workers < 0:
        raise ConfigError(f"records must be at least 1 and workers at least 0, got {first} and {workers}")
    sources = manifest.sources(split)
    indices = [source.index() for source in sources]
    shares: Sequence[float | None] = _shares(sources, manifest) if split == "train" else [None] * len(sources)
    tasks = [task for n, source in enumerate(sources) for task in _tasks(n, source, indices[n], first)]
    total, found = sum(task.records for task in tasks), dict[_Task, _Measured]()
    here = ((task, _measure_shard(gauge, task)) for task in tasks)
    for task, measured in run_tasks(_measure_shard, gauge, tasks, workers) if workers else here:
        found[task] = measured
        if progress is not None:
            progress(sum(task.records for task in found), total)
    parts = []
    for number, (source, index) in enumerate(zip(sources, indices, strict=True)):
        own = {task: found[task] for task in tasks if task.source == number}
        parts.append(
            SourceStatistics(
                name=source.name,
                shards=len(index.shards),
                samples=index.samples,
                records=sum(task.records for task in own),
                rejected=index.rejected,
                unusable=sum((measured.unusable for measured in own.values()), Counter()),
                values={
                    name: np.concatenate([part.values[name] for part in own.values()]) for name in gauge.quantities
                },
                tokens_per_tile=gauge.rule.tokens_per_side**2,
                share=shares[number],
            )
        )
    return SplitStatistics(str(manifest.file), split, tuple(parts), gauge, first)


def _shares(sources: Sequence[Source], manifest: Manifest) -> list[float]:
    """Return the sources' shares of the records of an epoch."""
    takes = Mixture(tuple(map(StreamSource.load, sources)), lanes=1, weights=manifest.weights).takes
    return [take / sum(takes) for take in takes]


def _tasks(number: int, source: Source, index: Index, first: int | None) -> list[_Task]:
    """Return a source's shards with how many of their records are looked at, those with none left out."""
    left, tasks = index.samples if first is None else first, []
    for shard in index.shards:
        if count := min(left, shard.samples):
            tasks.append(_Task(number, shard, count, source.max_tiles, source.on_damage))
        left -= count
    return tasks


def _measure_shard(gauge: Gauge, task: _Task) -> _Measured:
    """Measure the records of one shard."""
    values: dict[str, list[int]] = {name: [] for name in gauge.quantities}
    unusable: Counter[str] = Counter()
    reader = ShardReader(1, gauge.cache)
    for number in range(task.records):
        try:
            measured = gauge.measure(reader, task.shard, number, task.max_tiles)
        except UnusableRecord as error:
            unusable[error.reason] += 1
        except DataError:
            if task.on_damage == "fail":
                raise
            unusable[DAMAGED] += task.records - number
            break
        else:
            for name, numbers in measured.items():
                values[name] += numbers
    return _Measured({name: np.array(numbers, dtype=np.int32) for name, numbers in values.items()}, unusable)
