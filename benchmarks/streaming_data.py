"""The records that `streaming.py` measures with: pictures as large as photographs, in four sources of skewed sizes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgp_lightning.data.mixture import Mixture, StreamSource
from pgp_lightning.data.records import RawRecord
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.data.writing import write_source
from pgp_lightning.embedded.world import WORDS

__all__ = ["LANES", "SHARDS", "Pictures", "in_memory", "mix", "write_sources"]

SHARDS = 32  # of equal size, so that loaders that deal shards to their workers deal them evenly
LANES = 64
_PHOTOS = ((640, 480), (640, 427), (480, 640), (640, 360), (612, 612), (500, 375))
# Source -> shards, sizes of the pictures, words of an answer (least, most).
_SOURCES: dict[str, tuple[int, tuple[tuple[int, int], ...], tuple[int, int]]] = {
    "questions": (20, _PHOTOS, (1, 8)),
    "captions": (8, _PHOTOS, (30, 80)),
    "objects": (3, ((336, 336), (448, 448), (400, 380)), (1, 4)),
    "pages": (1, ((600, 850), (800, 620)), (20, 60)),
}


@dataclass(frozen=True)
class Pictures:
    """Builds the records of a source: smooth pictures under noise, stored as JPEG of quality 90.

    The noise makes their bytes as many as a photograph's: about 100 kB at 640 x 480.
    """

    name: str
    count: int
    sizes: tuple[tuple[int, int], ...]
    words: tuple[int, int]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        """Return key, picture, extension and record."""
        generator = np.random.default_rng([*self.name.encode(), index])
        width, height = self.sizes[int(generator.integers(len(self.sizes)))]
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = np.roll(self._noise[:height, :width], generator.integers(100, size=2), axis=(0, 1))
        buffer = io.BytesIO()
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        least, most = self.words
        turn = {
            "question": " ".join(generator.choice(WORDS, generator.integers(5, 16))),
            "answer": " ".join(generator.choice(WORDS, generator.integers(least, most + 1))),
        }
        record = {"turns": [turn], "width": width, "height": height}
        return f"{self.name}-{index:06d}", buffer.getvalue(), "jpg", record

    def identity(self) -> dict[str, Any]:
        """Return all that the records depend on."""
        return {"pictures": 1, "name": self.name, "count": self.count, "sizes": self.sizes, "words": self.words}

    @cached_property
    def _noise(self) -> np.ndarray:
        side = max(max(size) for size in self.sizes)
        return np.random.default_rng(0).normal(0, 9, (side, side, 3)).astype(np.int16)


def write_sources(folder: Path, samples: int) -> tuple[StreamSource, ...]:
    """Write the sources' shards into a folder, or find them there, and return them as the stream sees them."""
    each = samples // SHARDS
    found = []
    for name, (shards, sizes, words) in _SOURCES.items():
        index = write_source(folder / name, Pictures(name, shards * each, sizes, words), each, progress=False)
        found.append(StreamSource(name, index.shards))
    return tuple(found)


def mix(sources: tuple[StreamSource, ...], batch_size: int, group_batches: int = 1) -> Mixture:
    """Return the order that is measured, an epoch of which is every record once.

    Raises:
        SystemExit: if rounds of lanes x batch size do not make it so.
    """
    samples = sum(source.samples for source in sources)
    lanes = min(LANES, samples // (8 * batch_size))
    mixture = Mixture(sources, 0, lanes, batch_size, mixing="even", group_batches=group_batches)
    if sum(mixture.takes) != samples:
        raise SystemExit(f"--samples {samples}: expected a multiple of {SHARDS} and of {lanes} lanes x {batch_size}")
    return mixture


def in_memory(sources: tuple[StreamSource, ...], part: int = 0, parts: int = 1) -> list[RawRecord]:
    """Return every parts-th record of the sources, read."""
    places = [(shard, number) for source in sources for shard in source.shards for number in range(shard.samples)]
    reader = ShardReader(SHARDS)
    return [reader.read(shard, number) for shard, number in places[part::parts]]
