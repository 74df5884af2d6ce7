"""Shards: plain tars of `KEY.png|jpg|webp` + `KEY.json`, read by position; `writing.py` writes them.

A shard is read in two explicit stages: its headers once, grouped into records by WebDataset's rule (the key is the
file name up to its first dot), then single members by their offset. Nothing is decompressed, unpickled or extracted,
and no member is larger than a limit, so shards from elsewhere can do no more than be refused.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from webdataset.tariterators import group_by_keys

from pgp_lightning.data.index import INDEX_FILE, Index, Shard
from pgp_lightning.data.machine_faults import patiently
from pgp_lightning.data.records import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, RawRecord
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.shard_names import broken_rule, key_and_extension
from pgp_lightning.data.shard_writing import file_sha256
from pgp_lightning.data.writing import REJECTED_FILE, reported
from pgp_lightning.errors import DataError

__all__ = ["ShardReader", "verify_source"]

Result = TypeVar("Result")

_MAX_HEADER_BYTES = 1 << 20


def verify_source(
    folder: str | Path, url: str | None = None, cache: ShardCache | None = None, rebuildable: bool = False
) -> Index:
    """Read all shards of a source and check sizes, SHA-256, record counts and the report of rejected records.

    Args:
        folder: where its index and shards are, or where its index was fetched to.
        url: where its shards are fetched from, if they are; the report stays there and is not checked.
        cache: what fetches them.
        rebuildable: whether something can build them again, so that messages may advise to delete what is damaged.

    Raises:
        ConfigError: if a shard cannot be fetched with these settings, or the machine fails to read one.
        DataError: naming the first file that is not as promised.
    """
    folder = Path(folder)
    try:
        index = Index.load(folder, url, rebuildable)
    except FileNotFoundError as error:
        raise DataError(f"{folder / INDEX_FILE} does not exist: build or fetch the source") from error
    if url is None:
        index.check_files()
    for shard in index.shards:
        with _held(shard, cache) as there:
            if patiently(there.path, partial(file_sha256, there.path)) != shard.sha256:
                raise DataError(f"{shard.shown} has another SHA-256 than {INDEX_FILE} promises: {there.remedy}")
            _Table(there)
    if index.totals and index.totals.get("records") != index.samples:
        raise DataError(f"{folder / INDEX_FILE}: totals.records is not the shards' sum {index.samples}: {index.remedy}")
    if url is not None or not index.rejected:
        return index
    if (listed := dict(Counter(str(reject["reason"]) for reject in reported(index)))) != dict(index.rejected):
        raise DataError(
            f"{folder / REJECTED_FILE} lists {listed}, {INDEX_FILE} promises {dict(index.rejected)}: {index.remedy}"
        )
    return index


@contextmanager
def _held(shard: Shard, cache: ShardCache | None) -> Iterator[Shard]:
    """Give a shard that lies on a disk, and stays there meanwhile."""
    if shard.url is None:
        yield shard
        return
    if cache is None:
        raise RuntimeError(f"{shard.shown} has to be fetched, and there is no cache")
    with cache.hold(shard.url, shard.bytes, shard.sha256) as path:
        yield replace(shard, path=path)


class _Table:
    """Where the members of a shard's records lie.

    Raises:
        DataError: if the shard is missing, damaged, not a plain tar, or not as long as the index promises.
        ConfigError: if the machine fails to read it, again and again.
    """

    def __init__(self, shard: Shard) -> None:
        self.keys, self.spans = _read(shard, lambda: _table(shard))


def _read(shard: Shard, read: Callable[[], Result]) -> Result:
    """Return what a function reads from a shard.

    Raises:
        DataError: if the shard is missing.
        ConfigError: if the machine fails to read it, again and again, or its folder is gone.
    """
    try:
        return patiently(shard.path, read, [shard.path.parent])
    except OSError as error:
        raise DataError(f"{shard.shown} is missing, though {INDEX_FILE} lists it: {shard.remedy}") from error


def _table(shard: Shard) -> tuple[list[str], np.ndarray]:
    """Return the keys of a shard's records, and their images' and texts' offsets and sizes, int64 (n, 4)."""
    keys: list[str] = []
    spans: list[tuple[int, int, int, int]] = []
    names: list[str] = []
    name, remedy = shard.shown, shard.remedy
    try:
        with _HeaderFile(shard.path.open("rb", buffering=0)) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise DataError(f"{name} has {size} bytes, {INDEX_FILE} promises {shard.bytes}: {remedy}")
            with tarfile.open(fileobj=file, mode="r:") as tar:  # "r:" is plain tar only: nothing to inflate
                for sample in group_by_keys(_headers(tar, shard, names), key_and_extension):
                    # A name that is no UTF-8 comes with surrogates, which cannot be written to any report.
                    keys.append(_readable(Path(sample["__key__"]).name))
                    image = next((sample[ext] for ext in IMAGE_EXTENSIONS if ext in sample), (-1, 0))
                    spans.append((*image, *sample.get("json", (-1, 0))))
    except tarfile.TarError as error:
        raise DataError(f"{name} cannot be read as a plain tar ({error}): {remedy}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: {_readable(broken_rule(names) or str(error.args[0]))}") from error
    if len(spans) != shard.samples:
        told = _readable(broken_rule(names)) or remedy
        raise DataError(f"{name}: {INDEX_FILE} promises {shard.samples} records, the shard has {len(spans)}: {told}")
    return keys, np.array(spans, dtype=np.int64)


def _readable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


class _HeaderFile(io.BufferedReader):
    """A shard of which only headers are read: `tarfile` reads those with long names whole, whatever size they declare.

    Raises:
        tarfile.ReadError: by `read`, for more than any honest header has.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, the limit is {_MAX_HEADER_BYTES}")
        return super().read(size)


def _headers(tar: tarfile.TarFile, shard: Shard, names: list[str]) -> Iterable[dict[str, Any]]:
    """Yield a shard's regular files as WebDataset's file samples, with offset and size in place of the data.

    Args:
        tar: the shard.
        shard: where it is, and what is promised of it.
        names: gets the files' names.
    """
    while (member := tar.next()) is not None:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            continue
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(f"{shard.shown}: {member.name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
        if member.offset_data + member.size > shard.bytes:
            raise tarfile.ReadError(f"{member.name} ends after the file does")
        names.append(member.name)
        yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(shard.path)}


class ShardReader:
    """Reads records by shard and position; remembers where they lie in the shards it met last.

    Args:
        capacity: number of shards remembered, about 100 kB each; as many as are read from in turn.
        cache: where shards with a URL are fetched to; the others are read in place.
    """

    def __init__(self, capacity: int, cache: ShardCache | None = None) -> None:
        self.capacity, self.cache = capacity, cache
        self._tables: OrderedDict[Path, _Table] = OrderedDict()

    def read(self, shard: Shard, number: int) -> RawRecord:
        """Return a record.

        Raises:
            DataError: if the shard is not as the index promises.
            ConfigError: if the machine fails to read it, again and again.
        """
        with _held(shard, self.cache) as held:
            table = self._table(held)
            image, image_size, text, text_size = table.spans[number].tolist()
            members = _pieces(held, ((image, image_size), (text, text_size)))
        return RawRecord(table.keys[number], *members)

    def read_text(self, shard: Shard, number: int) -> bytes | None:
        """Return a record's JSON alone, None if it has none; its image is not read.

        Raises:
            DataError: if the shard is not as the index promises.
            ConfigError: if the machine fails to read it, again and again.
        """
        with _held(shard, self.cache) as held:
            _, _, text, size = self._table(held).spans[number].tolist()
            return _pieces(held, ((text, size),))[0]

    def describe(self, shard: Shard, number: int) -> tuple[str, int | None]:
        """Return a record's key and its image's size in bytes, None if it has none; nothing but headers is read.

        Raises:
            DataError: if the shard is not as the index promises.
            ConfigError: if the machine fails to read it, again and again.
        """
        with _held(shard, self.cache) as held:
            table = self._table(held)
        image, size, _, _ = table.spans[number].tolist()
        return table.keys[number], None if image < 0 else size

    def _table(self, shard: Shard) -> _Table:
        """Return where a shard's records lie."""
        table = self._tables.get(shard.path)
        if table is None:
            table = self._tables[shard.path] = _Table(shard)
            if len(self._tables) > self.capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard.path)
        return table


def _pieces(shard: Shard, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """Return the bytes of each span, None for a negative offset."""

    def pieces() -> Iterator[bytes | None]:
        with shard.path.open("rb") as file:
            for offset, size in spans:
                if offset < 0:
                    yield None
                    continue
                file.seek(offset)
                data = file.read(size)
                if len(data) < size:
                    raise DataError(
                        f"{shard.shown} became shorter while it was read: nothing may write to shards in use"
                    )
                yield data

    return _read(shard, lambda: list(pieces()))
