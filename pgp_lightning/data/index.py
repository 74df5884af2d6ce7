"""What shards a source has: a typed view of the `index.json` beside them (data_manifests/README.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgp_lightning.data.roots import file_inside, public_file
from pgp_lightning.data.sections import Section
from pgp_lightning.errors import DataError

__all__ = ["INDEX_FILE", "INDEX_VERSION", "Index", "Shard"]

INDEX_FILE = "index.json"
INDEX_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One plain tar of records.

    Args:
        path: where it is, or where the cache keeps it.
        samples: records in it.
        bytes: its size.
        sha256: its SHA-256 in hexadecimal digits.
        url: where it is fetched from; None for one that is read in place.
        rejected: records of its part of the raw data that were left out while it was built.
        rebuildable: whether something can build its source again.
    """

    path: Path
    samples: int
    bytes: int
    sha256: str
    url: str | None = field(default=None, repr=False)  # may hold a password
    rejected: int = 0
    rebuildable: bool = field(default=False, repr=False, compare=False)

    @property
    def remedy(self) -> str:
        """What to do about it when it is damaged."""
        if self.url is not None:
            return f"delete {self.path}, and it is fetched again"
        return _remedy(self.path.parent, self.rebuildable)

    @property
    def shown(self) -> str:
        """What messages call it: its path, or the URL it is fetched from without credentials."""
        return str(self.path) if self.url is None else public_file(self.url)


@dataclass(frozen=True)
class Index:
    """The content of a source's `index.json`; the writer writes it last, so a folder that has one is complete.

    Args:
        folder: where it stands.
        source: the source's name.
        shards: in the order of the raw records.
        builder: all that the records depend on.
        rejected: reason to number of raw records that were left out while the shards were built.
        totals: what else was counted over all records, such as turns and characters.
        rebuildable: whether something can build the source again.
    """

    folder: Path
    source: str
    shards: tuple[Shard, ...]
    builder: Mapping[str, Any]
    rejected: Mapping[str, int] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    rebuildable: bool = field(default=False, repr=False, compare=False)

    @property
    def remedy(self) -> str:
        """What to do about it when it is damaged."""
        return _remedy(self.folder, self.rebuildable)

    @property
    def samples(self) -> int:
        """Number of records in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def load(cls, folder: Path, url: str | None = None, rebuildable: bool = False) -> Index:
        """Read `index.json` in a folder.

        Args:
            folder: a source's folder, or the one in which the cache keeps its files.
            url: the source's URL, if its shards are fetched.
            rebuildable: whether something can build the source again, so that messages may advise to delete it.

        Raises:
            FileNotFoundError: if there is none.
            DataError: if it is not an index of this version, naming the file and the key.
        """
        file = folder / INDEX_FILE
        remedy = _remedy(folder, rebuildable or url is not None)
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not JSON ({error}): {remedy}") from error
        keys = ("version", "source", "samples", "shards", "builder", "rejected", "totals")
        top = Section(file, "", value, keys, DataError)
        if (version := top.get("version")) != INDEX_VERSION:
            raise top.problem("version", f"expected {INDEX_VERSION}, got {version!r}: {remedy}")
        entries = top.sections("shards", ("file", "samples", "bytes", "sha256", "rejected"))
        shards = tuple(_shard(entry, folder, url, rebuildable) for entry in entries)
        index = cls(
            folder,
            top.text("source"),
            shards,
            top.mapping("builder"),
            top.counts("rejected"),
            top.counts("totals"),
            rebuildable,
        )
        if top.integer("samples") != index.samples:
            raise top.problem("samples", f"expected the shards' sum {index.samples}, got {top.get('samples')}")
        if (expected := sum(shard.rejected for shard in shards)) != sum(index.rejected.values()):
            raise top.problem("rejected", f"expected the shards' sum {expected}, got {sum(index.rejected.values())}")
        return index

    def check_files(self) -> None:
        """Check that every shard exists with the promised size; contents are `verify_source`'s business.

        Raises:
            DataError: naming the first shard that is missing or has another size.
        """
        for shard in self.shards:
            if not shard.path.is_file():
                raise DataError(f"{shard.path} is missing, though {INDEX_FILE} lists it: {self.remedy}")
            if (size := shard.path.stat().st_size) != shard.bytes:
                raise DataError(f"{shard.path} has {size} bytes, {INDEX_FILE} promises {shard.bytes}: {self.remedy}")


def _remedy(folder: Path, rebuildable: bool) -> str:
    """Return what to do about a damaged source on this machine."""
    if rebuildable:
        return f"delete {folder}, and build or fetch it again"
    return f"copy it again from where it came from, or correct {INDEX_FILE}; nothing here can make it anew"


def _shard(entry: Section, folder: Path, url: str | None, rebuildable: bool) -> Shard:
    """Read one shard's entry in an index."""
    name, rejected = entry.bare_name("file"), entry.integer("rejected", 0, low=0)
    try:
        own_url = None if url is None else file_inside(url, name)
    except ValueError as error:
        raise entry.problem("file", str(error)) from error
    samples, size, digest = entry.integer("samples"), entry.integer("bytes"), entry.text("sha256")
    return Shard(folder / name, samples, size, digest, own_url, rejected, rebuildable)
