"""Worker processes of a build: the builder travels to each once, and none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pgp_lightning.data.records import SampleBuilder
from pgp_lightning.errors import ConfigError

__all__ = ["run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")
# Of a worker process, set when it starts: the builder of a large source is too large to travel with every task.
_builder: list[SampleBuilder] = []


def run_tasks(
    work: Callable[[SampleBuilder, Task], Result], builder: SampleBuilder, tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield every task with its result, as they are done.

    Raises:
        ConfigError: if a worker process dies.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _begin, (builder,)) as pool:
        try:
            jobs = {pool.submit(_call, work, task): task for task in tasks}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a process that writes shards died, as it does when memory runs out: build again with fewer workers; "
                "finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits: who goes on must be alone with the part folder


def _begin(builder: SampleBuilder) -> None:
    """Keep the builder, and watch the process that started this one."""
    # Ctrl-C reaches all processes of a terminal: the one that started this one decides, and what is in work gets done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _builder[:] = [builder]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pool's idle workers wait for tasks for ever when the process that would send them was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(work: Callable[..., Any], task: Any) -> Any:  # noqa: ANN401 the pool knows no more
    return work(_builder[0], task)
