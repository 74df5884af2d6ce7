"""`pgp sweep`: train a configuration with one thing changed at a time, score every guide, and tabulate.

A sweep is a folder of overlays with a `sweep.yaml`, which says over which configuration they go and which make a row.
Every seed of a row is a run of its own in `<output>/<row>/seed<n>`, trained by `lightning fit` in a process of its own,
exported beside its checkpoints and scored like the methods of `pgp compare`, on the same questions as all others. What
is finished is not done again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from pgp_lightning.data.module import InstructionData
from pgp_lightning.embedded.object_map import ObjectMap
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.divergence import guide_figures
from pgp_lightning.evaluation.resume import finished_rows, read_json
from pgp_lightning.evaluation.sweep_progress import sweep_bars
from pgp_lightning.evaluation.sweep_report import write_tables
from pgp_lightning.evaluation.sweep_run import Run, Trainings, file_lock, is_trained, learning_curve
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion
from pgp_lightning.prefill import Pruner
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.training.command_line import quieten, reason_of, terse
from pgp_lightning.training.export import export_guide
from pgp_lightning.training.run import checkpoints
from pgp_lightning.vlm.request import Request

__all__ = ["Sweep", "SweepRow", "sweep"]

ANSWERS = "answers"  # folder of what the answer model said, in the sweep's
OTHER = "_another_question"


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
        self.figures_images, self.keep_ratios = figures_images, benchmark.keep_ratios
        self.controls = dict(benchmark.pruners)
        if not rows or figures_images < 1:
            raise ConfigError(f"expected rows and at least one of figures_images, got {len(rows)} and {figures_images}")
        for name, row in rows.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == ANSWERS:
                raise ConfigError(f"a row's name is of letters, digits, _, . and -, and not {ANSWERS!r}, got {name!r}")
            if not row.seeds or len(set(row.seeds)) < len(row.seeds) or min(row.seeds) < 0:
                raise ConfigError(f"row {name}: expected different seeds of at least 0, got {list(row.seeds)}")
            if (reference := self.reference_of(name)) not in rows:
                raise ConfigError(f"row {name}: its reference {reference!r} is no row")
            if lacking := set(row.seeds) - set(rows[reference].seeds):
                raise ConfigError(f"row {name}: its reference {reference!r} has no run of seeds {sorted(lacking)}")
            for method in self._methods_of(name):
                if method in self.controls:
                    raise ConfigError(f"row {name}: a control is called {method!r}, like one of its runs")
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

    def _methods_of(self, row: str) -> list[str]:
        """Return the names under which a row's guides are asked."""
        own = [f"{row}_seed{seed}" for seed in self.rows[row].seeds]
        return own + [f"{name}{OTHER}" for name in own if self.rows[row].another_question]

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
        found = checkpoints(run.folder)
        if not found:
            return words
        # A kill may have come between a checkpoint and last.ckpt.
        last = any(path.name == "last.ckpt" for path in found)
        return [*words, "--ckpt_path", "last" if last else str(found[-1])]

    def _train(self, run: Run, trainings: Trainings) -> None:
        """Train a run, unless it is trained.

        Raises:
            ConfigError: if that fails, or the run was begun with other configurations.
        """
        run.check_sources(self._configs(run.row))
        if not run.guide.exists() and not is_trained(run.folder):
            trainings(run, self.command(run))

    def _score(self, run: Run, controls: Mapping[str, Pruner]) -> None:
        """Export a run's guide, ask the answer model what it makes of the tokens it keeps, and look into it.

        Not for several threads: transformers loads models with switches that belong to the process.

        Args:
            run: is trained.
            controls: to be asked beside it.

        Raises:
            ConfigError: if there is no guide, or the folder holds answers of another guide of that name.
            DataError: if too many records cannot be used.
        """
        if not run.guide.exists():
            export_guide(run.folder, run.guide)
        answers = self.output / ANSWERS
        finished = set(finished_rows(answers)[0]) if answers.is_dir() else set()
        other = [f"{run.name}{OTHER}"] if self.rows[run.row].another_question else []
        asked = {f"{name}@{100 * ratio:g}" for name in (run.name, *other, *controls) for ratio in self.keep_ratios}
        if asked <= finished and self._looked_into(run):
            return
        guide = PosteriorGuide.from_pretrained(str(run.guide))
        methods: dict[str, Pruner] = {run.name: Guided(guide)}
        methods |= {name: Guided(AnotherQuestion(guide)) for name in other}
        self.benchmark.pruners = {**controls, **methods}
        self.benchmark.run(answers)
        self._look_into(run, guide)

    def _measured_on(self) -> dict[str, Any]:
        """Return what the figures of guides are measured on."""
        scored = self.benchmark
        return {"manifest": scored.manifest, "split": scored.split, "images": self.figures_images}

    def _looked_into(self, run: Run) -> bool:
        return bool(run.figures.is_file() and read_json(run.figures).get("measured_on") == self._measured_on())

    def _look_into(self, run: Run, guide: PosteriorGuide) -> None:
        """Write what a run's guide does and how it learned that, unless that is written."""
        if self._looked_into(run):
            return
        scored, base = self.benchmark, guide.arguments["base"]
        data = InstructionData(
            scored.manifest, base, val_batch_size=8, turns="all", root=scored.root, max_tiles=scored.data.max_tiles
        )
        found = guide_figures(guide, data.sample(scored.split, self.figures_images), self._objects())
        written = {"measured_on": self._measured_on(), **found, **learning_curve(run.folder)}
        part = run.figures.with_suffix(".part")
        part.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
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
        controls = {} if rows else self.controls
        self.output.mkdir(parents=True, exist_ok=True)
        trainings = Trainings(max(1, _cores() // jobs))
        with _waiting_threads(jobs, trainings) as pool, sweep_bars(len(runs)) as bars:
            waiting = {pool.submit(self._train, run, trainings): run for run in runs}
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                bars.show([run for future, run in waiting.items() if future.running()])
                for future in sorted(done, key=lambda one: runs.index(waiting[one])):
                    run, how = waiting.pop(future), "finished"
                    try:
                        future.result()
                        with file_lock(self.output / ".lock", wait=True):  # of two sweeps one scores at a time
                            self._score(run, controls)
                            self.tabulate()
                    except (ConfigError, DataError) as error:
                        how = "failed"
                        failed.append(f"{run.name} failed: {' '.join(str(error).split())}")
                    bars.finish(run, how)
        return failed

    def tabulate(self) -> None:
        """Write the tables and plots of all finished runs."""
        finished = [run for run in self.runs() if run.figures.is_file()]
        if finished:
            write_tables(self.output, self.output / ANSWERS, finished, self.reference_of, list(self.controls))


def sweep(folder: Path, output: Path | None, rows: Sequence[str], seeds: Sequence[int], jobs: int) -> int:
    """Run the command and return its exit code: 1 if a run failed, 130 if it was interrupted.

    Raises:
        ConfigError: if the sweep cannot work.
    """
    quieten()
    planned = Sweep.load(folder, output)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = planned(rows, seeds, jobs)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    table = planned.output / "sweep.md"
    if table.is_file():
        sys.stdout.write(table.read_text(encoding="utf-8") + f"\ntables and plots: {planned.output}\n")
    for line in failed:
        sys.stderr.write(f"error: {line}\n")
    return 1 if failed else 0


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _waiting_threads(jobs: int, trainings: Trainings) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that wait for training processes; these end when the sweep is interrupted."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trainings.stop()
            raise
