"""The doctor's look at data: lanes and shares, what there is of every source, and its first records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from pgp_lightning.data.conversation import Conversation, ConversationReader
from pgp_lightning.data.index import Shard
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

# Records of every source that are read whole: so many, from so many of its shards, both evenly spread.
LOOKED_AT, SHARDS_LOOKED_AT = 64, 8


def examine_mixture(data: InstructionData, ranks: int, batches: int | None = None) -> Iterator[Finding]:
    """Deal the lanes and, where all train sources have an index, plan the mixture as training does.

    Args:
        data: the data module.
        ranks: number of processes.
        batches: micro-batches of all ranks until training ends, where that is known.

    Raises:
        ConfigError: if the manifest is wrong, or the settings do not suit ranks or data.
        DataError: if an index or a shard is damaged.
    """
    check_topology(data.lanes, ranks, data.workers)
    readers = max(1, data.workers)
    yield Finding("ok", "lanes", f"{data.lanes} lanes for {ranks} ranks x {readers} readers")
    manifest = data.read_manifest()
    sources = manifest.splits.get("train", ())
    if not sources or not all(source.built for source in sources):
        return
    mixture = data.plan(tuple(map(StreamSource.load, sources)), manifest.weights)
    taken = list(zip(mixture.sources, mixture.takes, mixture.passes, strict=True))
    if small := [source.name for source, take, _ in taken if take < data.lanes * data.batch_size]:
        told = f"an epoch has fewer records of {', '.join(small)} than lanes x batch_size"
        yield Finding("warn", "lanes", f"{told} = {data.lanes} x {data.batch_size}: fewer lanes spread them better")
    if (shards := sum(len(source.shards) for source, _, _ in taken)) < ranks * readers:
        told = f"{shards} shards for {ranks * readers} readers, several of which read one file"
        yield Finding("warn", "shards", f"{told}: right, but slow where a file is; build them with fewer records each")
    if manifest.weights != "count":
        told = ", ".join(f"{source.name} {passes:.2f}" for source, _, passes in taken)
        yield Finding("ok", "shares", f"weights {manifest.weights}: passes over a source in an epoch: {told}")
    if batches is not None:
        epochs = batches / mixture.batches_per_epoch
        told = ", ".join(f"{source.name} {epochs * passes:.2f}" for source, _, passes in taken)
        records = batches * data.batch_size
        yield Finding("ok", "epochs", f"the run reads {records:,} records, {epochs:.2f} epochs; passes: {told}")
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
    """Count a source's records and read some of them as training would."""
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
    longest, shards, reasons, literal = 0, ShardReader(capacity=1), Counter[str](), Counter[str]()
    numbers = list(_looked_at(index.shards))
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
        literal.update(_special_tokens(conversation, processor))
        system = conversation.system
        prompts = [processor.prompt(t.question, t.answer, "question_first", system) for t in conversation.turns]
        text = max(len(prompt.before) + len(prompt.after) + len(prompt.answer) for prompt in prompts)
        rows.append((text, max(len(prompt.answer) for prompt in prompts), len(prompts)))
        longest = max(longest, text + conversation.grid.tokens)
    bad, budget = sum(reasons.values()) / len(numbers), data.max_length or processor.max_length
    detail += f"; of {len(numbers)} of them: longest {longest} of at most {budget} slots"
    detail += "".join(f", {count} {reason}" for reason, count in reasons.items())
    if literal:
        found = ", ".join(f"{token} {count}" for token, count in sorted(literal.items()))
        detail += f"; texts hold special tokens, which the tokenizer takes for such: {found}: take them out of the text"
    state: Literal["ok", "warn", "fail"] = "warn" if literal else "ok"
    return Finding("fail" if bad > source.allowed_rejects else state, name, detail)


def _looked_at(shards: Sequence[Shard]) -> Iterator[tuple[Shard, int]]:
    """Yield shards and records in them, both evenly spread: files are often sorted, and the first records alike."""
    few = min(len(shards), SHARDS_LOOKED_AT)
    for shard in (shards[nth] for nth in _spread(len(shards), few)):
        yield from ((shard, number) for number in _spread(shard.samples, LOOKED_AT // few))


def _spread(length: int, count: int) -> list[int]:
    """Return at most `count` places of so many, evenly spread, the first and the last among them."""
    return [round(place) for place in np.linspace(0, length - 1, min(count, length)).tolist()]


def _special_tokens(conversation: Conversation, processor: Processor) -> set[str]:
    """Return the model's special tokens that stand in a conversation's texts."""
    texts = [conversation.system or "", *(text for turn in conversation.turns for text in (turn.question, turn.answer))]
    return {token for token in processor.tokenizer.all_special_tokens if any(token in text for text in texts)}


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
