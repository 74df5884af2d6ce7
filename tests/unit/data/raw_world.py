"""Raw data for the tests of building: a builder that rejects, and annotations with images as upstream has them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_world import PictureBuilder, picture

from pgp_lightning.data.records import UnusableRecord


@dataclass(frozen=True)
class PickyBuilder(PictureBuilder):
    """Rejects the records in `broken`, the even ones for one reason, the odd ones for another."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        key, *rest = super().__getitem__(index)
        if index in self.broken:
            raise UnusableRecord("odd" if index % 2 else "even", f"number {index}", key)
        return key, *rest


@dataclass(frozen=True)
class InterruptedBuilder(PictureBuilder):
    """Is hit by Ctrl-C in the middle, as all processes of a terminal are."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        if index == self.size // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def turns(question: Any = "<image>\nWhat is it?", answer: Any = "a dot") -> list[dict[str, Any]]:
    """Return a conversation of one turn."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def raw(**changes: Any) -> dict[str, Any]:
    """Return a good record of one turn about `one.png`, but for the changes."""
    return {"id": 7, "image": "one.png", "conversations": turns(), **changes}


def write_raw(
    folder: Path, lines: Sequence[Any], images: Mapping[str, bytes] | None = None, name: str = "notes.jsonl"
) -> dict[str, str]:
    """Write annotations and images and return the builder's arguments; a line that is bytes is written as it is."""
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    for path, data in {"one.png": picture(), **(images or {})}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    (folder / name).write_bytes(b"".join(text + b"\n" for text in texts))
    return {"annotations": str(folder / name), "images": str(root)}
