"""What callbacks look at, without a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Recorder:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.figures.append((step, dict(metrics)))


def trainer(**given: Any) -> Any:
    defaults: dict[str, Any] = {
        "global_step": 0, "max_steps": 100, "world_size": 1, "global_rank": 0, "is_global_zero": True, "loggers": [],
        "log_every_n_steps": 1, "callback_metrics": {}, "sanity_checking": False,
    }  # fmt: skip
    return SimpleNamespace(**defaults | given)
