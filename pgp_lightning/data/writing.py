"""Writing a source: its records become shards, the same bytes every time, and a build that was killed goes on.

A source is built in `.NAME.HASH.part` beside its folder, HASH being that of the builder's identity and the shard size:

    lock             held by the one process that builds
    files/           what becomes the source's folder, renamed at the end: tars, `index.json`, `rejected.jsonl`
    entries/N.json   the index entry of shard N, written after it: a shard that has one is finished

A shard holds what is usable of `samples_per_shard` neighbouring records, so it depends on these alone: not on the
number of processes, on other shards, or on how often the build was interrupted.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgp_lightning.data.build_lock import build_lock
from pgp_lightning.data.build_pool import run_tasks
from pgp_lightning.data.index import INDEX_FILE, INDEX_VERSION, Index
from pgp_lightning.data.manifest import Source
from pgp_lightning.data.records import SampleBuilder
from pgp_lightning.data.shard_writing import WRITING_REASONS, ShardTask, write_shard, write_text
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm.shard_files import sync_path

__all__ = [
    "REJECTED_FILE",
    "build_source",
    "build_summary",
    "excess_rejects",
    "listed_rejects",
    "make_builder",
    "make_source",
    "reported",
    "write_source",
]

REJECTED_FILE = "rejected.jsonl"


def make_builder(source: Source) -> SampleBuilder:
    """Construct the builder that a source's `build:` names.

    Raises:
        ConfigError: if there is none, or it cannot be imported or constructed, or if the source expects rejects for a
            reason that is not among the builder's.
    """
    if source.build is None:
        raise ConfigError(f"{source.manifest}: source {source.name!r} has no `build:`, so its shards cannot be made")
    place = f"{source.manifest}: source {source.name!r} of split {source.split!r}: build.class_path"
    module, _, name = source.build.class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{place}: {source.build.class_path} cannot be imported ({error})") from error
    try:
        builder = cls(**source.build.init_args)
    except TypeError as error:
        raise ConfigError(f"{place}: {source.build.class_path} refuses its init_args ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not isinstance(builder, SampleBuilder):
        raise ConfigError(f"{place}: {source.build.class_path} must have __len__, __getitem__ and identity")
    reasons = getattr(builder, "reasons", None)
    if reasons is not None and (unknown := sorted(source.expected_rejects.keys() - {*reasons, *WRITING_REASONS})):
        raise ConfigError(
            f"{source.manifest}: source {source.name!r} of split {source.split!r}: expected_rejects: there is "
            f"no reason {', '.join(map(repr, unknown))}, {source.build.class_path} knows "
            f"{', '.join(sorted({*reasons, *WRITING_REASONS}))}"
        )
    return builder


def make_source(source: Source, workers: int = 0, progress: bool = True) -> Index:
    """Return a source's index, after writing its shards if there are none and its manifest entry has a `build:`.

    Raises:
        ConfigError: if the source has neither shards nor `build:`, or shards of other build settings.
        DataError: if index or shards are damaged, or no record is usable.
    """
    if source.build is not None and source.url is None:
        write_source(source.folder, make_builder(source), source.build.samples_per_shard, progress, workers)
    return source.index()


def build_source(source: Source, workers: int = 0, progress: bool = True) -> Index:
    """Do what `make_source` does, and refuse a source of which too many records were rejected.

    Raises:
        ConfigError: if the source has neither shards nor `build:`, or shards of other build settings.
        DataError: if index or shards are damaged, or the rejects exceed the source's `allowed_rejects`.
    """
    index = make_source(source, workers, progress)
    if problem := excess_rejects(source, index):
        raise DataError(problem)
    return index


def build_summary(source: Source, index: Index) -> str:
    """Return what became of a source's raw records, and whether they are as many as upstream says."""
    bad = sum(index.rejected.values())
    total = index.samples + bad
    parts = [f"{total:,} records in, {index.samples:,} used, {bad:,} rejected"]
    if bad:
        parts[0] += f" ({_reasons(index.rejected)})"
    if reencoded := index.totals.get("reencoded", 0):
        parts.append(f"{reencoded:,} images stored as PNG instead of their own format")
    if systems := index.totals.get("system_texts", 0):
        parts.append(f"{systems:,} with a system text of their own, in place of the chat format's")
    if (expected := source.expected_records) is not None:
        difference = "" if expected == total else f", a difference of {total - expected:+,}"
        parts.append(f"upstream says {expected:,}{difference}")
    return "; ".join(parts)


def excess_rejects(source: Source, index: Index) -> str | None:
    """Say what is wrong if building rejected a greater share of a source than it allows, in all or for a reason."""
    total = index.samples + sum(index.rejected.values())
    expected = {reason: share for reason, share in source.expected_rejects.items() if reason in index.rejected}
    others = {reason: number for reason, number in index.rejected.items() if reason not in expected}
    judged = [(others, source.allowed_rejects), *(({r: index.rejected[r]}, share) for r, share in expected.items())]
    excess = [(counts, share) for counts, share in judged if sum(counts.values()) > share * total]
    if not excess:
        return None
    counts, share = excess[0]
    bad, allowed = sum(counts.values()), "allowed_rejects" if counts is others else "expected_rejects"
    anew = f"Repair the data and delete {source.folder} to build it again, or raise" if source.build else "Raise"
    return (
        f"source {source.name!r} of split {source.split!r}: {bad} of {total} records ({bad / total:.1%}) were rejected "
        f"while its shards were built, allowed are {share:.1%}: {_reasons(counts)}. "
        f"{source.folder / REJECTED_FILE} names them. {anew} the source's {allowed} in the manifest"
    )


def listed_rejects(index: Index, most: int = 10) -> list[str]:
    """Return lines that name the first rejected records of every reason, as the report has them.

    Raises:
        DataError: if the report is damaged.
    """
    report = index.folder / REJECTED_FILE
    if not index.rejected or not report.is_file():
        return []
    shown: dict[str, list[str]] = {reason: [] for reason in index.rejected}
    for reject in reported(index):
        if len(found := shown.setdefault(str(reject["reason"]), [])) < most:
            found.append(_named(reject))
    told = []
    for reason, found in sorted(shown.items()):
        number = index.rejected.get(reason, len(found))
        more = f", the first {len(found)} of them" if number > len(found) else ""
        told += [f"  {reason} {number:,}{more}:", *(f"    {one}" for one in found)]
    return [*told, f"  all of them: {report}"]


def reported(index: Index) -> Iterator[dict[str, Any]]:
    """Yield the rejected records that a source's report lists, none if there is no report.

    Raises:
        DataError: if the report is damaged, with the line.
    """
    file, number = index.folder / REJECTED_FILE, 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                reject = json.loads(line)
                if not isinstance(reject, dict) or not reject.keys() >= {"record", "reason", "detail"}:
                    raise ValueError(f"expected record, reason and detail, got {line:.80}")
                yield reject
    except FileNotFoundError:
        return
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no report of rejected records, line {number}: {error}: {index.remedy}") from error


def _named(reject: Mapping[str, Any]) -> str:
    """Return a line about a rejected record: where it stands, what it is called, what is wrong."""
    place = f"{reject['file']}:{reject['line']}" if {"file", "line"} <= reject.keys() else f"record {reject['record']}"
    names = [f"{key} {reject[key]}" for key in ("id", "image") if key in reject]
    return f"{', '.join([place, *names])}: {reject['detail']}"


def _reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(rejected.items()))


def write_source(
    folder: str | Path,
    builder: SampleBuilder,
    samples_per_shard: int = 1000,
    progress: bool = True,
    workers: int = 0,
) -> Index:
    """Write a source's shards and its index; the same builder gives the same bytes, with any number of workers.

    Nothing appears under the folder's name before it is complete. A build that was interrupted keeps its finished
    shards and goes on from them. Of two processes that build the same, the second waits and uses what the first wrote.

    Args:
        folder: the source's folder; its name is the source's name.
        builder: what makes the records.
        samples_per_shard: records that a shard is made of; those that are rejected leave it smaller.
        progress: show a progress bar on stderr.
        workers: processes that write shards; 0 writes in this one.

    Raises:
        ConfigError: if the builder is empty or makes keys that cannot be used, or if the folder exists with another
            content.
        DataError: if no record is usable.
    """
    folder = Path(folder)
    try:
        # Through JSON, because the identity found in an index.json has been through it.
        identity = json.loads(json.dumps(builder.identity(), sort_keys=True))
    except FileNotFoundError as error:
        if (folder / INDEX_FILE).is_file():
            return Index.load(folder, rebuildable=True)
        raise ConfigError(f"{folder} has no shards, and what they would be made of is missing: {error}") from error
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    text = json.dumps([identity, samples_per_shard], sort_keys=True)
    part = folder.parent / f".{folder.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.part"
    while not _occupied(folder):
        if samples_per_shard < 1 or len(builder) < 1:
            raise ConfigError(f"{folder}: cannot write {len(builder)} records into shards of {samples_per_shard}")
        part.mkdir(parents=True, exist_ok=True)
        waiting = partial(console.print, f"another process is building {folder}: waiting for it")
        with build_lock(part / "lock", waiting) as held:
            if held and not _occupied(folder):
                _Build(part, folder, builder, identity, samples_per_shard).run(workers, _bar(folder, console, progress))
                return Index.load(folder, rebuildable=True)
    if part.exists() and not (part / "files").exists():  # all but this was done when the process died
        shutil.rmtree(part, ignore_errors=True)
    return _existing(folder, identity)


def _bar(folder: Path, console: Console, shown: bool) -> Progress:
    """Return a progress bar over a source's records."""
    return Progress(
        TextColumn(f"building {folder.name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


def _occupied(folder: Path) -> bool:
    """Return whether there is something under a source's name; an empty folder is nothing."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _existing(folder: Path, identity: dict[str, Any]) -> Index:
    """Return the index of a folder that is there already, if it holds what we would have written."""
    try:
        index = Index.load(folder, rebuildable=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} exists but has no {INDEX_FILE}: move it away or choose another root") from error
    if index.builder != identity:
        keys = sorted(key for key in {*index.builder, *identity} if index.builder.get(key) != identity.get(key))
        changes = ", ".join(f"{key} (there {index.builder.get(key)!r}, now {identity.get(key)!r})" for key in keys)
        raise ConfigError(
            f"{folder} was built with other settings: {changes}. Delete it to build it again, or choose another root"
        )
    return index


class _Build:
    """The building of one source, by the process that holds the lock."""

    def __init__(
        self, part: Path, folder: Path, builder: SampleBuilder, identity: dict[str, Any], samples_per_shard: int
    ) -> None:
        self.part, self.folder, self.builder, self.identity = part, folder, builder, identity
        total = len(builder)
        self.tasks = [
            ShardTask(part, f"{folder.name}-{number:05d}.tar", first, min(first + samples_per_shard, total))
            for number, first in enumerate(range(0, total, samples_per_shard))
        ]

    def run(self, workers: int, bar: Progress) -> None:
        """Write what is missing, then the index, and give the folder its name."""
        for name in ("files", "entries"):
            (self.part / name).mkdir(exist_ok=True)
        for left in self.part.glob("*.tmp"):
            left.unlink()
        stale = re.compile(rf"\.{re.escape(self.folder.name)}\.[0-9a-f]+\.part")
        for other in sorted(self.folder.parent.iterdir()):
            if stale.fullmatch(other.name) and other != self.part:
                bar.console.print(f"{other} is left from a build with other settings; delete it if nothing builds it")
        try:
            self._finish(self._write(workers, bar))
        except BaseException:
            if not any((self.part / "entries").iterdir()):
                shutil.rmtree(self.part, ignore_errors=True)
            raise
        shutil.rmtree(self.part, ignore_errors=True)

    def _write(self, workers: int, bar: Progress) -> list[dict[str, Any]]:
        """Write the shards that are not finished and return all entries, in order."""
        entries = {task: entry for task in self.tasks if (entry := task.finished()) is not None}
        if entries:
            bar.console.print(f"{self.folder}: {len(entries)} of {len(self.tasks)} shards are finished from before")
        with bar:
            progress = bar.add_task("", total=len(self.builder), completed=sum(t.stop - t.first for t in entries))
            missing = [task for task in self.tasks if task not in entries]
            if workers:
                for task, entry in run_tasks(write_shard, self.builder, missing, workers):
                    entries[task] = entry
                    bar.advance(progress, task.stop - task.first)
            else:
                for task in missing:
                    entries[task] = write_shard(self.builder, task, lambda: bar.advance(progress))
        return [entries[task] for task in self.tasks]

    def _finish(self, entries: list[dict[str, Any]]) -> None:
        """Write report and index, and rename the folder."""
        files = self.part / "files"
        rejected, totals = Counter[str](), Counter[str]()
        for entry in entries:
            rejected.update(entry["rejected"])
            totals.update(entry["totals"])
        if rejected:
            write_text(self.part, files / REJECTED_FILE, "".join(map(_line, (r for e in entries for r in e["report"]))))
        if not totals["records"]:
            raise DataError(
                f"{self.folder} cannot be built, none of {rejected.total()} records is usable: {_reasons(rejected)}. "
                f"{files / REJECTED_FILE} names them. Repair the data, delete {self.part} and build again"
            )
        content = {
            "version": INDEX_VERSION,
            "source": self.folder.name,
            "samples": totals["records"],
            "shards": _listed(entries),
            "rejected": dict(rejected),
            "totals": dict(totals),
            "builder": self.identity,
        }
        write_text(self.part, files / INDEX_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
        sync_path(files)
        files.rename(self.folder)
        sync_path(self.folder.parent)


def _listed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the index's shards; one of which nothing is left is no file: its rejects count with another."""
    shards: list[dict[str, Any]] = []
    carried = 0
    for entry in entries:
        bad = sum(entry["rejected"].values())
        if entry["samples"]:
            shards.append({key: entry[key] for key in ("file", "samples", "bytes", "sha256")} | {"rejected": bad})
        elif shards:
            shards[-1]["rejected"] += bad
        else:
            carried += bad
    shards[0]["rejected"] += carried
    return shards


def _line(value: dict[str, Any]) -> str:
    """Return one line of the report; ASCII, because a detail may quote text that is no Unicode."""
    return json.dumps(value, sort_keys=True) + "\n"
