"""`pgp sweep`: train a configuration with one thing changed at a time, score every guide, and tabulate.

A sweep is a folder of overlays with a `sweep.yaml`, which says over which configuration they go and which make a row.
Every seed of a row is a run of its own in `<output>/<row>/seed<n>`, trained by `lightning fit` in a process of its own,
exported beside its checkpoints and scored like the methods of `pgp compare`, on the same questions as all others. What
is finished is not done again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from pgp_lightning.data.module import InstructionData
from pgp_lightning.embedded.object_map import ObjectMap
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.divergence import guide_figures
from pgp_lightning.evaluation.sweep_report import Run, learning_curve, write_tables
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion
from pgp_lightning.prefill import Pruner
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.training.command_line import quieten, reason_of, terse
from pgp_lightning.training.export import export_guide
from pgp_lightning.training.run import RECORD, checkpoints, read_checkpoint
from pgp_lightning.vlm.request import Request

__all__ = ["Sweep", "SweepRow", "sweep"]

_STEP = re.compile(r"\bstep (\d+)/(\d+)")


@dataclass(frozen=True)
class SweepRow:
    """What a row of the table changes.

    Args:
        overlays: files of the sweep's folder, without `.yaml`, that go over the base in this order.
        seeds: one run each.
        reference: the row that differences are to; by default the sweep's.
        another_question: whether its guides are also scored under another image's question, as a control.
    """

    overlays: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    reference: str | None = None
    another_question: bool = False


class Sweep:
    """Rows of an ablation, and how they are scored.

    Args:
        folder: of the overlays and of `sweep.yaml`.
        base: the configuration they go over.
        output: where runs, answers and tables go.
        rows: by name.
        benchmark: asks the answer model; its methods are the controls of a whole sweep.
        reference: the row that others are compared with.
        every_row: overlays that go right over the base in every row.
        figures_images: so many images tell what a guide reads from its latents and where its divergence lies.

    Raises:
        ConfigError: if a name does not fit or a file is missing.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        output: Path,
        rows: dict[str, SweepRow],
        benchmark: Benchmark,
        reference: str,
        every_row: tuple[str, ...] = (),
        figures_images: int = 100,
    ) -> None:
        self.folder, self.base, self.output, self.rows = folder, base, output, rows
        self.benchmark, self.reference, self.every_row = benchmark, reference, every_row
        self.figures_images = figures_images
        self.controls = dict(benchmark.pruners)
        self._training: set[subprocess.Popen[bytes]] = set()
        for name, row in rows.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in benchmark.pruners:
                raise ConfigError(f"a row is called with letters, digits, _, . and -, and not like a control: {name!r}")
            if not row.seeds or len(set(row.seeds)) < len(row.seeds) or min(row.seeds) < 0:
                raise ConfigError(f"row {name}: expected different seeds of at least 0, got {list(row.seeds)}")
            if self.reference_of(name) not in rows:
                raise ConfigError(f"row {name}: its reference {self.reference_of(name)!r} is no row")
        for config in {base, *(path for name in rows for path in self._configs(name))}:
            if not config.is_file():
                raise ConfigError(f"{folder / 'sweep.yaml'} names {config}, which does not exist")

    @classmethod
    def load(cls, folder: Path, output: Path | None = None) -> Sweep:
        """Read the sweep of a folder.

        Args:
            folder: holds `sweep.yaml`.
            output: in place of the file's own.

        Raises:
            ConfigError: if there is none or it is wrong.
        """
        file = folder / "sweep.yaml"
        if not file.is_file():
            raise ConfigError(f"expected a folder with a sweep.yaml, found none in {folder}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(cls, as_group=False, skip={"folder", "benchmark"})
        own = {"guide_alone", "keep_importance", "timed_images"}
        parser.add_class_arguments(Benchmark, "benchmark", skip=own)
        torch.manual_seed(0)  # controls with weights of their own are the same ones whenever a sweep goes on
        try:
            built: Any = parser.instantiate(parser.parse_args(["--config", str(file)]))
        except ArgumentError as error:
            raise ConfigError(f"{file}: {terse(str(error))}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{file}: {reason_of(error)}") from error
        built.pop("config", None)
        return cls(**{**dict(built.items()), "folder": folder, "output": output or built.output})

    def reference_of(self, row: str) -> str:
        """Return the row that a row is compared with."""
        return self.rows[row].reference or self.reference

    def runs(self, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Return the runs of some rows and seeds, of all by default, first seeds first.

        Raises:
            ConfigError: if there are none of that name or seed.
        """
        if unknown := [name for name in rows if name not in self.rows]:
            raise ConfigError(f"no row is called {', '.join(unknown)}: expected some of {', '.join(self.rows)}")
        found = [
            (place, Run(name, seed, self.output / name / f"seed{seed}"))
            for name in rows or self.rows
            for place, seed in enumerate(self.rows[name].seeds)
            if seed in seeds or not seeds
        ]
        if not found:
            raise ConfigError(f"none of the rows has a run of seed {', '.join(map(str, seeds))}")
        return [run for _, run in sorted(found, key=lambda pair: pair[0])]

    def _configs(self, row: str) -> list[Path]:
        overlays = (*self.every_row, *self.rows[row].overlays)
        return [self.base, *(self.folder / f"{overlay}.yaml" for overlay in overlays)]

    def command(self, run: Run) -> list[str]:
        """Return the arguments of `lightning` that train a run, or go on with it."""
        words = ["fit"]
        for config in self._configs(run.row):
            words += ["--config", str(config)]
        words += ["--trainer.default_root_dir", str(run.folder)]
        for key in ("seed_everything", "model.init_args.seed", "data.init_args.seed"):
            words += [f"--{key}", str(run.seed)]
        return words + (["--ckpt_path", "last"] if checkpoints(run.folder) else [])

    def train(self, run: Run, threads: int) -> None:
        """Train a run in a process of its own, unless it is trained.

        Raises:
            ConfigError: if the process fails; says where its output is.
        """
        if run.guide.exists() or _is_trained(run.folder):
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        with run.log.open("a", encoding="utf-8") as log:
            try:
                # The child keeps the lock for as long as it lives, also when this process is killed.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{run.name} failed: another process is training in {run.folder}") from error
            process = subprocess.Popen(
                [sys.executable, "-m", "pgp_lightning", *self.command(run)],
                stdout=log,
                stderr=subprocess.STDOUT,
                # Processes side by side that each take all cores would wait for each other.
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )
            self._training.add(process)
            code = process.wait()
            self._training.discard(process)
        if code:
            raise ConfigError(f"{run.name} failed with exit code {code}: {_last_line(run.log)} ({run.log})")

    def score(self, runs: Sequence[Run], controls: Mapping[str, Pruner]) -> None:
        """Export guides, ask the answer model what it makes of the tokens they keep, and look into them.

        Not for several threads: transformers loads models with switches that belong to the process.

        Args:
            runs: that are trained.
            controls: to be asked beside them, if they have not been.

        Raises:
            ConfigError: if the folder holds answers of another guide of that name.
        """
        for run in runs:
            if not run.guide.exists():
                export_guide(run.folder, run.guide)
        guides = {run: PosteriorGuide.from_pretrained(str(run.guide)) for run in runs}
        methods: dict[str, Pruner] = {run.name: Guided(guide) for run, guide in guides.items()}
        for run, guide in guides.items():
            if self.rows[run.row].another_question:
                methods[f"{run.name}_another_question"] = Guided(AnotherQuestion(guide))
        self.benchmark.pruners = {**controls, **methods}
        self.benchmark.run(self.output / "answers")
        for run, guide in guides.items():
            if not run.figures.is_file():
                self._look_into(run, guide)

    def _look_into(self, run: Run, guide: PosteriorGuide) -> None:
        """Write what a run's guide does and how it learned that."""
        scored, base = self.benchmark, guide.arguments["base"]
        data = InstructionData(scored.manifest, base, val_batch_size=8, turns="all", root=scored.root)
        figures = guide_figures(guide, data.sample(scored.split, self.figures_images), self._objects())
        part = run.figures.with_suffix(".part")
        part.write_text(json.dumps({**figures, **learning_curve(run.folder)}, indent=2) + "\n", encoding="utf-8")
        part.replace(run.figures)

    def _objects(self) -> Callable[[Request], Tensor] | None:
        """Return which visual tokens show any object, if a control knows that."""
        guides = (pruner.guide for pruner in self.controls.values() if isinstance(pruner, Guided))
        return next((guide.objects for guide in guides if isinstance(guide, ObjectMap)), None)

    def __call__(self, rows: Sequence[str] = (), seeds: Sequence[int] = (), jobs: int = 1) -> list[str]:
        """Train, score and tabulate; the tables hold every run that is finished, also of earlier calls.

        Args:
            rows: by default all, and the controls; full, random, uniform and oracle run in either case.
            seeds: by default all that a row names.
            jobs: runs that are trained side by side, sharing the cores.

        Returns:
            What went wrong, a line for each run that failed; the others are finished all the same.

        Raises:
            ConfigError: if there is nothing to do, or jobs is not positive.
        """
        if jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {jobs}")
        runs, failed = self.runs(rows, seeds), list[str]()
        self.output.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with self._threads(jobs) as pool, _bars(len(runs)) as bars:
            waiting = {pool.submit(self.train, run, threads): run for run in runs}
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                bars.show([run for future, run in waiting.items() if future.running()])
                trained = list[Run]()
                for future in sorted(done, key=lambda one: runs.index(waiting[one])):
                    run = waiting.pop(future)
                    try:
                        future.result()
                        trained.append(run)
                    except ConfigError as error:
                        failed.append(" ".join(str(error).split()))
                        bars.finish(run, "failed")
                if trained:
                    self.score(trained, {} if rows else self.controls)
                    self.tabulate()
                for run in trained:
                    bars.finish(run, "finished")
        return failed

    @contextmanager
    def _threads(self, jobs: int) -> Iterator[ThreadPoolExecutor]:
        """Yield threads that wait for training processes; these end when the sweep is interrupted."""
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._training):
                    process.terminate()
                raise

    def tabulate(self) -> None:
        """Write the tables and plots of all finished runs."""
        finished = [run for run in self.runs() if run.figures.is_file()]
        if finished:
            write_tables(self.output, finished, self.reference_of, list(self.controls))


def sweep(folder: Path, output: Path | None, rows: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Run the command and return its exit code: 1 if a run failed.

    Raises:
        ConfigError: if the sweep cannot work.
    """
    quieten()
    planned = Sweep.load(folder, output)
    failed = planned(rows, seeds, jobs)
    table = planned.output / "sweep.md"
    if table.is_file():
        sys.stdout.write(table.read_text(encoding="utf-8") + f"\ntables and plots: {planned.output}\n")
    for line in failed:
        sys.stderr.write(f"error: {line}\n")
    return 1 if failed else 0


class _Bars:
    """How far the sweep and each run of it are: bars on a terminal, a line a finished run elsewhere."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.done, self.began = progress, runs, 0, time.perf_counter()
        self.whole = progress.add_task("sweep", total=runs)
        self.tasks: dict[str, Any] = {}

    def show(self, running: Sequence[Run]) -> None:
        """Show the steps of the runs that are being trained."""
        for run in running if not self.progress.disable else ():
            if run.name not in self.tasks:
                self.tasks[run.name] = self.progress.add_task(run.name, total=None)
            step, total = _steps(run.log)
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
def _bars(runs: int) -> Iterator[_Bars]:
    """Show progress for as long as a sweep takes."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        yield _Bars(progress, runs)


def _is_trained(folder: Path) -> bool:
    """Return whether a run's last checkpoint is that of its last optimiser step."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return False
    found = read_checkpoint(last)
    return bool(found["global_step"] >= found[RECORD]["config"]["trainer"]["max_steps"])


def _steps(log: Path) -> tuple[int, int | None]:
    """Return the optimiser step that a log has reached, and the last one."""
    if not log.is_file():
        return 0, None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = _STEP.findall(file.read().decode(errors="replace"))
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, None)


def _last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
