"""Worker processes that end with the process that started them, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading

__all__ = ["end_with_parent"]


def end_with_parent() -> None:
    """Watch, from a thread, the process that started this one, and end when it is gone.

    A process killed with SIGKILL cannot stop its workers. Neither does a fork server: it lives as long as they do, and
    so a worker never finds itself without the parent that torch looks for.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
