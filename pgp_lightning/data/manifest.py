"""What data is: a typed view of `data_manifests/*.yaml`.

A manifest names its splits, a split its sources, a source how often it is repeated, how much of it may be
unusable and, optionally, what builds it and where that comes from. Its root is a folder or a URL. Nothing is opened
or fetched while a manifest is read. `data_manifests/README.md` describes the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pgp_lightning.data.index import INDEX_FILE, Index
from pgp_lightning.data.roots import folder_inside, public, root_url
from pgp_lightning.data.sections import Section, read_yaml
from pgp_lightning.errors import ConfigError

__all__ = ["CACHE_FOLDER", "Build", "Manifest", "OnDamage", "Source", "Upstream", "Weights"]

CACHE_FOLDER = Path("data/cache")

Weights = Literal["count", "sqrt", "explicit"]
OnDamage = Literal["fail", "substitute"]

_SOURCE_KEYS = (
    "name", "repeat", "weight", "max_tiles", "allowed_rejects", "expected_rejects", "on_damage", "upstream", "build",
)  # fmt: skip
_UPSTREAM_KEYS = ("annotations", "images", "records", "from", "licence", "verified", "note")


@dataclass(frozen=True)
class Build:
    """How to make a source that has no shards yet: a class with the interface of `records.SampleBuilder`."""

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    samples_per_shard: int = 1000


@dataclass(frozen=True)
class Upstream:
    """Where the raw files of a source come from; for people, but for `records`.

    Args:
        annotations: name of the annotation file, as upstream calls it.
        images: folder of the images, as upstream lays it out.
        records: records in the annotation file, which building the shards checks.
        origin: a URL or the id of a hub data set; `from` in the file.
        licence: of annotations and images.
        verified: whether names, number and licence were read at the place they come from, not remembered.
        note: what else to know.
    """

    annotations: str | None = None
    images: str | None = None
    records: int | None = None
    origin: str | None = None
    licence: str | None = None
    verified: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Source:
    """One source of one split.

    Args:
        name: also the name of its folder, and of its curves while training.
        split: train, val or test.
        folder: where its shards and `index.json` are, or where the cache keeps them.
        manifest: the file it stands in, for messages.
        repeat: passes over the source per epoch; 0.5 is another half in every epoch.
        allowed_rejects: greatest share of its records that may be unusable before a run fails.
        expected_rejects: reason to greatest share of its raw records that building leaves out for it by design; these
            do not count for `allowed_rejects`.
        build: what makes its shards if there are none.
        weight: its share of the stream before normalising, with `weights: explicit`; else None.
        max_tiles: greatest number of tiles of its images, in place of the run's own; None for that.
        on_damage: whether a shard that cannot be read stops the run, or counts as rejected records.
        upstream: where its raw files come from.
        url: where its shards and `index.json` are fetched from; None for a local folder.
    """

    name: str
    split: str
    folder: Path
    manifest: Path
    repeat: float = 1.0
    allowed_rejects: float = 0.01
    expected_rejects: Mapping[str, float] = field(default_factory=dict)
    build: Build | None = None
    weight: float | None = None
    max_tiles: int | None = None
    on_damage: OnDamage = "fail"
    upstream: Upstream | None = None
    url: str | None = field(default=None, repr=False)  # may hold a password

    @property
    def expected_records(self) -> int | None:
        """Number of records upstream states, None if it is not known."""
        return self.upstream.records if self.upstream else None

    @property
    def built(self) -> bool:
        """Whether the source's index is there, and with a local source its shards."""
        return (self.folder / INDEX_FILE).is_file()

    def index(self) -> Index:
        """Read the source's index and check the sizes of shards that are read in place and must all be whole.

        Raises:
            ConfigError: if the source has no shards, saying where they were expected and what to do.
            DataError: if the index is damaged, or a shard is and the source has `on_damage: fail`.
        """
        if not self.built:
            remedy = "write its shards there, set the root to the folder that has them, or give the source a `build:`"
            if self.url:
                remedy = f"it is fetched from {public(self.url)} when a run prepares its data"
            elif self.build:
                remedy = "it is built when a run prepares its data, or by `pgp shards build`"
            raise ConfigError(
                f"{self.manifest}: source {self.name!r} of split {self.split!r}: "
                f"{self.folder / INDEX_FILE} does not exist: {remedy}"
            )
        index = Index.load(self.folder, self.url, self.build is not None)
        if self.url is None and self.on_damage == "fail":
            index.check_files()
        return index


@dataclass(frozen=True)
class Manifest:
    """A data set: what it is, under which licence, and its sources by split.

    Args:
        file: the YAML file.
        name: of the data set.
        licence: of its records.
        description: one sentence.
        root: the folder of the shards, or of what is fetched of them.
        splits: the sources of train, val and test, as far as the manifest has them.
        weights: how the sources of the train split share the stream.
        url: where the shards are fetched from; None for a local folder.
    """

    file: Path
    name: str
    licence: str
    description: str
    root: Path
    splits: Mapping[str, tuple[Source, ...]]
    weights: Weights = "count"
    url: str | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        root: str | Path | None = None,
        allow_pipe: bool = False,
        cache: str | Path = CACHE_FOLDER,
    ) -> Manifest:
        """Read a manifest.

        Args:
            path: a YAML file.
            root: folder (relative to the working directory) or URL of the shards, in place of the manifest's own.
            allow_pipe: accept a root `pipe:COMMAND`, which runs a shell command for every file.
            cache: folder for what is fetched, if the root is a URL.

        Raises:
            ConfigError: if the file is missing or wrong, naming the file, the line and the key.
        """
        file = Path(path)
        top = read_yaml(file, ("name", "licence", "description", "root", "weights", "splits"))
        given = top.text("root") if root is None else str(root)
        try:
            url = root_url(given, allow_pipe)
        except ValueError as error:
            told = f"{error}" if root is None else f"{error} (this root was given in place of the manifest's own)"
            raise top.problem("root", told) from error
        # One manifest may be read from several places in turn: each has a folder of its own.
        folder = Path(given) if url is None else Path(cache) / hashlib.sha256(url.encode()).hexdigest()[:12]
        known = ("train", "val", "test")
        weights = cast(Weights, top.choice("weights", get_args(Weights), "count"))
        splits = top.section("splits", known)
        return cls(
            file=file,
            name=top.text("name"),
            licence=top.text("licence"),
            description=top.text("description", ""),
            root=folder,
            splits={split: _sources(splits, split, folder, url, weights) for split in known if split in splits.value},
            weights=weights,
            url=url,
        )

    def sources(self, split: str) -> tuple[Source, ...]:
        """Return the sources of a split.

        Raises:
            ConfigError: if the manifest has no such split.
        """
        if split not in self.splits:
            raise ConfigError(f"{self.file}: splits.{split} is missing: the manifest has {', '.join(self.splits)}")
        return self.splits[split]


def _sources(splits: Section, split: str, root: Path, url: str | None, weights: Weights) -> tuple[Source, ...]:
    """Read the sources of one split."""
    found: dict[str, Source] = {}
    for entry in splits.sections(split, _SOURCE_KEYS):
        name = entry.bare_name("name")
        if name in found:
            raise entry.problem("name", f"{name!r} appears twice: use `repeat` to see a source more often")
        repeat = entry.number("repeat", 1.0)
        if repeat == 0:
            raise entry.problem("repeat", "expected a number above 0: leave the source out instead")
        try:
            own_url = None if url is None else folder_inside(folder_inside(url, split), name)
        except ValueError as error:
            raise entry.problem("name", str(error)) from error
        found[name] = Source(
            name=name,
            split=split,
            folder=root / split / name,
            manifest=splits.file,
            repeat=repeat,
            allowed_rejects=entry.number("allowed_rejects", 0.01, high=1.0),
            expected_rejects=_expected_rejects(entry),
            build=_build(entry),
            weight=_weight(entry, split, weights),
            max_tiles=None if "max_tiles" not in entry.value else entry.integer("max_tiles"),
            on_damage=cast(OnDamage, entry.choice("on_damage", get_args(OnDamage), "fail")),
            upstream=_upstream(entry),
            url=own_url,
        )
    return tuple(found.values())


def _expected_rejects(entry: Section) -> dict[str, float]:
    """Read which rejects a source is known to have."""
    reasons = list(entry.mapping("expected_rejects"))
    if not reasons:
        return {}
    shares = entry.section("expected_rejects", reasons)
    return {reason: shares.number(reason, high=1.0) for reason in reasons}


def _weight(entry: Section, split: str, weights: Weights) -> float | None:
    """Read a source's weight, which train sources have with `weights: explicit` and no others."""
    if split != "train" or weights != "explicit":
        if "weight" in entry.value:
            reason = "only train is mixed" if split != "train" else f"the manifest has `weights: {weights}`"
            raise entry.problem("weight", f"{reason}, a weight would do nothing: leave it out")
        return None
    if "weight" not in entry.value:
        raise entry.problem("weight", "this key is required, as the manifest has `weights: explicit`")
    if (weight := entry.number("weight")) == 0:
        raise entry.problem("weight", "expected a number above 0: leave the source out instead")
    return weight


def _build(entry: Section) -> Build | None:
    """Read how a source is built."""
    if entry.get("build", None) is None:
        return None
    section = entry.section("build", ("class_path", "init_args", "samples_per_shard"))
    if "." not in (class_path := section.text("class_path")):
        raise section.problem("class_path", f"expected `package.module.Class`, got {class_path!r}")
    return Build(class_path, section.mapping("init_args"), section.integer("samples_per_shard", 1000))


def _upstream(entry: Section) -> Upstream | None:
    """Read where a source comes from."""
    if "upstream" not in entry.value:
        return None
    section = entry.section("upstream", _UPSTREAM_KEYS)
    texts = {
        key: section.text(key) if key in section.value else None
        for key in _UPSTREAM_KEYS
        if key not in ("records", "verified")
    }
    texts["origin"] = texts.pop("from")
    records = section.integer("records") if "records" in section.value else None
    return Upstream(**texts, records=records, verified=section.flag("verified", False))
