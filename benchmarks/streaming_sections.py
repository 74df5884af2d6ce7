"""What `streaming.py` measures besides speed: padding, the cost of estimating sizes, restarting, memory."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from streaming_data import SHARDS, mix

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.grouping import SlotEstimate, lane_batches
from pgp_lightning.data.index import Shard
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import EpochPlan, Mixture, SourceOrder, StreamSource
from pgp_lightning.data.shards import ShardReader

__all__ = [
    "SECTIONS",
    "Bench",
    "length",
    "lengths_of_batches",
    "padding",
    "processes",
    "processor_seconds",
    "resident",
    "slope",
]

_TICK = os.sysconf("SC_CLK_TCK")
_RESTARTS = 3


@dataclass(frozen=True)
class Bench:
    """What every measurement is made with.

    Args:
        sources: the written records.
        reader: raw record -> conversation.
        batch_size: records of a batch.
        workers: worker processes where there are any.
        passes: over all records, to watch memory.
    """

    sources: tuple[StreamSource, ...]
    reader: ConversationReader
    batch_size: int
    workers: int
    passes: float

    @property
    def samples(self) -> int:
        """Number of records."""
        return sum(source.samples for source in self.sources)


def processes() -> list[int]:
    """Return this process and all that it started, directly or not."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [os.getpid()]
    for one in found:
        found += parents.get(one, [])
    return found


def processor_seconds(ids: list[int]) -> float:
    """Return the processor seconds that processes have used, those that have ended apart."""
    return sum(int(fields[11]) + int(fields[12]) for one in ids if (fields := _stat(one))) / _TICK


def _stat(process: int) -> list[str]:
    """Return a process's fields of /proc from its state on; none if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def resident(ids: list[int]) -> int:
    """Return the resident bytes of processes, shared pages counted in each."""
    return sum(int(fields[21]) for one in ids if (fields := _stat(one))) * os.sysconf("SC_PAGE_SIZE")


def padding(lengths: list[list[int]]) -> float:
    """Return which share of the slots of batches is padding, given the lengths of their rows."""
    return 1 - sum(map(sum, lengths)) / sum(len(rows) * max(rows) for rows in lengths)


def slope(x: list[float], y: list[float]) -> float:
    """Return the slope of the line through points that has the least squares."""
    a, b = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    return float((a * b).sum() / (a * a).sum())


def _orders(mixture: Mixture) -> list[SourceOrder]:
    return [SourceOrder(source, mixture.seed, number) for number, source in enumerate(mixture.sources)]


def measure_padding(bench: Bench) -> dict[str, Any]:
    """Print the share of padding of an epoch's batches, from the records' own lengths."""
    shards, estimate = ShardReader(SHARDS), SlotEstimate(bench.reader)
    lengths: dict[tuple[Path, int], tuple[int, int]] = {}
    for source in bench.sources:
        for shard in source.shards:
            for number in range(shard.samples):
                text = shards.read_text(shard, number)
                lengths[shard.path, number] = length(bench.reader, text), estimate(text, _unknown)
    true, guessed = zip(*lengths.values(), strict=True)
    print(
        f"slots of a record: least {min(true)}, median {statistics.median(true):.0f}, most {max(true)}; "
        f"correlation with the estimate {np.corrcoef(true, guessed)[0, 1]:.3f}"
    )
    print("| batch size | group_batches | padding |\n|---:|---:|---:|")
    found = {}
    for size in (4, 8):
        for group in (1, 8):
            batches = list(lengths_of_batches(mix(bench.sources, size, group), lengths))
            found[f"{size}, {group}"] = padding(batches)
            print(f"| {size} | {group} | {100 * padding(batches):.1f} % |")
    return found


def _unknown() -> tuple[int, int]:
    raise AssertionError("every record states its size")


def length(reader: ConversationReader, text: bytes | None) -> int:
    """Return a record's slots: visual tokens and prompt with answer."""
    record = json.loads(text or b"")
    turn = record["turns"][0]
    grid = reader.rule().grid(record["width"], record["height"])
    return reader.processor.prompt_length(turn["question"], turn["answer"], grid.tokens, record.get("system"))


def lengths_of_batches(mixture: Mixture, lengths: dict[tuple[Path, int], tuple[int, int]]) -> Iterator[list[int]]:
    """Yield the rows' lengths of every batch of an epoch."""
    plan, orders = EpochPlan(mixture, 0), _orders(mixture)

    def place(source: int, position: int) -> tuple[int, int]:
        shard, number = orders[source].locate(position)
        return lengths[shard.path, number % shard.samples]

    for lane in range(mixture.lanes):
        for batch in lane_batches(plan, lane, 0, lambda source, position: place(source, position)[1]):
            yield [place(source, next(candidates))[0] for source, candidates in batch]


def measure_estimates(bench: Bench) -> dict[str, Any]:
    """Print the time that reading texts and estimating sizes takes of an epoch of grouped batches."""
    mixture = mix(bench.sources, bench.batch_size, 8)
    orders = _orders(mixture)
    due: list[tuple[Shard, int]] = [
        order.locate(position) for order in orders for position in range(order.source.samples)
    ]
    shares = []
    for _ in range(_RESTARTS):
        shards, estimate = ShardReader(SHARDS), SlotEstimate(bench.reader)
        for source in bench.sources:
            for shard in source.shards:
                shards.read_text(shard, 0)  # tables are read once, with or without estimates
        start = time.process_time()
        for shard, number in due:
            estimate(shards.read_text(shard, number), _unknown)
        spent = time.process_time() - start
        start = time.process_time()
        for _ in TrainingLoader(mixture, bench.reader, mixture.batches_per_epoch):
            pass
        shares.append((spent, time.process_time() - start))
    each = statistics.median(spent for spent, _ in shares) / len(due)
    share = statistics.median(spent / whole for spent, whole in shares)
    print(f"{1e6 * each:.0f} µs of processor a sample, {100 * share:.2f} % of a grouped epoch without workers")
    return {"seconds": each, "share": share}


def measure_restart(bench: Bench) -> dict[str, Any]:
    """Print the seconds from making a loader with a state to its first batch."""
    print("| workers | group_batches | at 0 % | at 95 % |\n|---:|---:|---|---|")
    found = {}
    for workers in dict.fromkeys((0, bench.workers)):
        for group in (1, 8):
            mixture = mix(bench.sources, bench.batch_size, group)
            whole = mixture.batches_per_epoch
            seconds: dict[float, list[float]] = {0.0: [], 0.95: []}
            for _ in range(_RESTARTS):
                for share, times in seconds.items():
                    start = time.perf_counter()
                    loader = TrainingLoader(mixture, bench.reader, whole, workers=workers)
                    loader.load_state_dict({"global_batches": int(share * whole), "identity": loader.identity()})
                    batches = iter(loader)
                    next(batches)
                    times.append(time.perf_counter() - start)
                    del batches
            cells = [f"{statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})" for t in seconds.values()]
            print(f"| {workers} | {group} | {cells[0]} | {cells[1]} |")
            found[f"{workers}, {group}"] = {str(share): times for share, times in seconds.items()}
    return found


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Print how resident memory grows over many records, of this process and its workers together."""
    mixture = mix(bench.sources, bench.batch_size, 8)
    total = int(bench.passes * mixture.batches_per_epoch)
    found = {}
    for workers in dict.fromkeys((0, bench.workers)):
        loader: Iterator[Batch] = iter(TrainingLoader(mixture, bench.reader, total, workers=workers))
        counts, sizes, mine = list[float](), list[float](), list[int]()
        every = max(1, total // 200)
        for number, batch in enumerate(islice(loader, total), start=1):
            if number % every == 0:
                mine = mine or processes()
                counts.append(number * bench.batch_size)
                sizes.append(resident(mine))
            del batch
        later = len(counts) // 4
        grown = slope(counts[later:], sizes[later:])
        print(
            f"{workers} workers, {total * bench.batch_size:,} samples: {sizes[later] / 2**20:,.0f} MiB after a "
            f"quarter, {sizes[-1] / 2**20:,.0f} MiB at the end, slope {grown:+,.1f} bytes a sample"
        )
        found[str(workers)] = {"samples": counts, "bytes": sizes, "slope": grown}
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "padding": measure_padding,
    "estimates": measure_estimates,
    "restart": measure_restart,
    "memory": measure_memory,
}
