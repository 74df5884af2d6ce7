"""Loaders: an endless, sized, stateful one for training, and a finite one in order for evaluation.

Lightning asks a training loader for `state_dict`, restores it before iterating, and prefetches only loaders without a
length; hence one sized loader for the whole of training, of which Lightning sees a single epoch.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import sqrt
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pgp_lightning.data.collate import Batch, Item, collate
from pgp_lightning.data.conversation import ConversationReader, UnusableRecord
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder, StreamSource, check_topology
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.errors import ConfigError, DataError

__all__ = ["EvaluationLoader", "RejectTally", "TrainingLoader"]

_LEAST_SEEN = 100


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: torch would bury its message in a traceback."""

    error: DataError


@dataclass(frozen=True)
class _Nothing:
    """Takes the place of a batch none of whose records could be used."""

    rejected: dict[str, int] = field(default_factory=dict)


_Parcel = Batch | _Failure | _Nothing


class RejectTally:
    """Counts unusable records and fails when a source has more of them than it may.

    Counts are this process's, since it started. A source fails for certain when its rejects exceed the allowed share
    of everything seen and of one whole pass; from 100 records on it fails as well when they exceed the allowed share
    of those seen by three standard deviations, so that a run of bad luck does not stop a run.
    """

    def __init__(self, sources: Sequence[StreamSource]) -> None:
        self._sources = {source.name: source for source in sources}
        self._seen: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def add(self, seen: Counter[str], rejected: dict[str, int]) -> None:
        """Add the records seen by source, and those of them rejected by "source/reason".

        Raises:
            DataError: if a source exceeds its allowed share.
        """
        self._seen.update(seen)
        self._rejected.update(rejected)
        for name in {key.rpartition("/")[0] for key in rejected}:
            self._check(self._sources[name])

    def _check(self, source: StreamSource) -> None:
        prefix = f"{source.name}/"
        reasons = {
            key.removeprefix(prefix): n for key, n in self._rejected.items() if key.rpartition("/")[0] == source.name
        }
        bad, seen, share = sum(reasons.values()), self._seen[source.name], source.allowed_rejects
        certain = bad > share * max(seen, source.samples)
        likely = seen >= _LEAST_SEEN and bad > share * seen + 3 * sqrt(share * seen)
        if certain or likely:
            listed = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
            raise DataError(
                f"source {source.name!r} in {source.shards[0].path.parent}: {bad} of {seen} records ({bad / seen:.1%}) "
                f"cannot be used, allowed are {share:.1%}: {listed}. Repair the data, or raise the source's "
                f"allowed_rejects in the manifest"
            )


class _Batches(IterableDataset[_Parcel]):
    """A range of this rank's batches, of which DataLoader worker w makes every workers-th one.

    DataLoader collects from its workers in turn, beginning with worker 0; which batches are a worker's therefore
    depends on the first, so that batches keep their order wherever the range begins.
    """

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop

    def mine(self) -> range:
        """Return the numbers of the batches that this process makes."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return range(self.first + worker, self.stop, workers)

    def batches(self) -> Iterator[Batch | _Nothing]:
        """Make the batches that are this process's."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[_Parcel]:
        try:
            yield from self.batches()
        except DataError as error:
            yield _Failure(error)


class _TrainingBatches(_Batches):
    """This rank's share of the endless stream."""

    def __init__(
        self, mixture: Mixture, reader: ConversationReader, rank: int, ranks: int, first: int, stop: int
    ) -> None:
        super().__init__(first, stop)
        self.mixture, self.reader, self.rank, self.ranks = mixture, reader, rank, ranks

    def batches(self) -> Iterator[Batch]:
        """Make the batches that are this process's; every record of the mixture's order yields exactly one item."""
        mixture = self.mixture
        shards = ShardReader(capacity=mixture.lanes * len(mixture.sources))
        orders = [SourceOrder(source, mixture.seed, number) for number, source in enumerate(mixture.sources)]
        plan, lanes = None, dict[int, Lane]()
        for number in self.mine():
            batch = number * self.ranks + self.rank
            epoch, within = divmod(batch, mixture.batches_per_epoch)
            if plan is None or plan.epoch != epoch:
                plan, lanes = EpochPlan(mixture, epoch), {}
            place, lane = divmod(within, mixture.lanes)
            if lane not in lanes:
                lanes[lane] = Lane(plan, lane, place * mixture.batch_size)
            rejected: Counter[str] = Counter()
            items = [
                self._item(shards, orders, *lanes[lane].take(), index, rejected)
                for index in range(batch * mixture.batch_size, (batch + 1) * mixture.batch_size)
            ]
            yield collate(items, epoch, rejected)

    def _item(
        self,
        shards: ShardReader,
        orders: list[SourceOrder],
        source: int,
        candidates: Iterator[int],
        index: int,
        rejected: Counter[str],
    ) -> Item:
        """Return the first usable candidate; a rejection counts where the record itself was due, not as substitute."""
        name = self.mixture.sources[source].name
        reasons: Counter[str] = Counter()
        last = ""
        for position in candidates:
            try:
                conversation = self.reader(shards.read(*orders[source].locate(position)))
            except UnusableRecord as error:
                if not reasons:
                    rejected[f"{name}/{error.reason}"] += 1
                reasons[error.reason] += 1
                last = str(error)
                continue
            return Item(conversation, name, index)
        folder = self.mixture.sources[source].shards[0].path.parent
        listed = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
        raise DataError(
            f"source {name!r} in {folder}: none of {reasons.total()} records in a row can be used: {listed} "
            f"(the last: {last}). Repair the data or leave the source out"
        )


class _EvaluationBatches(_Batches):
    """This rank's batches of a finite split."""

    def __init__(
        self,
        sources: tuple[StreamSource, ...],
        reader: ConversationReader,
        batches: list[list[tuple[int, int]]],
        ranks: int,
    ) -> None:
        super().__init__(0, len(batches))
        self.sources, self.reader, self.contents, self.ranks = sources, reader, batches, ranks
        self.offsets = [0, *accumulate(source.samples for source in sources)]

    def batches(self) -> Iterator[Batch | _Nothing]:
        """Make the batches that are this process's; unusable records are left out, never replaced."""
        shards = ShardReader(capacity=len(self.sources) + 1)
        for number in self.mine():
            items: list[Item] = []
            rejected: Counter[str] = Counter()
            for source, position in self.contents[number]:
                try:
                    conversation = self.reader(shards.read(*_in_order(self.sources[source], position)))
                except UnusableRecord as error:
                    rejected[f"{self.sources[source].name}/{error.reason}"] += 1
                    continue
                items.append(Item(conversation, self.sources[source].name, self.offsets[source] + position))
            if not items and self.ranks > 1:  # a rank that skips a batch would leave the others waiting for it
                raise DataError(f"no record of an evaluation batch can be used ({dict(rejected)}): use larger batches")
            yield collate(items, rejected=rejected) if items else _Nothing(dict(rejected))


def _in_order(source: StreamSource, position: int) -> tuple[Any, int]:
    """Return the shard and the record in it at a position of a source as it was written."""
    for shard in source.shards:
        if position < shard.samples:
            return shard, position
        position -= shard.samples
    raise IndexError(position)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that never see SIGUSR1: SLURM sends it to every process of a step, and it would kill workers."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _deliver(dataset: _Batches, workers: int, pin_memory: bool, tally: RejectTally) -> Iterator[Batch]:
    """Yield a dataset's batches, through worker processes if there are any, and account for what was rejected."""
    options: dict[str, Any] = {}
    if workers:
        # Not fork: a process with threads (gloo, Lightning) may hang in it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        options = {"multiprocessing_context": context, "prefetch_factor": 2}
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options)
    with _signals_blocked():
        parcels: Iterable[_Parcel] = iter(loader)
    left_out: Counter[str] = Counter()
    try:
        for parcel in parcels:
            if isinstance(parcel, _Failure):
                raise parcel.error
            seen = parcel.records() if isinstance(parcel, Batch) else Counter[str]()
            if isinstance(dataset, _EvaluationBatches):  # a rejected record is not replaced by one that is seen
                seen.update(_by_source(parcel.rejected))
            tally.add(seen, parcel.rejected)
            left_out.update(parcel.rejected)
            if isinstance(parcel, Batch):
                parcel.rejected = dict(left_out)
                left_out.clear()
                yield parcel
    finally:
        del parcels  # stops the workers now, even if an error's traceback keeps this frame alive


def _by_source(rejected: dict[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for key, number in rejected.items():
        counts[key.rpartition("/")[0]] += number
    return counts


class TrainingLoader:
    """This rank's share of the planned stream: endless, of a nominal length, and resumable at the exact record.

    Iterating again goes on where the last iteration stopped. The state of a whole job is one number, the micro-batches
    that all ranks consumed, with the identity of what determines the order; it is the same on every rank, and any
    number of ranks x workers that divides the lanes may resume it.

    Args:
        mixture: the order.
        reader: raw record -> conversation.
        length: micro-batches of this rank until training ends.
        rank: this process.
        ranks: number of processes.
        workers: worker processes; 0 reads in this one.
        processed: micro-batches that training has finished with, for a state taken while one is in work.
        pin_memory: deliver batches in page-locked memory.

    Raises:
        ConfigError: if the lanes cannot be dealt to ranks x workers.
    """

    def __init__(
        self,
        mixture: Mixture,
        reader: ConversationReader,
        length: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        processed: Callable[[], int] | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_topology(mixture.lanes, ranks, workers)
        self.mixture, self.reader, self.length = mixture, reader, length
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self._processed, self._pin_memory = processed, pin_memory
        self._position = 0
        self._tally = RejectTally(mixture.sources)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        stop = (self._position // self.length + 1) * self.length
        dataset = _TrainingBatches(self.mixture, self.reader, self.rank, self.ranks, self._position, stop)
        for batch in _deliver(dataset, self.workers, self._pin_memory, self._tally):
            self._position += 1
            yield batch

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that must be the same for a run to go on with the same data."""
        return {**self.mixture.identity(), "turns": self.reader.turns}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches consumed by all ranks, and the stream's identity."""
        position = self._position if self._processed is None else min(self._position, self._processed())
        return {"global_batches": position * self.ranks, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            ConfigError: if the order has changed, or the consumed batches do not divide by the ranks.
        """
        saved, now = state["identity"], self.identity()
        changed = [f"{key} was {saved.get(key)!r} and is {now[key]!r}" for key in now if saved.get(key) != now[key]]
        if changed:
            raise ConfigError(
                f"the data of this checkpoint cannot be continued: {'; '.join(changed)}. Restore these settings, or "
                f"start a new run from the checkpoint's weights"
            )
        batches = int(state["global_batches"])
        if batches % self.ranks:
            fitting = [ranks for ranks in range(1, 65) if batches % ranks == 0 and self.mixture.lanes % ranks == 0]
            raise ConfigError(
                f"the checkpoint's {batches} micro-batches do not divide by {self.ranks} ranks: use one of {fitting}"
            )
        self._position = batches // self.ranks


class EvaluationLoader:
    """This rank's share of a finite split: every record once, in order, as many batches on every rank.

    Equal numbers of batches keep ranks in step. For that the records are spread evenly over the batches, of which one
    may hold a record more or less than asked. Records that cannot be used are left out and counted.

    Args:
        sources: the split's sources.
        reader: raw record -> conversation.
        batch_size: records per batch.
        rank: this process.
        ranks: number of processes.
        workers: worker processes; 0 reads in this one.
        limit: use at most so many records, the first of every source in proportion to its size.
        pin_memory: deliver batches in page-locked memory.

    Raises:
        ConfigError: if there are fewer records than ranks.
    """

    def __init__(
        self,
        sources: tuple[StreamSource, ...],
        reader: ConversationReader,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        limit: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.sources, self.reader, self.workers = sources, reader, workers
        self._ranks, self._pin_memory = ranks, pin_memory
        total = sum(source.samples for source in sources)
        share = 1.0 if limit is None else min(1.0, limit / total)
        ends = [round(end * share) for end in accumulate(source.samples for source in sources)]
        firsts = [0, *ends[:-1]]
        records = [(s, i) for s, (a, b) in enumerate(zip(firsts, ends, strict=True)) for i in range(b - a)]
        if len(records) < ranks:
            raise ConfigError(f"{len(records)} evaluation records cannot be split over {ranks} ranks")
        each = min(-(-len(records) // (ranks * batch_size)), len(records) // ranks)
        bounds = [len(records) * number // (each * ranks) for number in range(each * ranks + 1)]
        self._batches = [records[bounds[b] : bounds[b + 1]] for b in range(rank, each * ranks, ranks)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        dataset = _EvaluationBatches(self.sources, self.reader, self._batches, self._ranks)
        return _deliver(dataset, self.workers, self._pin_memory, RejectTally(self.sources))
