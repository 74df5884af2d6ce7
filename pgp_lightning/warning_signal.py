"""SIGUSR1, by which a cluster warns of the end: noted from the first moment on, acted upon when it suits.

Python dies of a SIGUSR1 that nobody handles, and the imports of a run take many seconds. So this file imports nothing
heavy, and `listen` is the first thing that a run on a cluster does.
"""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["listen", "warned"]

_warnings: list[int] = []


def listen() -> None:
    """Note every SIGUSR1 from now on; only the main thread may call this."""
    signal.signal(signal.SIGUSR1, _note)


def warned() -> bool:
    """Return whether the signal has come."""
    return bool(_warnings)


def _note(number: int, frame: FrameType | None) -> None:
    _warnings.append(number)
