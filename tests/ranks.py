"""A function in two processes that form a group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

from torch import distributed

__all__ = ["on_two_ranks"]


def on_two_ranks(target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `target(rank, *arguments)` returns on either rank; raise what it raises, or that its process died."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        ranks = [pool.submit(_in_group, folder, target, arguments, rank) for rank in range(2)]
        for done in as_completed(ranks):  # the first to fail is the reason why the other does
            done.result()
        return [rank.result() for rank in ranks]


def _in_group(folder: str, target: Callable[..., Any], arguments: tuple[Any, ...], rank: int) -> Any:
    # They meet by a file: a port that was free a moment ago may be another test's by now.
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=10)
    distributed.init_process_group("gloo", meeting, timeout=patience, rank=rank, world_size=2)
    try:
        return target(rank, *arguments)
    finally:
        distributed.destroy_process_group()
