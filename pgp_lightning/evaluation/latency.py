"""Measured seconds and peak memory of answering with a pruned prompt, by phase and by batch size.

    python -m pgp_lightning.evaluation.latency --sizes 1 2 4 8     # questions of the embedded world, full and pruned

A device that works asynchronously is waited for at every border between phases, so they add up, and many short decode
steps take a little more on CUDA than unwatched. How fast something is takes repeats, not a single run: `measure` and
`take_turns` give their spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.family import VLM, check_pair
from pgp_lightning.vlm.inputs import generate, prompt_inputs
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles

__all__ = [
    "Load",
    "PhaseTimes",
    "Timing",
    "measure",
    "median_times",
    "peak_memory",
    "phase_times",
    "sweep",
    "table",
    "take_turns",
]

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise runs."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def __str__(self) -> str:
        return f"{self.median:.4g} s ({self.low:.4g} to {self.high:.4g})"


@dataclass
class PhaseTimes:
    """Seconds of one run, by phase; what no phase takes (projector, embeddings, head, choosing tokens) is in the total.

    Attributes:
        guide: everything before the answer model is called: the guide, and what a pruner prepares besides.
        vision: the answer model's vision tower.
        prefill: its decoder on the prompt, pruning included.
        decode: its decoder on each further token.
        total: from the beginning to the last token.
        peak: most bytes the CUDA allocator had given out; None on a CPU, where resident memory would tell what the C
            allocator keeps rather than what the run needs (`vlm/memory.py` estimates it).
    """

    guide: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)
    total: float = 0.0
    peak: int | None = None


@dataclass(frozen=True)
class Load:
    """A step at one batch size.

    Attributes:
        rows: batch size.
        seconds: of the whole batch.
        peak: bytes, see `peak_memory`.
    """

    rows: int
    seconds: Timing
    peak: int | None

    @property
    def throughput(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds.median


def measure(step: Step, repeats: int = 5, warmup: int = 1, device: torch.device | str = "cpu") -> Timing:
    """Time a step on a device.

    Args:
        step: what to time.
        repeats: timed runs.
        warmup: runs before them.
        device: is waited for before and after every run.
    """
    return Timing.of(take_turns({"step": step}, repeats, warmup, device)["step"])


def take_turns(
    steps: Mapping[str, Step], repeats: int = 5, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time several steps in turns, so that what else the machine does meets them alike: seconds of each run by name."""
    device = torch.device(device)
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = _now(device)
            step()
            seconds[name].append(_now(device) - start)
    return seconds


def peak_memory(step: Step, device: torch.device | str = "cpu") -> int | None:
    """Run a step and return the most bytes that the CUDA allocator had given out; None on a CPU, see `PhaseTimes`."""
    device = torch.device(device)
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def sweep(
    build: Callable[[int], Step],
    sizes: Iterable[int],
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> list[Load]:
    """Measure a step at several batch sizes: fewer tokens need not mean more requests a second.

    Args:
        build: makes the step for a number of rows.
        sizes: numbers of rows.
        repeats: timed runs of each.
        warmup: runs before them.
        device: where the step runs.
    """
    found = []
    for rows in sizes:
        step = build(rows)
        seconds = measure(step, repeats, warmup, device)
        found.append(Load(rows, seconds, peak_memory(step, device)))
    return found


def table(full: Sequence[Load], short: Sequence[Load]) -> str:
    """Return loads of the same batch sizes as a Markdown table, the full model beside the pruned one."""
    memory = full[0].peak is not None
    names = ["s", "rows/s", *["peak, GiB"] * memory]
    head = ["rows", *[f"{which}, {name}" for which in ("full", "pruned") for name in names], "speed-up"]

    def cells(load: Load) -> list[str]:
        peak = [] if load.peak is None else [f"{load.peak / 2**30:.2f}"]
        return [str(load.seconds), f"{load.throughput:.4g}", *peak]

    lines = [head, ["---"] * len(head)]
    for whole, cut in zip(full, short, strict=True):
        faster = whole.seconds.median / cut.seconds.median
        lines.append([str(whole.rows), *cells(whole), *cells(cut), f"{faster:.2f}x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def phase_times(
    vlm: VLM, inputs: dict[str, Any], pruner: Pruner, request: Request | None = None, new_tokens: int = 16
) -> PhaseTimes:
    """Answer once with a pruned prompt and time the phases; there may be fewer tokens if all rows stop before.

    Args:
        vlm: the answer model.
        inputs: of `prompt_inputs`; prefer fresh ones, whose tower runs.
        pruner: `KeepAll` for the full model.
        request: the same questions, for pruners that ask a guide.
        new_tokens: most tokens of an answer.
    """
    found, device = PhaseTimes(), torch.device(vlm.model.device)

    def answer() -> None:
        start = _now(device)
        with pruned(vlm, pruner, inputs, request):
            # The model's parts are watched only now: a guide may be the same model.
            found.guide = _now(device) - start
            with _watching(vlm, found, device):
                generate(vlm, inputs, new_tokens)
        found.total = _now(device) - start

    found.peak = peak_memory(answer, device)
    return found


def median_times(runs: Sequence[PhaseTimes]) -> dict[str, float]:
    """Return the medians of runs by phase, in milliseconds, under names that say so; on CUDA the greatest peak too."""

    def ms(values: Sequence[float]) -> float:
        return 1000 * statistics.median(values) if values else 0.0

    found = {f"{name}, ms": ms([getattr(run, name) for run in runs]) for name in ("guide", "vision", "prefill")}
    found["a decoded token, ms"] = ms([seconds for run in runs for seconds in run.decode])
    found["total, ms"] = ms([run.total for run in runs])
    peaks = [run.peak for run in runs if run.peak is not None]
    return {**found, "peak, GiB": max(peaks) / 2**30} if peaks else found


@contextmanager
def _watching(vlm: VLM, found: PhaseTimes, device: torch.device) -> Iterator[None]:
    """While open, add up what the vision tower and the decoder take."""
    prefilled = False

    def vision(seconds: float) -> None:
        found.vision += seconds

    def decoder(seconds: float) -> None:
        nonlocal prefilled
        if prefilled:
            found.decode.append(seconds)
        else:
            found.prefill, prefilled = seconds, True

    hooks: list[Any] = []

    def watch(module: nn.Module, add: Callable[[float], None]) -> None:
        start = 0.0

        def before(module: nn.Module, inputs: object) -> None:
            nonlocal start
            start = _now(device)

        def after(module: nn.Module, inputs: object, output: object) -> None:
            add(_now(device) - start)

        # First before and last after: what a pruner attaches to these modules is part of their time.
        hooks.append(module.register_forward_pre_hook(before, prepend=True))
        hooks.append(module.register_forward_hook(after))

    watch(vlm.vision_tower, vision)
    watch(vlm.decoder, decoder)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    """Return the time when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _scenes(vlm: VLM, rows: int) -> Request:
    """Return questions about so many pictures of the embedded world, on the model's device."""
    scenes = [draw_scene("test", index) for index in range(rows)]
    tiles, grids = zip(*(cut_tiles(Image.fromarray(scene.image), vlm.processor.rule) for scene in scenes), strict=True)
    questions = [scene.questions[0].text for scene in scenes]
    return Request(questions, torch.from_numpy(np.concatenate(tiles)), list(grids)).to(vlm.model.device)


def main() -> None:
    """Print how many questions a second a model answers, full and pruned; the guide's time is part of the pruned."""
    parser = argparse.ArgumentParser(description="Seconds per batch of questions, with all visual tokens and with few.")
    parser.add_argument("--answer-model", default="embedded:answer_model")
    parser.add_argument("--guide", default="embedded:pgp_seed0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="questions in a batch")
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if min(*given.sizes, given.new_tokens, given.repeats, 1) < 1:
        parser.error("--sizes, --new-tokens and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guide, vlm = PosteriorGuide.from_pretrained(given.guide), load_vlm(given.answer_model)
    check_pair(guide.vlm.processor, vlm.processor)
    guide.eval().to(device)
    vlm.model.eval().to(device)

    def load(pruner: Pruner) -> list[Load]:
        def build(rows: int) -> Step:
            request = _scenes(vlm, rows)
            inputs = prompt_inputs(vlm, request)

            def answer() -> None:
                with pruned(vlm, pruner, inputs, request):
                    generate(vlm, inputs, given.new_tokens)

            return answer

        return sweep(build, given.sizes, given.repeats, device=device)

    print(table(load(KeepAll()), load(Guided(guide, given.layer, given.keep_ratio))))


if __name__ == "__main__":
    main()
