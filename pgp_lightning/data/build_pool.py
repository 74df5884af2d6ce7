"""Worker processes: what they share travels to each once, and none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pgp_lightning.data.parent_watch import end_with_parent
from pgp_lightning.errors import ConfigError

__all__ = ["run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Shared = TypeVar("Shared")
# Of a worker process, set when it starts: the builder of a large source is too large to travel with every task.
_shared: list[Any] = []


def run_tasks(
    work: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield every task with its result, as they are done.

    Args:
        work: what is done: a function of a module, called with what is shared and a task.
        shared: what every task needs, such as the builder of a source.
        tasks: what is to be done.
        workers: number of processes, at least 1.

    Raises:
        ConfigError: if a worker process dies.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of a process with threads may hang
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _begin, (shared,)) as pool:
        try:
            jobs = {pool.submit(_call, work, task): task for task in tasks}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker process died, as it does when memory runs out: run it again with fewer workers; what a build "
                "has finished is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits: who goes on must be alone with the part folder


def _begin(shared: Any) -> None:  # noqa: ANN401 the pool knows no more
    """Keep what is shared, and watch the process that started this one."""
    # Ctrl-C reaches all processes of a terminal: the one that started this one decides, and what is in work gets done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared[:] = [shared]
    end_with_parent()  # idle workers of a pool wait for tasks for ever


def _call(work: Callable[..., Any], task: Any) -> Any:  # noqa: ANN401 the pool knows no more
    return work(_shared[0], task)
