"""`pgp shards`: build, verify, measure and look at the shards of a manifest."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pgp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from pgp_lightning.data.index import Index
    from pgp_lightning.data.manifest import Manifest, Source
    from pgp_lightning.data.remote import ShardCache
    from pgp_lightning.vlm.processor import Processor

__all__ = ["add_shards"]


def add_shards(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its actions to the parser of `pgp`."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("manifest", type=Path)
    shared.add_argument("--root", help="folder or URL of the shards, in place of the manifest's")
    shared.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for what is fetched from a URL")
    shared.add_argument("--cache-gib", type=float, default=100.0, help="greatest size of the fetched shards")
    shared.add_argument("--allow-pipe", action="store_true", help="accept a root pipe:COMMAND, which runs in a shell")
    seen = argparse.ArgumentParser(add_help=False)
    seen.add_argument("--split", default="train")
    seen.add_argument("--base", help="model whose tiles and tokens count: embedded:NAME, a folder, or one on the hub")

    shards = commands.add_parser("shards", help="build, verify, measure or look at the shards of a manifest")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", parents=[shared], help="build the sources that have no shards")
    build.add_argument("--workers", type=int, default=0, help="processes that write; 0 writes in this one")
    build.set_defaults(call=_build)
    actions.add_parser("verify", parents=[shared], help="read and check every shard").set_defaults(call=_verify)

    stats = actions.add_parser("stats", parents=[shared, seen], help="measure texts, images and tiles of a split")
    stats.add_argument("--records", type=int, help="look at the first so many records of each source; by default all")
    stats.add_argument("--workers", type=int, default=0, help="processes that measure; 0 measures in this one")
    stats.add_argument("--output", type=Path, nargs="+", default=[], help=".html page, .png of histograms, or .json")
    stats.set_defaults(call=_stats)

    show = actions.add_parser("show", parents=[shared, seen], help="look at some records of a split")
    show.add_argument("--source", help="only of this source; by default of all")
    show.add_argument("--records", type=int, default=8, help="how many, drawn at random")
    show.add_argument("--seed", type=int, default=0, help="of the draw")
    show.add_argument("--key", help="the record of this key, in place of random ones")
    show.add_argument("--full", action="store_true", help="show texts whole, not their first 300 characters")
    show.add_argument("--output", type=Path, help=".html page with the pictures")
    show.set_defaults(call=_show)


def _opened(given: argparse.Namespace) -> tuple[Manifest, ShardCache]:
    """Read the manifest, and say where shards are fetched to."""
    from pgp_lightning.data.manifest import Manifest
    from pgp_lightning.data.remote import ShardCache

    manifest = Manifest.load(given.manifest, given.root, given.allow_pipe, given.cache)
    if not 0 < given.cache_gib < math.inf:
        raise ConfigError(f"--cache-gib must be above 0, got {given.cache_gib}")
    return manifest, ShardCache(given.cache / "shards", round(given.cache_gib * 2**30), allow_pipe=given.allow_pipe)


def _fetch_index(source: Source, cache: ShardCache) -> None:
    """Fetch the index of a source that has a URL."""
    from pgp_lightning.data.index import INDEX_FILE
    from pgp_lightning.data.roots import file_inside

    if source.url is not None:
        cache.fetch_index(file_inside(source.url, INDEX_FILE), source.folder)


def _build(given: argparse.Namespace) -> int:
    from pgp_lightning.data.roots import public
    from pgp_lightning.data.writing import build_summary, excess_rejects, listed_rejects, make_source
    from pgp_lightning.evaluation.html_page import printable

    manifest, _ = _opened(given)
    if manifest.url is not None:
        raise ConfigError(
            f"shards cannot be built at {public(manifest.url)}: give --root a folder, and copy what is in it there"
        )
    problems = []
    for split, sources in manifest.splits.items():
        for source in sources:
            index = make_source(source, given.workers)
            print(f"{split}/{source.name}: there: {build_summary(source, index)}")
            for line in listed_rejects(index):
                print(printable(line))
            if problem := excess_rejects(source, index):
                problems.append(problem)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return 1 if problems else 0


def _verify(given: argparse.Namespace) -> int:
    from pgp_lightning.data.roots import public
    from pgp_lightning.data.shards import verify_source
    from pgp_lightning.data.writing import build_summary

    manifest, cache = _opened(given)
    if manifest.url is not None:
        print(f"fetching every shard of {public(manifest.url)} through {cache.folder}, to check it")
    for split, sources in manifest.splits.items():
        for source in sources:
            _fetch_index(source, cache)
            index = verify_source(source.folder, source.url, cache, source.build is not None)
            print(f"{split}/{source.name}: intact: {build_summary(source, index)}")
    return 0


def _stats(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pgp_lightning.data.statistics import Gauge, measure_split
    from pgp_lightning.evaluation.statistics_report import STATISTICS_SUFFIXES, print_statistics, write_statistics

    _check_outputs(given.output, STATISTICS_SUFFIXES)
    manifest, cache = _opened(given)
    for source in manifest.sources(given.split):
        _fetch_index(source, cache)
    processor = _processor(given.base)
    gauge = Gauge(cache=cache) if processor is None else Gauge(processor.rule, processor, cache)
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        found = measure_split(
            manifest,
            given.split,
            gauge,
            given.records,
            given.workers,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_statistics(found)
    for file in given.output:
        write_statistics(found, file)
        print(f"written to {file}")
    return 0


def _show(given: argparse.Namespace) -> int:
    from pgp_lightning.data.conversation import ConversationReader
    from pgp_lightning.data.shards import ShardReader
    from pgp_lightning.evaluation.record_page import choose_records, print_records, records_page, show_record

    _check_outputs([given.output] if given.output else [], (".html",))
    if given.records < 1 or given.seed < 0:
        raise ConfigError(f"--records must be at least 1 and --seed at least 0, got {given.records} and {given.seed}")
    manifest, cache = _opened(given)
    sources = manifest.sources(given.split)
    if given.source is not None:
        names = ", ".join(source.name for source in sources)
        sources = tuple(source for source in sources if source.name == given.source)
        if not sources:
            raise ConfigError(f"{given.manifest}: split {given.split!r} has no source {given.source!r}: it has {names}")
    indices: list[Index] = []
    for source in sources:
        _fetch_index(source, cache)
        indices.append(source.index())
    processor = _processor(given.base)
    usable = None if processor is None else ConversationReader(processor, turns="all")
    reader = ShardReader(1, cache)
    places = choose_records(sources, indices, reader, given.records, given.seed, given.key)
    shown = [
        show_record(sources[number], reader.read(indices[number].shards[shard], record), usable, given.full)
        for number, shard, record in places
    ]
    print_records(shown)
    if given.output:
        title = f"{len(shown)} records of {given.split} of {given.manifest}"
        given.output.write_text(records_page(title, shown), encoding="utf-8")
        print(f"written to {given.output}")
    return 0


def _processor(base: str | None) -> Processor | None:
    """Load what is needed to know of a base, without its weights; None without a base."""
    if base is None:
        return None
    from pgp_lightning.training.command_line import quieten
    from pgp_lightning.vlm.loading import load_processor

    quieten()
    return load_processor(base)


def _check_outputs(files: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Refuse files that could not be written, before the work."""
    for file in files:
        if file.suffix not in suffixes or not file.parent.is_dir() or file.is_dir():
            kinds = " or ".join(suffixes)
            raise ConfigError(f"--output must be a {kinds} file in a folder that exists, got {file}")
