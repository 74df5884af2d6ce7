"""The doctor's look at data: lanes and shares, what there is of every source, and its first records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.manifest import Source
from pgp_lightning.data.mixture import Mixture, StreamSource, check_topology
from pgp_lightning.data.module import InstructionData
from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.data.rejects import DAMAGED
from pgp_lightning.data.roots import public
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.data.writing import make_builder
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.finding import Finding, failed
from pgp_lightning.vlm.memory import GIB
from pgp_lightning.vlm.processor import Processor

__all__ = ["examine_mixture", "examine_sources"]

LOOKED_AT = 64  # records of every source that are read whole


def examine_mixture(data: InstructionData, ranks: int) -> Iterator[Finding]:
    """Deal the lanes and, where all train sources have an index, plan the mixture as training does.

    Raises:
        ConfigError: if the manifest is wrong, or the settings do not suit ranks or data.
        DataError: if an index or a shard is damaged.
    """
    check_topology(data.lanes, ranks, data.workers)
    yield Finding("ok", "lanes", f"{data.lanes} lanes for {ranks} ranks x {max(1, data.workers)} readers")
    manifest = data.read_manifest()
    sources = manifest.splits.get("train", ())
    if not sources or not all(source.built for source in sources):
        return
    mixture = data.plan(tuple(map(StreamSource.load, sources)), manifest.weights)
    taken = list(zip(mixture.sources, mixture.takes, mixture.passes, strict=True))
    if small := [source.name for source, take, _ in taken if take < data.lanes * data.batch_size]:
        told = f"an epoch has fewer records of {', '.join(small)} than lanes x batch_size"
        yield Finding("warn", "lanes", f"{told} = {data.lanes} x {data.batch_size}: fewer lanes spread them better")
    if manifest.weights != "count":
        told = ", ".join(f"{source.name} {passes:.2f}" for source, _, passes in taken)
        yield Finding("ok", "shares", f"weights {manifest.weights}: passes over a source in an epoch: {told}")
    if manifest.url is not None:
        yield _cache(data, mixture)


def _cache(data: InstructionData, mixture: Mixture) -> Finding:
    """Compare the cache with the shards that are read in turn: every lane is within one of every source."""
    sizes = [sorted((shard.bytes for shard in source.shards), reverse=True) for source in mixture.sources]
    most, limit = sum(sum(each[: mixture.lanes]) for each in sizes) / GIB, data.cache.limit_bytes / GIB
    told = f"about {most:.1f} GiB of shards are read in turn, the cache {data.cache.folder} holds {limit:.1f}"
    if most <= limit:
        return Finding("ok", "cache", told)
    return Finding("warn", "cache", f"{told}: shards will be fetched again and again; raise data.cache_gib")


def examine_sources(
    data: InstructionData, processor: Processor | None, rows: list[tuple[int, int, int]]
) -> Iterator[Finding]:
    """Look at every source of every split.

    Args:
        data: the data module.
        processor: of data.base, if that is here.
        rows: gets longest text and answer in slots and the number of turns of every record that is read.

    Raises:
        ConfigError: if the manifest is wrong.
    """
    for split, sources in data.read_manifest().splits.items():
        for source in sources:
            try:
                yield _source(source, data, processor, rows)
            except (ConfigError, DataError, OSError) as error:
                yield failed(f"{split}/{source.name}", error)


def _source(
    source: Source, data: InstructionData, processor: Processor | None, rows: list[tuple[int, int, int]]
) -> Finding:
    """Count a source's records and read the first ones as training would."""
    name = f"{source.split}/{source.name}"
    if not source.built and source.url is not None:
        told = f"its index is fetched from {public(source.url)} when a run prepares its data"
        return Finding("warn", name, f"{told}; nothing of it could be examined")
    if not source.built and source.build is not None:
        return Finding("ok", name, f"{_buildable(source)} records, to be built on first use")
    index = source.index()
    detail = f"{index.samples} records in {len(index.shards)} shards"
    if source.url is not None:
        return Finding("ok", name, f"{detail}, fetched from {public(source.url)} when they are read, and unread here")
    if processor is None:
        return Finding("warn", name, f"{detail}, unread: data.base is not there")
    reader = ConversationReader(processor, data.turns, data.max_length, data.max_tiles)
    longest, shards, reasons = 0, ShardReader(capacity=1), Counter[str]()
    numbers = list(islice(((shard, i) for shard in index.shards for i in range(shard.samples)), LOOKED_AT))
    for shard, number in numbers:
        try:
            conversation = reader(shards.read(shard, number), source.max_tiles)
        except UnusableRecord as unusable:
            reasons[unusable.reason] += 1
            continue
        except DataError:
            if source.on_damage == "fail":
                raise
            reasons[DAMAGED] += 1
            continue
        prompts = [processor.prompt(t.question, t.answer, "question_first") for t in conversation.turns]
        text = max(len(prompt.before) + len(prompt.after) + len(prompt.answer) for prompt in prompts)
        rows.append((text, max(len(prompt.answer) for prompt in prompts), len(prompts)))
        longest = max(longest, text + conversation.grid.tokens)
    bad, budget = sum(reasons.values()) / len(numbers), data.max_length or processor.max_length
    detail += f"; of the first {len(numbers)}: longest {longest} of at most {budget} slots"
    detail += "".join(f", {count} {reason}" for reason, count in reasons.items())
    return Finding("fail" if bad > source.allowed_rejects else "ok", name, detail)


def _buildable(source: Source) -> int:
    """Return how many records a source would be built of.

    Raises:
        ConfigError: if what it would be built of is not there.
    """
    builder = make_builder(source)
    try:
        builder.identity()  # looks for all that it needs
        return len(builder)
    except OSError as error:
        raise ConfigError(
            f"{source.folder} has no shards, and what they would be made of is missing: {error}"
        ) from error
