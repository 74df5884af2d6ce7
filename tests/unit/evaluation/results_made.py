"""A small results folder made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgp_lightning.evaluation.scoring import Answer
from pgp_lightning.vlm.tiles import TileGrid

GRID = TileGrid(2, 1, 2, True)  # 12 tokens: two tiles of 2 x 2, and the thumbnail's 2 x 2
FULL, KEPT = 12, 3

# Three scenes with 2, 2 and 1 turns; which samples are answered rightly is written out, one digit each.
SAMPLES = [("a", 0, "colour"), ("a", 1, "count"), ("b", 0, "colour"), ("b", 1, "count"), ("c", 0, "colour")]


def answer(key: str = "a", turn: int = 0, type: str = "colour", correct: bool = True, **more: Any) -> Answer:
    values: dict[str, Any] = {
        "source": "made",
        "question": f"what {type} is it, {key}{turn}?",
        "truth": "red",
        "given": "red" if correct else "blue",
        "n": FULL,
        "kept": FULL,
        "layer_average": 12.0,
        "kv_entries": 80,
        **more,
    }
    return Answer(key=key, turn=turn, type=type, correct=correct, **values)


def answers(right: str, **more: Any) -> list[Answer]:
    return [answer(*sample, digit == "1", **more) for sample, digit in zip(SAMPLES, right, strict=True)]


def write(folder: Path, methods: Mapping[str, Sequence[Answer]], info: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in methods.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")
    if info is not None:
        (folder / "methods.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def comparison(folder: Path) -> Path:
    """Full 11110, pgp@25 11010, random@25 10001, pgp@50 11110; importance and masks for the first two at 25 %."""
    keep = np.zeros(FULL, dtype=bool)
    keep[[0, 5, 11]] = True
    pruned = {"kept": KEPT, "layer_average": 4.5, "kv_entries": 35, "keep": keep}
    return write(
        folder,
        {
            "full": answers("11110", recall=1.0),
            "random@25": answers("10001", recall=0.25, **pruned),
            "pgp@25": answers("11010", recall=0.75, importance=np.arange(12, dtype=np.float32), **pruned),
            "pgp@50": answers("11110", kept=6, layer_average=6.0, kv_entries=50),
        },
        {
            "full": {"name": "full", "keep_ratio": None, "layers": [], "positions": "original", "flops": 8e9},
            "random@25": {"name": "random", "keep_ratio": 0.25, "layers": [0], "positions": "original", "flops": 2e9},
            "pgp@25": {
                "name": "pgp",
                "keep_ratio": 0.25,
                "layers": [0],
                "positions": "renumbered",
                "guide": "tiny",
                "flops": 2e9,
                "guide_flops": 1e9,
                "latency": {"prefill, ms": 1.5, "device": "cpu"},
                "note": "a | note",
            },
            "pgp@50": {"name": "pgp", "keep_ratio": 0.5, "layers": [0, 2], "guide": "tiny", "flops": 4e9},
        },
    )
