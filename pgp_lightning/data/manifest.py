"""What data is: a typed view of `data_manifests/*.yaml`, and of the `index.json` beside a source's shards.

A manifest names its splits, a split its sources, a source how often it is repeated, how much of it may be
unusable and, optionally, what builds it. `data_manifests/README.md` describes both formats.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pgp_lightning.errors import ConfigError, DataError

__all__ = ["INDEX_FILE", "INDEX_VERSION", "Build", "Index", "Manifest", "Shard", "Source"]

INDEX_FILE = "index.json"
INDEX_VERSION = 1
_REQUIRED = object()


class _Section:
    """A mapping inside a file, read key by key, so that every error names the file and the key."""

    def __init__(
        self, file: Path, where: str, value: object, known: Sequence[str], error: type[ConfigError | DataError]
    ) -> None:
        self.file, self.where, self.error = file, where, error
        if not isinstance(value, Mapping):
            raise self.problem("", f"expected a mapping with the keys {', '.join(known)}, got {value!r}")
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
                raise self.problem(str(key), f"unknown key: {hint}")
        self.value = value

    def problem(self, key: str, message: str) -> ConfigError | DataError:
        """Return the error to raise about a key."""
        place = ".".join(part for part in (self.where, key) if part)
        return self.error(f"{self.file}: {place + ': ' if place else ''}{message}")

    def get(self, key: str, default: object = _REQUIRED) -> object:
        """Return a key's value, whatever it is."""
        if key not in self.value and default is _REQUIRED:
            raise self.problem(key, "this key is required")
        value: object = self.value.get(key, default)
        return value

    def text(self, key: str, default: object = _REQUIRED) -> str:
        """Return a non-empty string."""
        value = self.get(key, default)
        if not isinstance(value, str) or not (value.strip() or value == default):
            raise self.problem(key, f"expected a non-empty string, got {value!r}")
        return value

    def bare_name(self, key: str) -> str:
        """Return a string that is one component of a path, so that a file cannot point out of its folder."""
        name = self.text(key)
        if name in (".", "..") or "/" in name or "\\" in name:
            raise self.problem(key, f"expected a plain name without slashes, got {name!r}")
        return name

    def number(self, key: str, default: object = _REQUIRED, low: float = 0.0, high: float = math.inf) -> float:
        """Return a finite number within [low, high]."""
        value = self.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not low <= value <= high
            or value == math.inf
        ):
            raise self.problem(key, f"expected a number from {low:g} to {high:g}, got {value!r}")
        return float(value)

    def integer(self, key: str, default: object = _REQUIRED, low: int = 1) -> int:
        """Return an integer of at least `low`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.problem(key, f"expected an integer of at least {low}, got {value!r}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping with any keys, empty if it is not there."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.problem(key, f"expected a mapping, got {value!r}")
        return dict(value)

    def section(self, key: str, value: object, known: Sequence[str]) -> _Section:
        """Return a mapping found under a key."""
        return _Section(self.file, ".".join(part for part in (self.where, key) if part), value, known, self.error)

    def sections(self, key: str, known: Sequence[str]) -> list[_Section]:
        """Return a non-empty list of mappings."""
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise self.problem(key, f"expected a non-empty list, got {value!r}")
        return [self.section(f"{key}[{number}]", entry, known) for number, entry in enumerate(value)]


@dataclass(frozen=True)
class Shard:
    """One plain tar of records."""

    path: Path
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of a source's `index.json`; the writer writes it last, so a folder that has one is complete."""

    folder: Path
    source: str
    shards: tuple[Shard, ...]
    builder: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Number of records in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read `index.json` in a folder.

        Raises:
            FileNotFoundError: if there is none.
            DataError: if it is not an index of this version, naming the file and the key.
        """
        file = folder / INDEX_FILE
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}): delete {folder} and build it again") from error
        top = _Section(file, "", value, ("version", "source", "samples", "shards", "builder"), DataError)
        if (version := top.get("version")) != INDEX_VERSION:
            raise top.problem("version", f"expected {INDEX_VERSION}, got {version!r}: delete {folder}, build it again")
        shards = tuple(
            Shard(
                folder / entry.bare_name("file"), entry.integer("samples"), entry.integer("bytes"), entry.text("sha256")
            )
            for entry in top.sections("shards", ("file", "samples", "bytes", "sha256"))
        )
        index = cls(folder, top.text("source"), shards, top.mapping("builder"))
        if top.integer("samples") != index.samples:
            raise top.problem("samples", f"expected the shards' sum {index.samples}, got {top.get('samples')}")
        return index

    def check_files(self) -> None:
        """Check that every shard exists with the promised size; contents are `verify_source`'s business.

        Raises:
            DataError: naming the first shard that is missing or has another size.
        """
        for shard in self.shards:
            remedy = f"delete {self.folder} and build or fetch it again"
            if not shard.path.is_file():
                raise DataError(f"{shard.path} is missing, though {INDEX_FILE} lists it: {remedy}")
            if (size := shard.path.stat().st_size) != shard.bytes:
                raise DataError(f"{shard.path} has {size} bytes, {INDEX_FILE} promises {shard.bytes}: {remedy}")


@dataclass(frozen=True)
class Build:
    """How to make a source that has no shards yet: a class with the interface of `shards.SampleBuilder`."""

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    samples_per_shard: int = 1000


@dataclass(frozen=True)
class Source:
    """One source of one split.

    Args:
        name: also the name of its folder, and of its curves while training.
        split: train, val or test.
        folder: where its shards and `index.json` are.
        manifest: the file it stands in, for messages.
        repeat: passes over the source per epoch; 0.5 is another half in every epoch.
        allowed_rejects: greatest share of its records that may be unusable before a run fails.
        build: what makes its shards if there are none.
    """

    name: str
    split: str
    folder: Path
    manifest: Path
    repeat: float = 1.0
    allowed_rejects: float = 0.01
    build: Build | None = None

    @property
    def built(self) -> bool:
        """Whether the source's shards are there."""
        return (self.folder / INDEX_FILE).is_file()

    def index(self) -> Index:
        """Read the source's index and check its shards' sizes.

        Raises:
            ConfigError: if the source has no shards, saying where they were expected and what to do.
            DataError: if index or shards are damaged.
        """
        if not self.built:
            remedy = (
                "it is built when a run prepares its data, or by `pgp shards`"
                if self.build
                else "write its shards there, set the root to the folder that has them, or give the source a `build:`"
            )
            raise ConfigError(
                f"{self.manifest}: source {self.name!r} of split {self.split!r}: "
                f"{self.folder / INDEX_FILE} does not exist: {remedy}"
            )
        index = Index.load(self.folder)
        index.check_files()
        return index


@dataclass(frozen=True)
class Manifest:
    """A data set: what it is, under which licence, and its sources by split."""

    file: Path
    name: str
    licence: str
    description: str
    root: Path
    splits: Mapping[str, tuple[Source, ...]]

    @classmethod
    def load(cls, path: str | Path, root: str | Path | None = None) -> Manifest:
        """Read a manifest.

        Args:
            path: a YAML file.
            root: the folder of the shards, in place of the manifest's own; relative to the working directory.

        Raises:
            ConfigError: if the file is missing or wrong, naming the file and the key.
        """
        file = Path(path)
        try:
            value = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{file} does not exist in {Path.cwd()}: give the path of a data manifest") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
        top = _Section(file, "", value, ("name", "licence", "description", "root", "splits"), ConfigError)
        folder = Path(top.text("root") if root is None else root)
        known = ("train", "val", "test")
        splits = top.section("splits", top.get("splits"), known)
        return cls(
            file=file,
            name=top.text("name"),
            licence=top.text("licence"),
            description=top.text("description", ""),
            root=folder,
            splits={split: _sources(splits, split, folder) for split in known if split in splits.value},
        )

    def sources(self, split: str) -> tuple[Source, ...]:
        """Return the sources of a split.

        Raises:
            ConfigError: if the manifest has no such split.
        """
        if split not in self.splits:
            raise ConfigError(f"{self.file}: splits.{split} is missing: the manifest has {', '.join(self.splits)}")
        return self.splits[split]


def _sources(splits: _Section, split: str, root: Path) -> tuple[Source, ...]:
    """Read the sources of one split."""
    found: dict[str, Source] = {}
    for entry in splits.sections(split, ("name", "repeat", "allowed_rejects", "build")):
        name = entry.bare_name("name")
        if name in found:
            raise entry.problem("name", f"{name!r} appears twice: use `repeat` to see a source more often")
        repeat = entry.number("repeat", 1.0)
        if repeat == 0:
            raise entry.problem("repeat", "expected a number above 0: leave the source out instead")
        build = None
        if entry.get("build", None) is not None:
            section = entry.section("build", entry.get("build"), ("class_path", "init_args", "samples_per_shard"))
            if "." not in (class_path := section.text("class_path")):
                raise section.problem("class_path", f"expected `package.module.Class`, got {class_path!r}")
            build = Build(class_path, section.mapping("init_args"), section.integer("samples_per_shard", 1000))
        found[name] = Source(
            name=name,
            split=split,
            folder=root / split / name,
            manifest=splits.file,
            repeat=repeat,
            allowed_rejects=entry.number("allowed_rejects", 0.01, high=1.0),
            build=build,
        )
    return tuple(found.values())
