"""How far a sweep is: bars on a terminal, a line for each finished run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pgp_lightning.evaluation.sweep_run import Run, steps_done

__all__ = ["SweepBars", "sweep_bars"]


class SweepBars:
    """A bar for the whole, and one for each run that is being trained."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.done, self.began = progress, runs, 0, time.perf_counter()
        self.whole = progress.add_task("sweep", total=runs)
        self.tasks: dict[str, TaskID] = {}

    def show(self, running: Sequence[Run]) -> None:
        """Show the steps of the runs that are being trained."""
        for run in running if not self.progress.disable else ():
            if run.name not in self.tasks:
                self.tasks[run.name] = self.progress.add_task(run.name, total=None)
            step, total = steps_done(run.log)
            self.progress.update(self.tasks[run.name], completed=step, total=total)

    def finish(self, run: Run, how: str) -> None:
        """Count a run that is over."""
        self.done += 1
        self.progress.advance(self.whole)
        if run.name in self.tasks:
            self.progress.remove_task(self.tasks.pop(run.name))
        if self.progress.disable:
            minutes = (time.perf_counter() - self.began) / 60
            print(f"{self.done}/{self.runs}  {run.name} {how}, {minutes:.1f} min", flush=True)


@contextmanager
def sweep_bars(runs: int) -> Iterator[SweepBars]:
    """Show progress for as long as a sweep takes."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        yield SweepBars(progress, runs)
