"""A few scenes of the embedded world in shards, and a guide and pruners whose doings tests can follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pgp_lightning.data.writing import write_source
from pgp_lightning.embedded.records import EmbeddedRecords
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.request import Request

FAMILIES = {"objects": 3, "reading": 2}
RATIOS, LONGEST = (0.05, 0.2), 4


@dataclass(frozen=True)
class Scenes:
    """Test scenes of one family; those in `broken` get an image that does not decode.

    Args:
        known: whether records say which tokens are relevant.
        name: of the source; by default the family's.
    """

    family: Any
    size: int
    broken: tuple[int, ...] = ()
    known: bool = True
    name: str | None = None

    @property
    def source(self) -> str:
        return self.name or str(self.family)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        key, image, suffix, record = EmbeddedRecords("test", self.family, self.size)[index]
        if not self.known:
            for turn in record["turns"]:
                del turn["relevant"]
        return key, b"no image" if index in self.broken else image, suffix, record

    def identity(self) -> dict[str, Any]:
        return {"family": self.family, "size": self.size, "broken": list(self.broken), "known": self.known}


def write_scenes(folder: Path, *sources: Scenes, **options: Any) -> Path:
    """Write shards and a manifest with nothing but a test split, and return the manifest; options go to sources."""
    sources = sources or tuple(Scenes(family, size) for family, size in FAMILIES.items())
    for source in sources:
        write_source(folder / "shards" / "test" / source.source, source, samples_per_shard=2, progress=False)
    listed = [{"name": source.source, **options} for source in sources]
    manifest = {"name": "few", "licence": "Apache-2.0", "root": str(folder / "shards"), "splits": {"test": listed}}
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


class Counted(Guide):
    """Likes the first tokens best, and notes the questions and other questions of every call.

    Args:
        weight: a parameter that changes nothing; none by default.
    """

    def __init__(self, weight: float | None = None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(torch.tensor([weight]))
        self.calls: list[list[tuple[str, str | None]]] = []

    def forward(self, request: Request) -> Tensor:
        others = request.other_questions or [None] * len(request)
        self.calls.append(list(zip(request.questions, others, strict=True)))
        place = torch.arange(max(request.counts), dtype=torch.float32)
        counts = torch.tensor(request.counts)
        return (-place).masked_fill(place >= counts[:, None], -torch.inf)


class Last(Pruner):
    """Keeps the last visual tokens before layer 1, and fails in a prefill of a given number.

    Args:
        fail_at: number of the prefill that fails, from 0; never by default.
    """

    def __init__(self, keep_ratio: float = 0.1, fail_at: int | None = None) -> None:
        super().__init__()
        self.keep_ratio, self.layers, self._fail_at = keep_ratio, (1,), fail_at
        self.prefills: list[int] = []  # one list for all budgets

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth != 1:
            return state
        if len(self.prefills) == self._fail_at:
            raise RuntimeError("power cut")
        self.prefills.append(len(state.hidden))
        place = torch.arange(int(state.counts.max()), dtype=torch.float32)
        scores = place.expand(len(state.hidden), -1).masked_fill(place >= state.counts[:, None], -torch.inf)
        return state.keep_tokens(keep_top(scores, self.keep_ratio))


def make(manifest: Path, methods: dict[str, Pruner], **options: Any) -> Benchmark:
    """Return a benchmark on a manifest of few scenes; two questions of each of two images a batch."""
    settings = {"keep_ratios": RATIOS, "batch_size": 2, "questions_per_image": 2, "max_new_tokens": LONGEST}
    return Benchmark(methods, manifest=str(manifest), **{**settings, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Return all results and what is noted beside them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
