"""One run of a sweep: its files, the process that trains it, and what its events say about how it learned."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import yaml
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from pgp_lightning.errors import ConfigError
from pgp_lightning.training.run import RECORD, checkpoints, read_checkpoint

__all__ = ["Run", "Trainings", "file_lock", "is_trained", "learning_curve", "steps_done"]

CURVE = "val/recall@5"
NEARLY = 0.9  # of the last value: a run has learned most of it there
_STEP = re.compile(r"\bstep (\d+)/(\d+)")


class Run(NamedTuple):
    """One seed of a row, and its folder."""

    row: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What its answers are called."""
        return f"{self.row}_seed{self.seed}"

    @property
    def guide(self) -> Path:
        """The exported guide."""
        return self.folder / "guide"

    @property
    def figures(self) -> Path:
        """What was found out about the guide; there when the run is scored."""
        return self.folder / "figures.json"

    @property
    def log(self) -> Path:
        """The output of the training process."""
        return self.folder / "fit.log"

    @property
    def sources(self) -> Path:
        """Hashes of the configurations that it was begun with."""
        return self.folder / "sweep_row.json"

    def check_sources(self, configs: Sequence[Path]) -> None:
        """Note the configurations of a run that begins, and refuse one that was begun with others.

        Raises:
            ConfigError: if a file has another content now, or others are named.
        """
        now = {str(path): _content(path) for path in configs}
        before = json.loads(self.sources.read_text(encoding="utf-8")) if self.sources.is_file() else now
        if changed := sorted(path for path in now.keys() | before.keys() if now.get(path) != before.get(path)):
            raise ConfigError(
                f"{self.folder} was trained before {', '.join(changed)} changed: remove it, its answers "
                f"({self.name}@*.jsonl) and those about another question, or give another --output"
            )
        if not self.sources.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sources.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _content(config: Path) -> str:
    """Return a hash of what a configuration says, comments apart."""
    said = yaml.safe_load(config.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def file_lock(path: Path, wait: bool) -> Iterator[TextIO]:
    """Hold a file's lock and yield the file, open at its end.

    A process that is started meanwhile with the file as its output holds the lock as well.

    Raises:
        BlockingIOError: if another process has it and this one must not wait.
    """
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


class Trainings:
    """Training processes of a sweep, each waited for by a thread.

    Args:
        threads: of each process; processes side by side that each take all cores would wait for one another.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __call__(self, run: Run, arguments: Sequence[str]) -> None:
        """Run `lightning` with some arguments, and wait until it ends.

        Raises:
            ConfigError: if it fails, stops before its last step, or is running already.
        """
        with ExitStack() as stack:
            try:
                # The child keeps the lock for as long as it lives, also when this process is killed.
                log = stack.enter_context(file_lock(run.log, wait=False))
            except BlockingIOError as error:
                raise ConfigError(f"another process is training in {run.folder}") from error
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    [sys.executable, "-m", "pgp_lightning", *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": str(self.threads), **os.environ},
                )
                self._running.add(process)
            code = process.wait()
        if code:
            raise ConfigError(f"exit code {code}: {_last_line(run.log)} ({run.log})")
        if not is_trained(run.folder):
            raise ConfigError(
                f"the last checkpoint in {run.folder} is not of the last step: let StepCheckpoint have save_last, and "
                "every_n_train_steps divide trainer.max_steps"
            )

    def stop(self) -> None:
        """End all processes, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def is_trained(folder: Path) -> bool:
    """Return whether a run's last checkpoint is that of its last optimiser step."""
    last = folder / "checkpoints" / "last.ckpt"
    if last not in checkpoints(folder):
        return False
    found = read_checkpoint(last)
    steps = ((found.get(RECORD) or {}).get("config") or {}).get("trainer", {}).get("max_steps") or 0
    return bool(0 < steps <= found.get("global_step", 0))


def steps_done(log: Path) -> tuple[int, int | None]:
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


def learning_curve(folder: Path) -> dict[str, Any]:
    """Read a run's events: its validation curve, how soon it was nearly there, and beta at both ends.

    Returns:
        `curve`, pairs of optimiser steps and recall at 5 %, empty where validation knows no relevant tokens;
        `steps_to_90`, the first of these steps at which recall is 90 % of the last value, or None; `beta`, its first
        and last logged value, or None.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    # Lightning numbers the n-th optimiser step n - 1.
    curve = [(scalar.step + 1, scalar.value) for scalar in (events.Scalars(CURVE) if CURVE in tags else ())]
    betas = [scalar.value for scalar in events.Scalars("train/beta")] if "train/beta" in tags else []
    return {
        "curve": curve,
        "steps_to_90": next((step for step, value in curve if value >= NEARLY * curve[-1][1]), None),
        "beta": [betas[0], betas[-1]] if betas else None,
    }
