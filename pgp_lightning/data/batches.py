"""The batches that one process makes, a worker of a loader or the loader itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pgp_lightning.data.collate import Batch, Item, collate, joined
from pgp_lightning.data.conversation import Conversation, ConversationReader
from pgp_lightning.data.grouping import Place, SlotEstimate, lane_batches
from pgp_lightning.data.index import Shard
from pgp_lightning.data.mixture import EpochPlan, Mixture, SourceOrder, StreamSource
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.data.rejects import DAMAGED
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.data.tile_pool import Handed, TilePool
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm.tiles import Empty, new_tiles

__all__ = ["BatchRange", "EvaluationBatches", "Failure", "Nothing", "Parcel", "TrainingBatches"]

_log = logging.getLogger(__name__)
_SEARCH_LIMIT = 1000
_NAMED = 10  # records of a source and reason that are named in the log


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker: torch would bury its message in a traceback."""

    error: ConfigError | DataError


@dataclass(frozen=True)
class Nothing:
    """Takes the place of a batch none of whose records could be used."""

    rejected: dict[str, int] = field(default_factory=dict)


Parcel = Batch | Failure | Nothing


class BatchRange(IterableDataset["Parcel | Handed"]):
    """A range of this rank's batches, of which DataLoader worker w makes every workers-th one.

    DataLoader collects from its workers in turn, beginning with worker 0; which batches are a worker's therefore
    depends on the first, so that batches keep their order wherever the range begins.
    """

    pool: TilePool | None = None
    """Where workers put their tiles; set by what starts them, and from then on only they iterate."""

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop

    def mine(self) -> range:
        """Return the numbers of the batches that this process makes."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return range(self.first + worker, self.stop, workers)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array for an image's tiles, where a worker has to put it."""
        return new_tiles(shape) if self.pool is None else self.pool.empty(shape)

    def join(self, tiles: Sequence[np.ndarray]) -> Tensor:
        """Return the tiles of a batch's images as one tensor."""
        return joined(tiles) if self.pool is None else self.pool.join(tiles)

    def most_bytes(self) -> int:
        """Return the most bytes that the tiles of a batch can take."""
        raise NotImplementedError

    def batches(self) -> Iterator[Batch | Nothing]:
        """Make the batches that are this process's."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Parcel | Handed]:
        info = get_worker_info()
        if self.pool is not None and info is not None:
            self.pool.worker = info.id
        try:
            for batch in self.batches():
                yield batch if self.pool is None or isinstance(batch, Nothing) else self.pool.hand_over(batch)
        except (ConfigError, DataError) as error:  # the one if a shard cannot be fetched with these settings
            yield Failure(error)


class _Records:
    """Reads the records of sources; knows which shards turned out to be damaged.

    Args:
        reader: raw record -> conversation.
        capacity: number of shards whose tables are remembered.
        cache: where shards are fetched to.
        empty: makes the arrays that tiles are written to.
    """

    def __init__(self, reader: ConversationReader, capacity: int, cache: ShardCache | None, empty: Empty) -> None:
        self.reader, self._empty = reader, empty
        self._shards = ShardReader(capacity, cache)
        self._estimate = SlotEstimate(reader)
        self._damaged: dict[Path, str] = {}
        self._named: dict[str, set[tuple[Path, int]]] = {}

    def conversation(self, source: StreamSource, shard: Shard, number: int) -> Conversation:
        """Return a record as a conversation.

        Raises:
            UnusableRecord: if it cannot be used; for a damaged shard, if the source says so.
            DataError: if the shard is damaged and the source says no more.
            ConfigError: if the machine fails to fetch or read the shard, again and again.
        """
        raw = self._read(source, shard, number)
        try:
            return self.reader(raw, source.max_tiles, self._empty)
        except UnusableRecord as error:
            self._name(f"{source.name}/{error.reason}", shard, number, error)
            raise

    def _name(self, counted: str, shard: Shard, number: int, error: UnusableRecord) -> None:
        """Say which record cannot be used, of every source and reason the first ones that this process meets."""
        named = self._named.setdefault(counted, set())
        if len(named) < _NAMED and (shard.path, number) not in named:
            named.add((shard.path, number))
            _log.warning("%s: record %d of %s cannot be used: %s", counted, number, shard.shown, error.detail)

    def slots(self, source: StreamSource, shard: Shard, number: int) -> int:
        """Return a record's estimated slots, 0 for one that cannot be used.

        Raises:
            DataError: if the shard is damaged and the source says no more.
            ConfigError: if the machine fails to read the shard, again and again.
        """

        def size() -> tuple[int, int]:
            raw = self._read(source, shard, number)
            return self.reader.open_image(raw.key, raw.image or b"").size

        try:
            with self._guarded(source, shard):
                text = self._shards.read_text(shard, number)
            return self._estimate(text, size, source.max_tiles)
        except UnusableRecord:
            return 0

    def _read(self, source: StreamSource, shard: Shard, number: int) -> RawRecord:
        with self._guarded(source, shard):
            return self._shards.read(shard, number)

    @contextmanager
    def _guarded(self, source: StreamSource, shard: Shard) -> Iterator[None]:
        """Turn a damaged shard into a reject where the source allows it, and do not try it again."""
        if shard.path in self._damaged:
            raise UnusableRecord(DAMAGED, self._damaged[shard.path])
        try:
            yield
        except DataError as error:
            if source.on_damage == "fail":
                raise
            self._damaged[shard.path] = message = str(error)
            _log.warning("%s. Its %d records are replaced by others of source %r", message, shard.samples, source.name)
            raise UnusableRecord(DAMAGED, message) from error


class TrainingBatches(BatchRange):
    """This rank's share of the endless stream, or of its first batches over and over."""

    def __init__(
        self,
        mixture: Mixture,
        reader: ConversationReader,
        rank: int,
        ranks: int,
        first: int,
        stop: int,
        cache: ShardCache | None = None,
        repeat: int | None = None,
    ) -> None:
        super().__init__(first, stop)
        self.mixture, self.reader, self.cache = mixture, reader, cache
        self.rank, self.ranks, self.repeat = rank, ranks, repeat

    def most_bytes(self) -> int:
        """Return the most bytes that the tiles of a batch can take."""
        return self.mixture.batch_size * _most_bytes(self.reader, self.mixture.sources)

    def batches(self) -> Iterator[Batch]:
        """Make the batches that are this process's; every record of the mixture's order yields exactly one item."""
        mixture = self.mixture
        records = _Records(self.reader, mixture.lanes * len(mixture.sources), self.cache, self.empty)
        orders = [SourceOrder(source, mixture.seed, number) for number, source in enumerate(mixture.sources)]
        plan, lanes, before = None, dict[int, Iterator[list[Place]]](), -1

        def slots(source: int, position: int) -> int:
            return records.slots(mixture.sources[source], *orders[source].locate(position))

        for number in self.mine():
            batch = number * self.ranks + self.rank
            shown = batch if self.repeat is None else batch % self.repeat
            epoch, within = divmod(shown, mixture.batches_per_epoch)
            if plan is None or plan.epoch != epoch:
                plan, lanes = EpochPlan(mixture, epoch), {}
            elif shown <= before:
                lanes = {}
            before = shown
            place, lane = divmod(within, mixture.lanes)
            if lane not in lanes:
                lanes[lane] = lane_batches(plan, lane, place, slots)
            rejected: Counter[str] = Counter()
            # What is drawn for a sample goes by its place in the run: it is new each time a batch comes again.
            items = [
                self._item(records, orders[source], candidates, index, rejected)
                for index, (source, candidates) in enumerate(next(lanes[lane]), start=batch * mixture.batch_size)
            ]
            # A batch that comes again brings no other records: its rejects were counted the first time.
            yield collate(items, epoch, rejected if batch == shown else None, self.join)

    def _item(
        self, records: _Records, order: SourceOrder, candidates: Iterator[int], index: int, rejected: Counter[str]
    ) -> Item:
        """Return the first usable candidate; a rejection counts where the record itself was due, not as substitute."""
        source = order.source
        reasons: Counter[str] = Counter()
        last = ""
        for position in candidates:
            try:
                conversation = records.conversation(source, *order.locate(position))
            except UnusableRecord as error:
                if not reasons:
                    rejected[f"{source.name}/{error.reason}"] += 1
                reasons[error.reason] += 1
                last = str(error)
                if reasons.total() - reasons[DAMAGED] == _SEARCH_LIMIT:  # a damaged shard is quickly passed
                    break
                continue
            return Item(conversation, source.name, index)
        listed = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()) if n)
        raise DataError(
            f"source {source.name!r} in {source.shards[0].path.parent}: none of {reasons.total()} records in a row can "
            f"be used: {listed} (the last: {last}). Repair the data or leave the source out"
        )


class EvaluationBatches(BatchRange):
    """This rank's batches of a finite split."""

    def __init__(
        self,
        sources: tuple[StreamSource, ...],
        reader: ConversationReader,
        batches: list[list[tuple[int, int]]],
        ranks: int,
        cache: ShardCache | None = None,
    ) -> None:
        super().__init__(0, len(batches))
        self.sources, self.reader, self.contents, self.ranks, self.cache = sources, reader, batches, ranks, cache
        self.offsets = [0, *accumulate(source.samples for source in sources)]

    def most_bytes(self) -> int:
        """Return the most bytes that the tiles of a batch can take."""
        return max(map(len, self.contents)) * _most_bytes(self.reader, self.sources)

    def batches(self) -> Iterator[Batch | Nothing]:
        """Make the batches that are this process's; unusable records are left out, never replaced."""
        records = _Records(self.reader, len(self.sources) + 1, self.cache, self.empty)
        for number in self.mine():
            items: list[Item] = []
            rejected: Counter[str] = Counter()
            for which, position in self.contents[number]:
                source = self.sources[which]
                try:
                    conversation = records.conversation(source, *_in_order(source, position))
                except UnusableRecord as error:
                    rejected[f"{source.name}/{error.reason}"] += 1
                    continue
                items.append(Item(conversation, source.name, self.offsets[which] + position))
            if not items and self.ranks > 1:  # a rank that skips a batch would leave the others waiting for it
                raise DataError(f"no record of an evaluation batch can be used ({dict(rejected)}): use larger batches")
            yield collate(items, rejected=rejected, join=self.join) if items else Nothing(dict(rejected))


def _most_bytes(reader: ConversationReader, sources: Sequence[StreamSource]) -> int:
    """Return the most bytes that the tiles of a record can take."""
    return max(reader.rule(source.max_tiles).most_bytes for source in sources)


def _in_order(source: StreamSource, position: int) -> tuple[Shard, int]:
    """Return the shard and the record in it at a position of a source as it was written."""
    for shard in source.shards:
        if position < shard.samples:
            return shard, position
        position -= shard.samples
    raise IndexError(position)
