"""The loop behind every stage of the embedded pair's training: AdamW, cosine schedule, progress, restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

__all__ = ["run_stage", "step_rng"]

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """Return the generator of one step, so that a restarted stage draws what an undisturbed one draws."""
    return np.random.default_rng([seed, step, *stage.encode()])


def run_stage(
    name: str,
    folder: Path,
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    warmup: int = 100,
    save_every: int = 200,
    log_every: int = 50,
    report: Callable[[int], str] | None = None,
    report_every: int = 500,
) -> bool:
    """Train a module for some steps and keep its state in `folder/name.pt`; a finished stage is only loaded.

    Args:
        name: the stage; its checkpoint's and log's file name.
        folder: where both lie.
        module: what is trained (parameters that require gradients).
        loss: the loss of a step and figures to log; it draws from `step_rng` alone.
        steps: length of the stage.
        learning_rate: peak of the warm-up and cosine schedule.
        seed: seeds torch's generator at every step.
        warmup: steps of linear warm-up.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        report: a longer line to log now and then.
        report_every: steps between reports.

    Returns:
        Whether anything was left to train.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.03)
    path, first = folder / f"{name}.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    mean: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (folder / f"{name}.log").open("a") as log:
        task = progress.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * (0.97 * cosine + 0.03)
            value, figures = loss(step)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss of stage {name} is {value.item()} at step {step}")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for key, figure in figures.items():
                mean[key] = figure if key not in mean else 0.95 * mean[key] + 0.05 * figure
            done = step + 1
            progress.update(task, completed=done)
            lines = []
            if done % log_every == 0 or done == steps:
                lines.append(f"{done} " + " ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            if report and (done % report_every == 0 or done == steps):
                lines.append(f"{done} {report(done)}")
            for line in lines:
                progress.console.print(f"{name}: {line}", highlight=False)
                log.write(line + "\n")
                log.flush()
            if done % save_every == 0 or done == steps:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
    return first < steps
