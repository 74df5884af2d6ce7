"""Shards: plain tars of `KEY.png|jpg|webp` + `KEY.json`, written atomically and read by position.

A shard is read in two explicit stages: its headers once, grouped into records by WebDataset's rule (the key is the
file name up to its first dot), then single members by their offset. Nothing is decompressed, unpickled or extracted,
and no member is larger than a limit, so shards from elsewhere can do no more than be refused.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.tariterators import group_by_keys

from pgp_lightning.data.manifest import INDEX_FILE, INDEX_VERSION, Index, Shard, Source
from pgp_lightning.errors import ConfigError, DataError

__all__ = [
    "IMAGE_EXTENSIONS",
    "RawRecord",
    "SampleBuilder",
    "ShardReader",
    "build_source",
    "make_builder",
    "verify_source",
    "write_source",
]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_MEMBER_BYTES = 64 << 20
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@runtime_checkable
class SampleBuilder(Protocol):
    """What makes the records of a source; named by a manifest's `build:`, picklable when several processes write."""

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        """Return key, encoded image, the image's extension, and the record; a pure function of the index."""

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that the records depend on."""


@dataclass(frozen=True)
class RawRecord:
    """A record as it lies in a shard; None stands for a member that is not there."""

    key: str
    image: bytes | None
    text: bytes | None


# Writing ------------------------------------------------------------------------------------------------------------


def make_builder(source: Source) -> SampleBuilder:
    """Construct the builder that a source's `build:` names.

    Raises:
        ConfigError: if there is none, or it cannot be imported or constructed.
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
    if not isinstance(builder, SampleBuilder):
        raise ConfigError(f"{place}: {source.build.class_path} must have __len__, __getitem__ and identity")
    return builder


def build_source(source: Source, workers: int = 0, progress: bool = True) -> Index:
    """Return a source's index, after writing its shards if there are none and its manifest entry has a `build:`.

    Raises:
        ConfigError: if the source has neither shards nor `build:`, or shards of other build settings.
        DataError: if index or shards are damaged.
    """
    if source.build is not None:
        write_source(source.folder, make_builder(source), source.build.samples_per_shard, progress, workers)
    return source.index()


def write_source(
    folder: str | Path,
    builder: SampleBuilder,
    samples_per_shard: int = 1000,
    progress: bool = True,
    workers: int = 0,
) -> Index:
    """Write a source's shards and its index; the same builder gives the same bytes, with any number of workers.

    Everything is written to a hidden sibling folder which is renamed at the end. Two processes may therefore race:
    the one that comes second finds the folder and uses it. A folder that is already there is not written again.

    Args:
        folder: the source's folder; its name is the source's name.
        builder: what makes the records.
        samples_per_shard: records in every shard but the last.
        progress: show a progress bar on stderr.
        workers: processes that write shards; 0 writes in this one.

    Raises:
        ConfigError: if the builder is empty or makes keys that cannot be used, or if the folder exists with another
            content.
    """
    folder = Path(folder)
    # Through JSON, because the identity found in an index.json has been through it.
    identity = json.loads(json.dumps(builder.identity(), sort_keys=True))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _existing(folder, identity)
    if len(builder) < 1 or samples_per_shard < 1:
        raise ConfigError(f"{folder}: cannot write {len(builder)} records into shards of {samples_per_shard}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        shards = _write_shards(part, folder.name, builder, samples_per_shard, progress, workers)
        content = {
            "version": INDEX_VERSION,
            "source": folder.name,
            "samples": sum(shard["samples"] for shard in shards),
            "shards": shards,
            "builder": identity,
        }
        with (part / INDEX_FILE).open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
            _sync(file.fileno())
        _sync_folder(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return _existing(folder, identity)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Index.load(folder)


def verify_source(folder: str | Path) -> Index:
    """Read all shards of a source and check sizes, SHA-256 and record counts.

    Raises:
        DataError: naming the first shard that is not as promised.
    """
    folder = Path(folder)
    try:
        index = Index.load(folder)
    except FileNotFoundError as error:
        raise DataError(f"{folder / INDEX_FILE} does not exist: build or fetch the source") from error
    index.check_files()
    for shard in index.shards:
        if _sha256(shard.path) != shard.sha256:
            raise DataError(f"{shard.path} has another SHA-256 than {INDEX_FILE} promises: delete {folder}, rebuild it")
        _Table(shard)
    return index


def _existing(folder: Path, identity: dict[str, Any]) -> Index:
    """Return the index of a folder that is there already, if it holds what we would have written."""
    try:
        index = Index.load(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} exists but has no {INDEX_FILE}: move it away or choose another root") from error
    if index.builder != identity:
        keys = sorted(key for key in {*index.builder, *identity} if index.builder.get(key) != identity.get(key))
        changes = ", ".join(f"{key} (there {index.builder.get(key)!r}, now {identity.get(key)!r})" for key in keys)
        raise ConfigError(
            f"{folder} was built with other settings: {changes}. Delete it to build it again, or choose another root"
        )
    return index


def _write_shards(
    part: Path, name: str, builder: SampleBuilder, samples_per_shard: int, progress: bool, workers: int
) -> list[dict[str, Any]]:
    """Write all shards of a source and return their entries for the index."""
    bar = Progress(
        TextColumn(f"building {name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    bounds = [
        (first, min(first + samples_per_shard, len(builder))) for first in range(0, len(builder), samples_per_shard)
    ]
    paths = [part / f"{name}-{number:05d}.tar" for number in range(len(bounds))]
    with bar:
        task = bar.add_task("", total=len(builder))
        if not workers:
            return [
                _write_shard(path, builder, *bound, lambda: bar.advance(task))
                for path, bound in zip(paths, bounds, strict=True)
            ]
        entries = []
        context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = [pool.submit(_write_shard, path, builder, *bound) for path, bound in zip(paths, bounds, strict=True)]
            for job in jobs:
                entries.append(job.result())
                bar.advance(task, entries[-1]["samples"])
        return entries


def _write_shard(
    path: Path, builder: SampleBuilder, first: int, stop: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write the records first..stop-1 as one tar and return its entry for the index."""
    keys: set[str] = set()
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, stop):
                key, image, extension, record = builder[number]
                if not _KEY.fullmatch(key) or key in keys:
                    raise ConfigError(
                        f"record {number}: expected a new key of up to 80 letters, digits, _ and -, got {key!r}"
                    )
                if extension not in IMAGE_EXTENSIONS:
                    raise ConfigError(f"record {number}: expected an image in {IMAGE_EXTENSIONS}, got {extension!r}")
                keys.add(key)
                text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
                for suffix, data in ((extension, image), ("json", text)):
                    header = tarfile.TarInfo(f"{key}.{suffix}")  # its defaults: no time, no owner, mode 0644
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                advance()
        _sync(file.fileno(), file.flush)
    return {"file": path.name, "samples": stop - first, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(descriptor: int, flush: Callable[[], None] = lambda: None) -> None:
    flush()
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading ------------------------------------------------------------------------------------------------------------


class _Table:
    """Where the members of a shard's records lie.

    Raises:
        DataError: if the shard is missing, damaged, not a plain tar, or not as long as the index promises.
    """

    def __init__(self, shard: Shard) -> None:
        self.keys: list[str] = []
        spans: list[tuple[int, int, int, int]] = []
        remedy = f"delete {shard.path.parent} and build or fetch it again"
        try:
            with shard.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != shard.bytes:
                    raise DataError(f"{shard.path} has {size} bytes, {INDEX_FILE} promises {shard.bytes}: {remedy}")
                with tarfile.open(fileobj=file, mode="r:") as tar:  # "r:" is plain tar only: nothing to inflate
                    for sample in group_by_keys(_headers(tar, shard)):
                        self.keys.append(Path(sample["__key__"]).name)
                        image = next((sample[ext] for ext in IMAGE_EXTENSIONS if ext in sample), (-1, 0))
                        spans.append((*image, *sample.get("json", (-1, 0))))
        except FileNotFoundError as error:
            raise DataError(f"{shard.path} is missing, though {INDEX_FILE} lists it: {remedy}") from error
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{shard.path} cannot be read as a plain tar ({error}): {remedy}") from error
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{shard.path}: two members have one name ({error.args[0]}): {remedy}") from error
        if len(spans) != shard.samples:
            raise DataError(
                f"{shard.path}: {INDEX_FILE} promises {shard.samples} records, the shard ends after {len(spans)}: "
                f"{remedy}"
            )
        self.spans = np.array(spans, dtype=np.int64)


def _headers(tar: tarfile.TarFile, shard: Shard) -> Iterable[dict[str, Any]]:
    """Yield a shard's regular files as WebDataset's file samples, with offset and size in place of the data."""
    while (member := tar.next()) is not None:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            continue
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(f"{shard.path}: {member.name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
        if member.offset_data + member.size > shard.bytes:
            raise tarfile.ReadError(f"{member.name} ends after the file does")
        yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(shard.path)}


class ShardReader:
    """Reads records by shard and position; remembers where they lie in the shards it met last.

    Args:
        capacity: number of shards remembered, about 100 kB each; as many as are read from in turn.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tables: OrderedDict[Path, _Table] = OrderedDict()

    def read(self, shard: Shard, number: int) -> RawRecord:
        """Return a record.

        Raises:
            DataError: if the shard is not as the index promises.
        """
        table = self._tables.get(shard.path)
        if table is None:
            table = self._tables[shard.path] = _Table(shard)
            if len(self._tables) > self.capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard.path)
        image, image_size, text, text_size = table.spans[number].tolist()
        with shard.path.open("rb") as file:
            members = list(_pieces(file, shard, ((image, image_size), (text, text_size))))
        return RawRecord(table.keys[number], *members)


def _pieces(file: io.BufferedReader, shard: Shard, spans: Iterable[tuple[int, int]]) -> Iterator[bytes | None]:
    """Yield the bytes of each span, None for a negative offset."""
    for offset, size in spans:
        if offset < 0:
            yield None
            continue
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise DataError(f"{shard.path} became shorter while it was read: nothing may write to shards in use")
        yield data
