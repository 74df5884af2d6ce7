"""Measure the data path: our loader against decoding and tiling alone, plain reading, and other libraries' loaders.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --tile-size 448 --max-tiles 6 --samples 1024

Makes its own records (`streaming_data.py`): JPEG pictures as large as photographs in four sources of skewed sizes.
Everything runs in turns of random order on the same records, without workers a few records at a time, and is divided
by one limit: `bare`, which holds the records' bytes in memory and reads, checks, tokenises, decodes, tiles and collates
them as training does, with no loader around it. The clock leaves out the first twentieth of a pass and, with workers,
the last, so that starting and stopping them is not in it. Figures are medians, with the least and the most in
brackets, and shares medians of each turn's; processor seconds are of the workers alone and vary less on a machine that
others use.
With workers the limit is `bare` in as many processes at once. `--sections` has more: padding, the cost of estimating
sizes, restarting, memory.

litdata and Hugging Face datasets are measured where they are installed (`pip install litdata datasets`). Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming_data import in_memory, mix, write_sources
from streaming_peers import Make, convert, loader_options, peers
from streaming_sections import SECTIONS, Bench, processes, processor_seconds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pgp_lightning.data.collate import Batch, collate
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import StreamSource
from pgp_lightning.data.records import RawRecord
from pgp_lightning.vlm.tiles import cut_tiles

GROUP = 8  # batches of a lane that are sorted together
PIECE = 16  # records of a variant without workers before another one's turn
EDGE = 0.05  # share of a pass before the clock starts, and after it stops
LEAST = 0.9  # of what the bare loop does per worker

# Pictures by key, before they are a batch.
Tiles = list[tuple[str, np.ndarray]]


@dataclass
class Variant:
    """One way of going through all records.

    Attributes:
        make: pieces of a pass; the length of a piece is its number of records.
        workers: processes that do the work; 0 is this one.
        limit: name of the variant that does the same without a loader, None where there is no such thing.
        seconds: of every timed run, per record.
        processor: processor seconds of the same, of the workers, or of this process if there are none.
        receiving: those of this process if there are workers.
    """

    make: Callable[[], Iterable[Sized]]
    workers: int = 0
    limit: str | None = None
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    receiving: list[float] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Records per second and worker."""
        return [1 / (one * max(1, self.workers)) for one in self.seconds]


def read_files(sources: tuple[StreamSource, ...]) -> Iterator[Sized]:
    """Read the shards from end to end."""
    for source in sources:
        for shard in source.shards:
            with shard.path.open("rb") as file:
                while file.read(1 << 20):
                    pass
            yield range(shard.samples)


def read_tars(sources: tuple[StreamSource, ...]) -> Iterator[Sized]:
    """Read the shards' members one after the other."""
    for source in sources:
        for shard in source.shards:
            keys = set()
            with tarfile.open(shard.path, "r:") as tar:
                for member in tar:
                    opened = tar.extractfile(member)
                    if opened is not None:
                        opened.read()
                    keys.add(member.name.partition(".")[0])
            yield keys


def decode(records: Sequence[RawRecord], reader: ConversationReader, batch_size: int) -> Iterator[Tiles]:
    """Decode and tile pictures whose bytes are in memory, and do nothing else."""
    for first in range(0, len(records), batch_size):
        yield [
            (record.key, cut_tiles(reader.open_image(record.key, record.image or b""), reader.rule())[0])
            for record in records[first : first + batch_size]
        ]


def bare(records: Sequence[RawRecord], reader: ConversationReader, batch_size: int) -> Iterator[Batch]:
    """Make batches of records whose bytes are in memory."""
    for first in range(0, len(records), batch_size):
        some = records[first : first + batch_size]
        yield collate([convert(reader, record.key, record.image or b"", record.text or b"") for record in some])


class BareWorkers(IterableDataset[bytes]):
    """Does in every worker what `bare` does, and hands nothing over but as many zeros as a batch has rows."""

    def __init__(self, sources: tuple[StreamSource, ...], reader: ConversationReader, batch_size: int) -> None:
        self.sources, self.reader, self.batch_size = sources, reader, batch_size

    def __iter__(self) -> Iterator[bytes]:
        info = get_worker_info()
        part, parts = (info.id, info.num_workers) if info else (0, 1)
        for batch in bare(in_memory(self.sources, part, parts), self.reader, self.batch_size):
            yield bytes(len(batch))


def ours(bench: Bench, group: int, workers: int) -> Iterator[Batch]:
    """Go through an epoch of our loader."""
    mixture = mix(bench.sources, bench.batch_size, group)
    return iter(TrainingLoader(mixture, bench.reader, mixture.batches_per_epoch, workers=workers))


def variants_of(bench: Bench, others: dict[str, Make], workers: int) -> dict[str, Variant]:
    """Return all variants by name, limits first."""
    sources, reader, size = bench.sources, bench.reader, bench.batch_size
    records = in_memory(sources)
    many = f"bare, {workers} workers"

    def in_workers() -> Iterator[bytes]:
        dataset = BareWorkers(sources, reader, size)
        return iter(DataLoader(dataset, batch_size=None, **loader_options(workers)))

    found = {
        "files, plain reads": Variant(partial(read_files, sources)),
        "files, tarfile": Variant(partial(read_tars, sources)),
        "decode and tile alone": Variant(partial(decode, records, reader, size)),
        "bare": Variant(partial(bare, records, reader, size), limit="bare"),
    }
    loaders: dict[str, Make] = {
        "ours": partial(ours, bench, 1),
        f"ours, groups of {GROUP}": partial(ours, bench, GROUP),
        **others,
    }
    found |= {name: Variant(partial(make, 0), limit="bare") for name, make in loaders.items()}
    if workers:
        found[many] = Variant(in_workers, workers, many)
        for name, make in loaders.items():
            found[f"{name}, {workers} workers"] = Variant(partial(make, workers), workers, many)
    return found


def pixels(piece: Sized) -> Iterator[tuple[str, int]]:
    """Yield key and checksum of every picture's tiles in a piece, nothing where it has no pictures."""
    if isinstance(piece, Batch):
        tiles, first = piece.request.tiles.numpy(), 0
        for key, grid in zip(piece.keys, piece.request.grids, strict=True):
            yield key, zlib.crc32(tiles[first : first + grid.tiles].tobytes())
            first += grid.tiles
    elif isinstance(piece, list):
        for key, tiles in piece:
            yield key, zlib.crc32(tiles.tobytes())


def check_same(variants: dict[str, Variant], samples: int) -> int:
    """Go through every variant once, which also brings all files into memory, and return the checksum of the pixels.

    Raises:
        SystemExit: if a variant gives other records or other pixels than the others.
    """
    expected: dict[str, int] | None = None
    for name, variant in variants.items():
        count, found, pictures = 0, {}, 0
        for piece in variant.make():
            count += len(piece)
            for key, checksum in pixels(piece):
                found[key] = checksum
                pictures += 1
        if found and expected is None:
            expected = found
        if count != samples or (found and (found != expected or pictures != samples)):
            raise SystemExit(f"{name} went through {count} records, of which {len(found)} are not those of the others")
    return zlib.crc32(json.dumps(sorted((expected or {}).items())).encode())


def time_in_turns(variants: Sequence[Variant], samples: int, generator: random.Random) -> None:
    """Time a pass of variants without workers, some records of each in turn, so that all meet the same machine."""
    passes = [_pieces_of(variant, samples) for variant in variants]
    while passes:
        for one in generator.sample(passes, len(passes)):
            if next(one, None) is None:
                passes.remove(one)


def _pieces_of(variant: Variant, samples: int) -> Iterator[int]:
    """Go through a pass and pause, with the clock stopped, after some records; yield their number."""
    count = before = timed = 0
    seconds = processor = 0.0
    start = time.perf_counter(), time.process_time()
    for piece in variant.make():
        count += len(piece)
        if count - before < PIECE:
            continue
        if before >= EDGE * samples:
            seconds += time.perf_counter() - start[0]
            processor += time.process_time() - start[1]
            timed += count - before
        yield count - before
        before = count
        start = time.perf_counter(), time.process_time()
    variant.seconds.append(seconds / timed)
    variant.processor.append(processor / timed)
    variant.receiving.append(0.0)


def time_pass(variant: Variant, samples: int) -> None:
    """Time a pass of a variant with workers between its edges, where all of them work."""
    count, first, before = 0, 0, len(variant.seconds)
    start = 0.0
    mine, spent = list[int](), list[float]()
    for piece in variant.make():
        count += len(piece)
        if not first and count >= EDGE * samples:
            mine = processes()
            first, spent, start = count, _spent(mine), time.perf_counter()
        elif count >= (1 - EDGE) * samples and len(variant.seconds) == before:
            variant.seconds.append((time.perf_counter() - start) / (count - first))
            here, workers = ((b - a) / (count - first) for a, b in zip(spent, _spent(mine), strict=True))
            if len(mine) > len(set(mine) & set(processes())):
                workers = float("nan")  # one has ended, with so few records, and its seconds are not known
            variant.processor.append(workers)
            variant.receiving.append(here)


def _spent(mine: list[int]) -> list[float]:
    """Return the processor seconds of this process, and of its workers."""
    return [processor_seconds(mine[:1]), processor_seconds(mine[1:])]


def ratio(variants: dict[str, Variant], name: str, to: str) -> tuple[float, float]:
    """Return a variant's speed per worker over another's: by the clock, and by the processor seconds of its workers.

    The ratio is taken turn by turn, since a turn's speeds were measured close to each other, and then the median.
    """
    one, other = variants[name], variants[to]
    clock = statistics.median(a / b for a, b in zip(one.speeds, other.speeds, strict=True))
    processor = statistics.median(b / a if a else math.inf for a, b in zip(one.processor, other.processor, strict=True))
    return clock, processor


def print_speeds(variants: dict[str, Variant]) -> None:
    """Print the table of speeds."""
    print("| variant | samples/s per worker | processor ms a sample | receiving | share of the limit | by processor |")
    print("|---|---|---|---|---|---|")
    for name, variant in variants.items():
        speeds = variant.speeds
        cells = [name, f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"]
        milliseconds = [1000 * statistics.median(one) for one in (variant.processor, variant.receiving)]
        cells += [f"{milliseconds[0]:.2f}", f"{milliseconds[1]:.2f}" if variant.workers else ""]
        cells += [f"{share:.2f}" for share in ratio(variants, name, variant.limit)] if variant.limit else ["", ""]
        print(f"| {' | '.join(cells)} |")


def print_verdict(variants: dict[str, Variant], others: Iterable[str]) -> None:
    """Print whether ours reaches its share of the limit, and what it is to the fastest of the others."""
    peer_names = tuple(others)
    for name, variant in variants.items():
        if not name.startswith("ours") or variant.limit is None:
            continue
        rivals = [n for n, v in variants.items() if n.startswith(peer_names) and v.workers == variant.workers]
        for kind, way in enumerate(("clock", "processor") if rivals else ()):
            share = ratio(variants, name, variant.limit)[kind]
            against = min(rivals, key=lambda rival: ratio(variants, name, rival)[kind])
            if math.isnan(share):
                continue
            print(
                f"{name}, by {way}: {share:.3f} of {variant.limit} (wanted: at least {LEAST}, "
                f"{'reached' if share >= LEAST else 'MISSED'}), {ratio(variants, name, against)[kind]:.3f} of {against}"
            )


def measure_speed(bench: Bench, folder: Path, workers: int, repeats: int, only: str = "") -> dict[str, Any]:
    """Check that all variants do the same work, time them in turns, and print.

    Args:
        bench: what is measured with.
        folder: for other libraries' formats.
        workers: of the variants that have some.
        repeats: timed turns.
        only: what the names of variants must hold to be measured, limits apart.
    """
    others, missing = peers(bench.sources, folder, bench.reader, bench.batch_size)
    print("\n".join(missing))
    variants = variants_of(bench, others, workers)
    variants = {name: one for name, one in variants.items() if only in name or name.startswith("bare")}
    checksum = check_same(variants, bench.samples)
    generator = random.Random(0)
    alone, with_workers = ([v for v in variants.values() if bool(v.workers) == some] for some in (False, True))
    for _ in range(repeats):
        time_in_turns(alone, bench.samples, generator)
        # In another order each time: what comes after the same neighbour every time is measured with its traces.
        for variant in generator.sample(with_workers, len(with_workers)):
            time_pass(variant, bench.samples)
    print_speeds(variants)
    print_verdict(variants, others)
    found = {
        name: {key: value for key, value in asdict(replace(variant, make=list)).items() if key != "make"}
        | {"speed": statistics.median(variant.speeds), "of_bare": ratio(variants, name, "bare")[0]}
        for name, variant in variants.items()
    }
    return {"checksum": checksum, "missing": missing, "variants": found}


def main(arguments: list[str] | None = None) -> None:
    """Make the records, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=("speed", *SECTIONS), default=["speed"])
    parser.add_argument("--samples", type=int, default=2048, help="records in all; a power of two, at least 64")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--workers", type=int, default=2, help="worker processes; 0 leaves variants with them out")
    parser.add_argument("--only", default="", help="measure variants with this in their names, such as '2 workers'")
    parser.add_argument("--base", default="embedded:guide", help="whose processor is used")
    parser.add_argument("--tile-size", type=int, help="tile as InternVL does, so many pixels a tile, 28 a token")
    parser.add_argument("--max-tiles", type=int, default=6, help="with --tile-size: most tiles, the thumbnail apart")
    parser.add_argument("--passes", type=float, default=10, help="of the memory section, over all records")
    parser.add_argument("--folder", type=Path, help="keep the records here, and use those that are there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    from pgp_lightning.vlm.loading import load_processor  # not above: workers read this file, and it imports models

    processor = load_processor(given.base)
    if given.tile_size:
        side, most = given.tile_size // 28, given.max_tiles
        rule = replace(processor.rule, tile_size=given.tile_size, tokens_per_side=side, max_tiles=most, thumbnail=True)
        processor = replace(processor, rule=rule, max_length=8192)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        sources = write_sources(folder, given.samples)
        bench = Bench(sources, ConversationReader(processor), given.batch_size, given.workers, given.passes)
        size = sum(shard.bytes for source in sources for shard in source.shards) / bench.samples / 1000
        rule = processor.rule
        print(
            f"{bench.samples} samples of {size:.0f} kB, tiles of {rule.tile_size} pixels, at most {rule.max_tiles}, "
            f"batches of {bench.batch_size}, {platform.machine()}, torch {torch.__version__}"
        )
        results: dict[str, Any] = {}
        for section in given.sections:
            print(f"\n{section}")
            if section == "speed":
                results[section] = measure_speed(bench, folder, given.workers, given.repeats, given.only)
            else:
                results[section] = SECTIONS[section](bench)
            if given.json:
                given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
