"""SIGUSR1, by which a cluster warns of the end: noted from the first moment on, acted upon when it suits.

Python dies of a SIGUSR1 that nobody handles, and the imports of a run take many seconds. So this file imports nothing
heavy, and `listen` is the first thing that a run on a cluster does.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["forget", "listen", "release", "warned"]

_warnings: list[int] = []


def listen() -> None:
    """Note every SIGUSR1 from now on; without effect outside of the main thread, which alone may handle signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _note)


def warned() -> bool:
    """Return whether the signal has come."""
    return bool(_warnings)


def forget() -> None:
    """Forget that the signal has come: it was acted upon."""
    _warnings.clear()


def release() -> None:
    """Leave the signal to others again, one that has come included."""
    if signal.getsignal(signal.SIGUSR1) is _note:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        if warned():
            signal.raise_signal(signal.SIGUSR1)


def _note(number: int, frame: FrameType | None) -> None:
    _warnings.append(number)
