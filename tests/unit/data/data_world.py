"""A tiny world of records for the data tests."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.mixture import EpochPlan, Mixture, StreamSource
from pgp_lightning.vlm.tiles import TileRule

SIZES = {"large": 97, "middle": 31, "small": 5}


def picture(number: int = 0, width: int = 16, height: int = 16, form: str = "PNG") -> bytes:
    """Return an encoded image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, 10, 20)).save(buffer, form)
    return buffer.getvalue()


@dataclass(frozen=True)
class PictureBuilder:
    """Makes records `NAME-0000`...; those in `broken` get an image that does not decode."""

    name: str
    size: int
    broken: tuple[int, ...] = ()
    side: int = 16

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        key = f"{self.name}-{index:04d}"
        turns = [{"question": f"q{turn} {key}", "answer": f"a{index}", "relevant": [turn]} for turn in range(2)]
        image = b"not an image" if index in self.broken else picture(index, self.side, self.side)
        return key, image, "png", {"id": key, "turns": turns}

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "broken": list(self.broken)}


@dataclass(frozen=True)
class FailingBuilder(PictureBuilder):
    """Fails in the middle."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        if index == self.size // 2:
            raise RuntimeError("lights out")
        return super().__getitem__(index)


@dataclass(frozen=True)
class WordProcessor:
    """Tiles of 8 pixels with 4 tokens each; a prompt is as long as its words and visual tokens."""

    rule: TileRule = field(default_factory=lambda: TileRule(tile_size=8, tokens_per_side=2, max_tiles=4))
    max_length: int = 100

    def prompt_length(self, question: str, answer: str, visual_tokens: int, system: str | None = None) -> int:
        return len((system or "").split()) + len(question.split()) + len(answer.split()) + visual_tokens

    def fits(self, question: str, answer: str, visual_tokens: int, budget: int, system: str | None = None) -> bool:
        return self.prompt_length(question, answer, visual_tokens, system) <= budget


def stream_source(folder: Path, repeat: float = 1.0, allowed_rejects: float = 0.0) -> StreamSource:
    """Return a written source as the stream sees it."""
    return StreamSource(folder.name, Index.load(folder).shards, repeat, allowed_rejects)


def plain_source(name: str, sizes: list[int], repeat: float = 1.0) -> StreamSource:
    """Return a source without files, of which only the numbers matter."""
    return StreamSource(name, tuple(Shard(Path(f"{name}-{i}.tar"), n, 0, "") for i, n in enumerate(sizes)), repeat)


def global_order(mixture: Mixture, epoch: int) -> np.ndarray:
    """Return the sources of an epoch's records as all ranks together see them, before batches are grouped."""
    plan = EpochPlan(mixture, epoch)
    lanes = [plan.labels(lane).reshape(-1, mixture.batch_size) for lane in range(mixture.lanes)]
    return np.stack(lanes, axis=1).reshape(-1)
