"""Instruction data for Lightning: builds missing shards, streams the training split, walks the others in order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.index import INDEX_FILE
from pgp_lightning.data.loader import EvaluationLoader, TrainingLoader
from pgp_lightning.data.manifest import CACHE_FOLDER, Manifest, Weights
from pgp_lightning.data.mixture import Mixing, Mixture, StreamSource, check_topology
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.roots import file_inside
from pgp_lightning.data.writing import build_source
from pgp_lightning.errors import ConfigError

__all__ = ["InstructionData"]


class InstructionData(pl.LightningDataModule):
    """Question-answer data from the shards of a manifest.

    Training data is one endless stream with a nominal length of `trainer.max_steps` optimizer steps, so Lightning sees
    a single epoch; a batch knows its data epoch. A checkpoint holds the position, and a resumed run goes on at the
    exact record with any number of ranks x workers that divides the lanes. Under `trainer.overfit_batches` the stream
    is its first micro-batches, so many on each rank, over and over; validation sees as many batches of its own.

    Args:
        manifest: a YAML file that says what the data is, e.g. data_manifests/embedded.yaml.
        base: the guide's base model, whose tiling and prompts the data is prepared for: `embedded:guide`, a
            folder, or a repository on the hub.
        batch_size: records per micro-batch of one rank.
        val_batch_size: records per batch in validation and test; by default batch_size.
        turns: use the `first` question turn of a record, or `all`, which share the image.
        max_length: longest prompt with answer in slots; longer ones get fewer tiles, then are left out. By default
            the base model's limit.
        max_tiles: greatest number of tiles of an image, the thumbnail apart; by default, and at most, the base model's.
            A source's own `max_tiles` in the manifest takes its place.
        workers: worker processes per rank that read and decode; 0 reads in the training process.
        lanes: virtual streams that fix the order for any number of ranks x workers that divides them.
        seed: seed of the order.
        shuffle_window: records of one source within a lane that are shuffled together.
        mixing: how the sources follow one another: at `random`, where the shares of 2,000 records in a row are off by
            some per cent, or `even`, where they are off by a fraction of one. The manifest's `weights` say what the
            shares are.
        group_batches: batches of a lane whose records are sorted by estimated slots and dealt anew, so that records of
            one batch need little padding; 1 leaves them as they come. The shares of the sources are then those of
            group_batches x lanes micro-batches.
        limit_val_records: validate on so many records, taken from all sources in proportion; by default on all.
        root: folder or URL of the shards, in place of the manifest's.
        build_workers: processes that write shards when a source has to be built; 0 writes in the main process.
        cache: folder on a local disk for what is fetched, where the root is a URL.
        cache_gib: greatest size of the fetched shards in GiB; those read longest ago make room.
        allow_pipe: accept a root `pipe:COMMAND`, which runs a shell command for every file.
    """

    def __init__(
        self,
        manifest: str,
        base: str,
        batch_size: int = 1,
        val_batch_size: int | None = None,
        turns: Literal["first", "all"] = "first",
        max_length: int | None = None,
        max_tiles: int | None = None,
        workers: int = 0,
        lanes: int = 64,
        seed: int = 0,
        shuffle_window: int = 1000,
        mixing: Mixing = "random",
        group_batches: int = 1,
        limit_val_records: int | None = None,
        root: str | None = None,
        build_workers: int = 0,
        cache: str = str(CACHE_FOLDER),
        cache_gib: float = 100.0,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        numbers = {
            "batch_size": batch_size,
            "val_batch_size": val_batch_size,
            "max_length": max_length,
            "max_tiles": max_tiles,
            "lanes": lanes,
            "shuffle_window": shuffle_window,
            "group_batches": group_batches,
            "limit_val_records": limit_val_records,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        for name, value in {"workers": workers, "seed": seed, "build_workers": build_workers}.items():
            if value < 0:
                raise ConfigError(f"data.{name} must be at least 0, got {value}")
        if not 0 < cache_gib < math.inf:
            raise ConfigError(f"data.cache_gib must be above 0, got {cache_gib}")
        self.manifest, self.base, self.root = manifest, base, root
        self.cache_folder, self.allow_pipe = cache, allow_pipe
        self.cache = ShardCache(Path(cache) / "shards", round(cache_gib * 2**30), allow_pipe=allow_pipe)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.turns, self.max_length, self.max_tiles = turns, max_length, max_tiles
        self.workers, self.build_workers = workers, build_workers
        self.lanes, self.seed, self.shuffle_window = lanes, seed, shuffle_window
        self.mixing, self.group_batches = mixing, group_batches
        self.limit_val_records = limit_val_records
        self.reader: ConversationReader | None = None
        self.mixture: Mixture | None = None
        self._splits: dict[str, tuple[StreamSource, ...]] = {}

    def prepare_data(self) -> None:
        """Build the sources that have no shards, fetch the indices of remote ones; one rank does it, the others wait.

        Raises:
            ConfigError: if a source has neither shards nor a `build:`, or shards of other build settings.
            DataError: if shards are missing or damaged, or an index cannot be fetched.
        """
        for sources in self.read_manifest().splits.values():
            for source in sources:
                if source.url is None:
                    build_source(source, self.build_workers)
                else:
                    self.cache.fetch_index(file_inside(source.url, INDEX_FILE), source.folder)

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest and the indices, and plan the mixture.

        Raises:
            ConfigError: if a split is missing that the stage needs, or the lanes do not suit data or ranks.
            DataError: if shards are missing or damaged.
        """
        from pgp_lightning.vlm.loading import load_processor  # loads a tokenizer: only when data is really used

        manifest = self.read_manifest()
        needed = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["test"]}.get(stage or "", [])
        wanted = needed + ["val"] * (stage == "fit" and "val" in manifest.splits) if stage else list(manifest.splits)
        for split in wanted:
            self._splits[split] = tuple(StreamSource.load(source) for source in manifest.sources(split))
        self.reader = ConversationReader(load_processor(self.base), self.turns, self.max_length, self.max_tiles)
        if "train" in wanted:
            self.mixture = self.plan(self._splits["train"], manifest.weights)
            check_topology(self.lanes, self.trainer.world_size if self.trainer else 1, self.workers)

    def plan(self, sources: tuple[StreamSource, ...], weights: Weights) -> Mixture:
        """Return how these settings mix the sources of the train split.

        Raises:
            ConfigError: if the lanes do not suit the data, or the weights leave a source without a record.
        """
        return Mixture(
            sources,
            self.seed,
            self.lanes,
            self.batch_size,
            self.shuffle_window,
            weights,
            self.mixing,
            self.group_batches,
        )

    def train_dataloader(self) -> TrainingLoader:
        """Return this rank's share of the endless stream.

        Raises:
            ConfigError: if the trainer does not say how many steps there are.
        """
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise ConfigError(f"trainer.max_steps must say how long training is, got {trainer.max_steps}")
        if self.mixture is None or self.reader is None:
            raise RuntimeError("setup has not run")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        overfit = int(trainer.overfit_batches)  # type: ignore[attr-defined]
        if overfit:
            # Lightning would make them an epoch each time, and the run's last checkpoint one that cannot be resumed.
            trainer.limit_train_batches = 1.0
        return TrainingLoader(
            self.mixture,
            self.reader,
            length=trainer.max_steps * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            workers=self.workers,
            processed=lambda: progress.state_dict()["current"]["processed"],
            pin_memory=trainer.strategy.root_device.type == "cuda",
            cache=self.cache,
            repeat=overfit * trainer.world_size or None,
        )

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Return this rank's share of the validation split; nothing if the manifest has none."""
        return self._evaluation("val", self.limit_val_records) if "val" in self._splits else []

    def test_dataloader(self) -> EvaluationLoader:
        """Return this rank's share of the test split."""
        return self._evaluation("test", None)

    def predict_dataloader(self) -> EvaluationLoader:
        """Return this rank's share of the test split."""
        return self._evaluation("test", None)

    def source_names(self, split: str) -> list[str]:
        """Return the names of a split's sources, as far as `setup` has read it."""
        return [source.name for source in self._splits.get(split, ())]

    def sample(self, split: str, records: int | None = None, batch_size: int | None = None) -> EvaluationLoader:
        """Return records of a split in order, all by default, without a trainer; call `prepare_data` first.

        Raises:
            ConfigError: if the manifest has no such split.
            DataError: if shards are missing or damaged.
        """
        from pgp_lightning.vlm.loading import load_processor

        sources = tuple(StreamSource.load(source) for source in self.read_manifest().sources(split))
        reader = ConversationReader(load_processor(self.base), self.turns, self.max_length, self.max_tiles)
        return EvaluationLoader(sources, reader, batch_size or self.val_batch_size, limit=records, cache=self.cache)

    def read_manifest(self) -> Manifest:
        """Read the manifest, with the root and the permissions given here.

        Raises:
            ConfigError: if it is missing or wrong.
        """
        return Manifest.load(self.manifest, self.root, self.allow_pipe, self.cache_folder)

    def _evaluation(self, split: str, limit: int | None) -> EvaluationLoader:
        trainer = self._trainer()
        if self.reader is None:
            raise RuntimeError("setup has not run")
        return EvaluationLoader(
            self._splits[split],
            self.reader,
            self.val_batch_size,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            workers=self.workers,
            limit=limit,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            cache=self.cache,
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the data module has no trainer yet: pass it to trainer.fit")
        return self.trainer
