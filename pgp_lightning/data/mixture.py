"""The order of training data: a pure function of (sources, seed, epoch, lanes), the same for any ranks and workers.

`lanes` virtual streams are dealt to ranks x workers. Global micro-batch g, counted from the start of training, belongs
to rank g % ranks; within its epoch it is the next batch of lane g % lanes. A source is an endless sequence of passes,
each a permutation of its records (shards shuffled, records shuffled inside their shard). An epoch takes the next
`repeat` x size records of every source, trimmed together to whole rounds of lanes x batch size: the remainder, fewer
than lanes x batch size records, is not lost but opens the next epoch, so after any number of epochs no record of a
source was seen more than once oftener than another. A lane gets a contiguous stretch of each source, mixes the sources
record by record in exact proportion, and shuffles each source in windows.

`weights` may share the same number of records out otherwise, by square roots of sizes or by given numbers; a source
then runs through its passes faster or slower. `mixing` says how the sources follow one another: at `random` as in a
shuffled deck, or `even`ly, where the share of a source in any stretch of n records is its share of the epoch within
2 / n records plus a drift of all sources together of the same size (see `_even_labels`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from pgp_lightning.data.index import Shard
from pgp_lightning.data.manifest import OnDamage, Source, Weights
from pgp_lightning.errors import ConfigError

__all__ = ["EpochPlan", "Lane", "Mixing", "Mixture", "SourceOrder", "StreamSource", "check_topology"]

Mixing = Literal["random", "even"]

# What a random generator is for: part of its key, so that no two uses share numbers.
_SHARDS, _RECORDS, _DEAL, _LABELS, _WINDOW, _EVEN, _GROUPS = range(7)


def _generator(*key: int) -> np.random.Generator:
    """Return a generator that depends on the key alone; PCG64's stream is stable across numpy versions."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class StreamSource:
    """A source as the stream needs it: nothing but names and numbers, so it travels to worker processes.

    Args:
        name: the source's name.
        shards: its shards, in the index's order.
        repeat: passes per epoch.
        allowed_rejects: greatest share of its records that may be unusable.
        weight: its part of an epoch where the weights are explicit.
        max_tiles: greatest number of tiles of its images, if it has a limit of its own.
        on_damage: whether a shard that cannot be read stops the run, or its records are replaced as rejects.
    """

    name: str
    shards: tuple[Shard, ...]
    repeat: float = 1.0
    allowed_rejects: float = 0.01
    weight: float | None = None
    max_tiles: int | None = None
    on_damage: OnDamage = "fail"

    @classmethod
    def load(cls, source: Source) -> StreamSource:
        """Read a manifest source's index.

        Raises:
            ConfigError: if the source has no shards.
            DataError: if its index or shards are damaged; with `on_damage: substitute` only if the index is.
        """
        return cls(
            source.name,
            source.index().shards,
            source.repeat,
            source.allowed_rejects,
            source.weight,
            source.max_tiles,
            source.on_damage,
        )

    @property
    def samples(self) -> int:
        """Number of records."""
        return sum(shard.samples for shard in self.shards)


class SourceOrder:
    """The endless order of one source: position -> shard and record, pass after pass."""

    def __init__(self, source: StreamSource, seed: int, number: int) -> None:
        self.source, self.seed, self.number = source, seed, number
        self.samples = source.samples
        self._pass = lru_cache(maxsize=4)(self._draw_pass)
        self._inside = lru_cache(maxsize=256)(self._draw_inside)

    def locate(self, position: int) -> tuple[Shard, int]:
        """Return the shard and the record in it at a position of the endless order."""
        lap, position = divmod(position, self.samples)
        shards, ends = self._pass(lap)
        visit = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[visit])
        inside = self._inside(lap, shard)
        return self.source.shards[shard], int(inside[position - int(ends[visit])])  # negative: counted from the end

    def _draw_pass(self, lap: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a pass's shuffled shard numbers and where each ends."""
        shards = _generator(self.seed, _SHARDS, self.number, lap).permutation(len(self.source.shards))
        sizes = np.array([shard.samples for shard in self.source.shards], dtype=np.int64)
        return shards, np.cumsum(sizes[shards])

    def _draw_inside(self, lap: int, shard: int) -> np.ndarray:
        """Return a pass's order of the records of one shard."""
        return _generator(self.seed, _RECORDS, self.number, lap, shard).permutation(self.source.shards[shard].samples)


@dataclass(frozen=True)
class Mixture:
    """What determines the order of the data.

    Args:
        sources: the sources, in the manifest's order.
        seed: of every random choice about the order.
        lanes: virtual streams; ranks x workers must divide it.
        batch_size: records per micro-batch.
        window: records of one source within a lane that are shuffled together.
        weights: shares of the sources in an epoch: by `count` (repeat x size), by `sqrt` (repeat x the square root of
            the size), or `explicit` (every source's own weight); the epoch's length is always the sum of repeat x size.
        mixing: how the sources of an epoch follow one another, at `random` or `even`ly.
        group_batches: batches of a lane whose records are sorted by size and dealt anew (see `grouping`); 1 is none.

    Raises:
        ConfigError: if the data is too small for lanes x batch size, or the weights leave a source without a record.
    """

    sources: tuple[StreamSource, ...]
    seed: int = 0
    lanes: int = 64
    batch_size: int = 1
    window: int = 1000
    weights: Weights = "count"
    mixing: Mixing = "random"
    group_batches: int = 1

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("lanes", 1), ("batch_size", 1), ("window", 1), ("group_batches", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if empty := [source.name for source in self.sources if not source.samples]:
            raise ConfigError(f"these sources have no record: {', '.join(empty)}: leave them out")
        wanted, round_size = sum(self._wanted), self.lanes * self.batch_size
        if wanted < round_size:
            fitting = max(1, wanted // self.batch_size)
            raise ConfigError(
                f"an epoch of {wanted} records is less than one round of lanes x batch_size = {self.lanes} x "
                f"{self.batch_size}: set lanes to {1 << (fitting.bit_length() - 1)} or less, or add data"
            )
        if self.weights == "explicit" and (bare := [source.name for source in self.sources if not source.weight]):
            raise ConfigError(f"weights are explicit, but these sources have no weight above 0: {', '.join(bare)}")
        if self.weights != "count" and 0 in self.takes:
            name = self.sources[self.takes.index(0)].name
            raise ConfigError(
                f"weights {self.weights!r} give source {name!r} no record in an epoch of {sum(self.takes)}: give it "
                f"more weight or leave it out"
            )

    @property
    def _wanted(self) -> list[int]:
        return [round(source.repeat * source.samples) for source in self.sources]

    @property
    def _parts(self) -> np.ndarray:
        """What the shares of the sources are in proportion to, (sources,)."""
        if self.weights == "sqrt":
            return np.array([source.repeat * np.sqrt(source.samples) for source in self.sources])
        if self.weights == "explicit":
            return np.array([source.weight for source in self.sources], dtype=np.float64)
        return np.array(self._wanted, dtype=np.int64)

    @cached_property
    def takes(self) -> tuple[int, ...]:
        """Records that an epoch takes from each source, the same in every epoch."""
        round_size, parts = self.lanes * self.batch_size, self._parts
        total = sum(self._wanted) // round_size * round_size
        exact = parts * (total / parts.sum())
        takes = np.floor(exact).astype(np.int64)
        most = np.argsort(takes - exact, kind="stable")[: total - int(takes.sum())]
        takes[most] += 1
        return tuple(takes.tolist())

    @property
    def passes(self) -> tuple[float, ...]:
        """How often an epoch goes through each source."""
        return tuple(take / source.samples for take, source in zip(self.takes, self.sources, strict=True))

    @cached_property
    def batches_per_epoch(self) -> int:
        """Micro-batches of all ranks in an epoch."""
        return sum(self.takes) // self.batch_size

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that the order depends on."""
        content = [[s.name, s.repeat, [[x.path.name, x.samples, x.sha256] for x in s.shards]] for s in self.sources]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        explicit = {source.name: source.weight for source in self.sources}
        return {
            "manifest": digest[:16],
            "seed": self.seed,
            "lanes": self.lanes,
            "batch_size": self.batch_size,
            "window": self.window,
            "weights": explicit if self.weights == "explicit" else self.weights,
            "mixing": self.mixing,
            "group_batches": self.group_batches,
        }


class EpochPlan:
    """How an epoch's records are dealt to the lanes.

    `counts` and `offsets`, int64 (lanes, sources), say how many records of a source a lane gets and where, in the
    epoch's stretch of the source, they begin.
    """

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        self.mixture, self.epoch = mixture, epoch
        self._even: np.ndarray | None = None
        if mixture.mixing == "even":
            labels = _even_labels(mixture.takes, _generator(mixture.seed, _EVEN, epoch))
            self._even = labels.reshape(-1, mixture.lanes, mixture.batch_size)
            sources = len(mixture.takes)
            self.counts = np.stack([np.bincount(self.labels(n), minlength=sources) for n in range(mixture.lanes)])
        else:
            self.counts = self._deal()
        self.offsets = np.cumsum(self.counts, axis=0) - self.counts

    def labels(self, lane: int) -> np.ndarray:
        """Return the sources of a lane's records in order, (records of the lane,)."""
        if self._even is not None:
            return self._even[:, lane].reshape(-1)
        sources = len(self.mixture.sources)
        labels = np.repeat(np.arange(sources, dtype=np.min_scalar_type(sources)), self.counts[lane])
        return _generator(self.mixture.seed, _LABELS, self.epoch, lane).permutation(labels)

    def group_order(self, lane: int, block: int, batches: int) -> list[int]:
        """Return the order in which a block of a lane delivers its batches, once they are grouped by size."""
        order: list[int] = _generator(self.mixture.seed, _GROUPS, self.epoch, lane, block).permutation(batches).tolist()
        return order

    def _deal(self) -> np.ndarray:
        """Return how many records of each source each lane gets, at random."""
        mixture = self.mixture
        left = np.array(mixture.takes, dtype=np.int64)
        per_lane = int(left.sum()) // mixture.lanes
        generator = _generator(mixture.seed, _DEAL, self.epoch)
        counts = np.zeros((mixture.lanes, len(left)), dtype=np.int64)
        for lane in range(mixture.lanes):
            last = lane == mixture.lanes - 1
            counts[lane] = left if last else generator.multivariate_hypergeometric(left, per_lane)
            left -= counts[lane]
        return counts


def _even_labels(takes: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return the sources of an epoch's records in order, evenly mixed, (sum of takes,).

    Record k of a source's n lies at the time (k + u) / n with u uniform in [0, 1). Up to any time a source is less
    than one record off its share p, and so is each of S sources; up to any place it is therefore off by less than
    1 + p S, and in a stretch between two places by less than twice as much.
    """
    times = np.concatenate([(np.arange(count) + generator.random(count)) / count for count in takes if count])
    labels = np.repeat(np.arange(len(takes), dtype=np.min_scalar_type(len(takes))), takes)
    return labels[np.argsort(times, kind="stable")]


class Lane:
    """One lane of an epoch, from any record on.

    Args:
        plan: the epoch's plan.
        lane: its number.
        first: records of the lane that were consumed before.
    """

    def __init__(self, plan: EpochPlan, lane: int, first: int = 0) -> None:
        self.plan, self.lane = plan, lane
        sources = len(plan.mixture.sources)
        self._labels = plan.labels(lane)
        self._next = first
        self._done = np.bincount(self._labels[:first], minlength=sources)
        self._window = lru_cache(maxsize=sources)(self._draw_window)

    def take(self) -> tuple[int, Iterator[int]]:
        """Return the next record's source, and its position in the source's endless order with its substitutes.

        The first position is the record's own. The others replace it, one after the other, as long as what was found
        cannot be used: the rest of its window, then the source's further records, a whole pass in all. They depend on
        the place alone, so a substitute is the same in every topology and after a resume; it is seen once more than
        the epoch promises.
        """
        source = int(self._labels[self._next])
        rank = int(self._done[source])
        self._next += 1
        self._done[source] += 1
        return source, self._candidates(source, rank)

    def _candidates(self, source: int, rank: int) -> Iterator[int]:
        mixture, plan = self.plan.mixture, self.plan
        window, place = divmod(rank, mixture.window)
        order = self._window(source, window)
        start = plan.epoch * mixture.takes[source] + int(plan.offsets[self.lane, source]) + window * mixture.window
        for step in range(len(order)):
            yield start + int(order[(place + step) % len(order)])
        rest = range(start + len(order), start + mixture.sources[source].samples)
        skip = 0
        if mixture.sources[source].on_damage == "substitute":
            # A damaged shard may be all of this window and of the next: one record would stand in for all places.
            skip = place * len(rest) // len(order)
        yield from rest[skip:]
        yield from rest[:skip]

    def _draw_window(self, source: int, window: int) -> np.ndarray:
        """Return the order inside one window, which is shorter at the end of the lane."""
        mixture = self.plan.mixture
        size = min(mixture.window, int(self.plan.counts[self.lane, source]) - window * mixture.window)
        return _generator(mixture.seed, _WINDOW, self.plan.epoch, self.lane, source, window).permutation(size)


def check_topology(lanes: int, ranks: int, workers: int) -> None:
    """Check that the lanes can be dealt to ranks x workers.

    Raises:
        ConfigError: if not, with the numbers that would work.
    """
    parts = ranks * max(1, workers)
    if lanes % parts == 0:
        return
    fitting = [count for count in range(1, lanes + 1) if lanes % (ranks * count) == 0]
    below, above = lanes // parts * parts, -(-lanes // parts) * parts
    others = " or ".join(str(count) for count in (below, above) if count)
    advice = f"set workers to one of {fitting}, or" if fitting else "use a number of ranks that divides the lanes, or"
    raise ConfigError(
        f"{lanes} lanes cannot be dealt to {ranks} ranks x {max(1, workers)} workers: {advice} set lanes to {others} "
        f"(other lanes are another order, so only for a new run)"
    )
