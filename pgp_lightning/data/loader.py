"""Loaders: an endless, sized, stateful one for training, and a finite one in order for evaluation.

Lightning asks a training loader for `state_dict`, restores it before iterating, and prefetches only loaders without a
length; hence one sized loader for the whole of training, of which Lightning sees a single epoch.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from pgp_lightning.data.batches import BatchRange, EvaluationBatches, Failure, Parcel, TrainingBatches
from pgp_lightning.data.collate import Batch
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.mixture import Mixture, StreamSource, check_topology
from pgp_lightning.data.parent_watch import end_with_parent
from pgp_lightning.data.rejects import RejectTally, rejects_by_source
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.tile_pool import TilePool
from pgp_lightning.errors import ConfigError

__all__ = ["FORMERLY", "EvaluationLoader", "TrainingLoader"]

# What settings were before they could be chosen; checkpoints of that time do not have them.
FORMERLY: dict[str, Any] = {"weights": "count", "mixing": "random", "group_batches": 1, "own_max_tiles": {}}

_OVERFIT = "overfit_batches x processes"  # the name for it in messages; `repeat` is a key of manifests
_KEPT_BYTES = 31 << 20  # glibc passes over blocks of 32 MiB and more


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that never see SIGUSR1: SLURM sends it to every process of a step, and it would kill workers."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _begin_worker(worker: int) -> None:
    """Prepare a worker process: it ends with its parent, and keeps the memory that it frees."""
    end_with_parent()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep what was freed, or a picture's buffers would be mapped anew for every picture.

    Its limits for giving memory back grow with the largest block that was freed, so one is made, and never written to.
    """
    np.empty(_KEPT_BYTES, dtype=np.uint8)


def _deliver(dataset: BatchRange, workers: int, pin_memory: bool, tally: RejectTally) -> Iterator[Batch]:
    """Yield a dataset's batches, through worker processes if there are any, and account for what was rejected."""
    options: dict[str, Any] = {}
    if workers:
        # Not fork: a process with threads (gloo, Lightning) may hang in it.
        context = multiprocessing.get_context("forkserver")
        # What a worker needs to unpickle its reader is imported once, in the server.
        context.set_forkserver_preload([__name__, "pgp_lightning.vlm.processor"])
        options = {"multiprocessing_context": context, "prefetch_factor": 2, "worker_init_fn": _begin_worker}
        if sys.platform == "linux":  # elsewhere tiles travel as any tensor does
            dataset.pool = TilePool(workers, dataset.most_bytes())
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options)
    with _signals_blocked():
        parcels: Iterable[Parcel] = iter(loader)
    left_out: Counter[str] = Counter()
    finite, held = isinstance(dataset, EvaluationBatches), None
    try:
        for parcel in parcels:
            if isinstance(parcel, Failure):
                raise parcel.error
            seen = parcel.records() if isinstance(parcel, Batch) else Counter[str]()
            if finite:  # a rejected record is not replaced by one that is seen
                seen.update(rejects_by_source(parcel.rejected))
            tally.add(seen, parcel.rejected)
            left_out.update(parcel.rejected)
            if isinstance(parcel, Batch):
                parcel.rejected = dict(left_out)
                left_out.clear()
                if not finite:
                    yield parcel
                    continue
                if held is not None:
                    yield held
                held = parcel  # until it is known whether what follows leaves nothing but rejects to tell of
        if held is not None:
            held.rejected = dict(Counter(held.rejected) + left_out)
            yield held
    finally:
        del parcels  # stops the workers now, even if an error's traceback keeps this frame alive


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
        cache: where shards are fetched to; not needed for those that are read in place.
        repeat: deliver the stream's first micro-batches, so many of all ranks together, over and over.

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
        cache: ShardCache | None = None,
        repeat: int | None = None,
    ) -> None:
        check_topology(mixture.lanes, ranks, workers)
        self.mixture, self.reader, self.length = mixture, reader, length
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self._processed, self._pin_memory, self._cache, self._repeat = processed, pin_memory, cache, repeat
        self._position = 0
        self._tally = RejectTally(mixture.sources)
        self.waited = 0.0
        """Seconds spent in waiting for batches, without what trainers do around it."""

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        stop = (self._position // self.length + 1) * self.length
        dataset = TrainingBatches(
            self.mixture, self.reader, self.rank, self.ranks, self._position, stop, self._cache, self._repeat
        )
        began = time.perf_counter()
        for batch in _deliver(dataset, self.workers, self._pin_memory, self._tally):
            self._position += 1
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that must be the same for a run to go on with the same data."""
        own = {source.name: source.max_tiles for source in self.mixture.sources if source.max_tiles is not None}
        identity = {**self.mixture.identity(), "turns": self.reader.turns, "own_max_tiles": own}
        identity[_OVERFIT] = self._repeat
        if self.mixture.group_batches > 1:  # what the records' estimated sizes depend on
            rule = self.reader.rule()
            identity["tile_rule"] = [rule.tile_size, rule.tokens_per_side, rule.min_tiles, rule.thumbnail, rule.fit]
            identity["max_tiles"] = [self.reader.rule(source.max_tiles).max_tiles for source in self.mixture.sources]
            identity["max_length"] = self.reader.budget
        return identity

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches consumed by all ranks, and the stream's identity."""
        position = self._position if self._processed is None else min(self._position, self._processed())
        return {"global_batches": position * self.ranks, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            ConfigError: if the order has changed, or the consumed batches do not divide by the ranks.
        """
        saved, now = {**FORMERLY, _OVERFIT: None, **state["identity"]}, self.identity()
        both = [key for key in now if key in saved]
        changed = [f"{key} was {saved[key]!r} and is {now[key]!r}" for key in both if saved[key] != now[key]]
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
        cache: where shards are fetched to; not needed for those that are read in place.

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
        cache: ShardCache | None = None,
    ) -> None:
        self.sources, self.reader, self.workers = sources, reader, workers
        self._ranks, self._pin_memory, self._cache = ranks, pin_memory, cache
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
        dataset = EvaluationBatches(self.sources, self.reader, self._batches, self._ranks, self._cache)
        return _deliver(dataset, self.workers, self._pin_memory, RejectTally(self.sources))
