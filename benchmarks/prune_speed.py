"""Measure how much faster a language model's prefill gets by dropping visual tokens, against what FLOPs predict.

    python benchmarks/prune_speed.py --threads 1 --json speed.json
    python benchmarks/prune_speed.py --device cuda --dtype bfloat16 --shape 8b 26b

README.md in this folder says what is compared, how, and what came out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from two_pass_step import matmul_peak

from pgp_lightning.evaluation.cost import Schedule
from pgp_lightning.evaluation.flops import Decoder, head_flops, prefill_flops
from pgp_lightning.evaluation.latency import peak_memory, take_turns
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.selection import keep_count
from pgp_lightning.vlm.memory import geometry, tokens_per_tile
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid

SHAPES = {"tiny": "InternVL2_5-1B", "1b": "InternVL2_5-1B", "2b": "InternVL2_5-2B", "8b": "InternVL2_5-8B",
          "26b": "InternVL2_5-26B"}  # fmt: skip
BUDGETS = ((0.05, 0), (0.05, 2), (0.2, 9))
SLOWEST = 1.15  # times the ratio that FLOPs predict
DEAREST = 0.02  # share of a prefill that our hooks may take


class Fixed(Guide):
    """Gives every row the same random importance at no cost: what is measured is pruning, not a guide."""

    def __init__(self, visual: int, device: torch.device) -> None:
        super().__init__()
        self.importance = torch.rand(visual, generator=torch.Generator().manual_seed(0)).to(device)

    def forward(self, request: Request) -> Tensor:
        """Return the importance (B, M)."""
        return self.importance.expand(len(request), -1)


@dataclass
class Case:
    """One way of running the prefill.

    Attributes:
        flops: by the closed forms, of all rows.
        prompt: (B, N, d).
        pruner: what prunes it; None for the model without our package.
        seconds: of every timed run.
        processor: processor seconds of the same, of all threads.
        hooks: shares of runs that were spent in our hooks.
        around: shares spent entering and leaving `pruned`.
        peak: bytes of the CUDA allocator.
    """

    flops: int
    prompt: Tensor
    pruner: Pruner | None = None
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)
    around: list[float] = field(default_factory=list)
    peak: int | None = None


def build(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> InternVLForConditionalGeneration:
    """Build a model with random weights and a stub of a vision tower, which is not run."""
    config: Any = geometry(SHAPES[shape])
    vision, text = config.vision_config, config.text_config
    vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size = 1, 64, 2, 64
    if shape == "tiny":
        text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64, 4, 2
        text.intermediate_size, text.num_hidden_layers, text.vocab_size = 128, 12, 200
        config.image_token_id = 100
        vision.image_size, config.image_seq_length = [112, 112], 16
    if layers is not None:
        text.num_hidden_layers = layers
    if hasattr(text, "layer_types"):
        text.layer_types = ["full_attention"] * text.num_hidden_layers
    torch.manual_seed(0)
    with device:
        model = InternVLForConditionalGeneration._from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="sdpa", dtype=dtype
        )
    return cast(InternVLForConditionalGeneration, model.eval())


class Bench:
    """Runs prefills of one model on one prompt of random embeddings.

    Args:
        model: the answer model.
        tiles: of every image.
        text: slots of text, two thirds of them before the image.
        batch: rows.
        rows_too: also prune by FastV, whose hooks recompute a row of attention.
    """

    def __init__(
        self, model: InternVLForConditionalGeneration, tiles: int, text: int, batch: int, rows_too: bool
    ) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self.device = torch.device(model.device)
        config: Any = model.config
        side = round(tokens_per_tile(config) ** 0.5)
        grid = TileGrid(max(1, tiles - 1), 1, side, thumbnail=tiles > 1)
        self.visual_tokens, self.text = grid.tokens, text
        size = config.vision_config.image_size[0]
        pixels = torch.zeros(tiles, 3, size, size, dtype=torch.uint8, device=self.device)
        self.request = Request(["which"] * batch, pixels, [grid], [0] * batch)
        slots, start = grid.tokens + text, text * 2 // 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            prompt = torch.randn(batch, slots, config.text_config.hidden_size)
        self.prompt = prompt.to(self.device, model.dtype)
        self.visual = torch.zeros(batch, slots, dtype=torch.bool, device=self.device)
        self.visual[:, start : start + grid.tokens] = True
        self.cases = self._cases(rows_too)

    def _cases(self, rows_too: bool) -> dict[str, Case]:
        decoder, guide = Decoder(self.config), Fixed(self.visual_tokens, self.device)
        whole = self.visual_tokens
        cases = {"full": Case(self._flops([whole] * decoder.depth), self.prompt)}
        for ratio, wanted in BUDGETS:
            kept, layer = keep_count(whole, ratio), min(wanted, decoder.depth - 1)
            flops = self._flops(Schedule.cut(decoder.depth, whole, kept, layer).layers)
            name = f"{100 * ratio:.3g} %, L = {layer}"
            cases[name] = Case(flops, self.prompt, Guided(guide, layer, ratio))
            if layer == 0:
                # What was never longer: the same number of slots without our package.
                short = self.prompt[:, : kept + self.text].contiguous()
                cases[f"{100 * ratio:.3g} %, short prompt"] = Case(flops, short)
            elif rows_too:
                row = self.batch * decoder.rows(1, whole + self.text, project=True)
                cases[f"FastV {name}"] = Case(flops + row, self.prompt, FastV(layer, ratio))
        return cases

    def _flops(self, visual: list[int] | tuple[int, ...]) -> int:
        slots = [count + self.text for count in visual]
        return self.batch * (prefill_flops(self.config, slots) + head_flops(self.config))

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> object:
        """Run decoder and head on a prompt (B, N, d), filling a fresh cache; logits of the last slot only."""
        return self.model(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64, device=self.device),
            use_cache=True,
            logits_to_keep=1,
        )

    def run(self, case: Case) -> object:
        """Run a case: entering and leaving `pruned` is part of it."""
        if case.pruner is None:
            return self.prefill(case.prompt)
        with pruned(self.model, case.pruner, {"inputs_embeds": case.prompt}, self.request, self.visual):
            return self.prefill(case.prompt)

    def watch(self, case: Case) -> None:
        """Run a case once and note which share of it was spent in our hooks, and around them."""
        if case.pruner is None:
            return
        start = self._now()
        with pruned(self.model, case.pruner, {"inputs_embeds": case.prompt}, self.request, self.visual):
            entered = self._now()
            with self._hooks_timed() as inside:
                self.prefill(case.prompt)
            left = self._now()
        end = self._now()
        case.hooks.append(sum(inside) / (end - start))
        case.around.append((entered - start + end - left) / (end - start))

    @contextmanager
    def _hooks_timed(self) -> Iterator[list[float]]:
        """While open, list the seconds between the first and the last hook of every decoder layer and its attention.

        Open it inside `pruned`: its own hooks go around those that are there.
        """
        spent: list[float] = []
        starts: list[float] = []

        def begin(*given: object) -> None:
            starts.append(self._now())

        def stop(*given: object) -> None:
            spent.append(self._now() - starts.pop())

        handles = []
        layers: Any = self.model.model.language_model.layers
        for module in (part for layer in layers for part in (layer, layer.self_attn)):
            handles += [
                module.register_forward_pre_hook(begin, prepend=True),
                module.register_forward_pre_hook(stop),
                module.register_forward_hook(begin, prepend=True),
                module.register_forward_hook(stop),
            ]
        try:
            yield spent
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def measure(self, repeats: int) -> None:
        """Warm up, time all cases in turns, then look at the hooks in runs of their own."""

        def timed(case: Case) -> Callable[[], object]:
            def step() -> None:
                start = time.process_time()
                self.run(case)
                case.processor.append(time.process_time() - start)

            return step

        # Kernels and weights get warm on the shortest prompt; CUDA chooses kernels by shape, and is quick.
        cuda = self.device.type == "cuda"
        for case in self.cases.values() if cuda else [min(self.cases.values(), key=lambda case: case.flops)]:
            self.run(case)
        steps = {name: timed(case) for name, case in self.cases.items()}
        for name, seconds in take_turns(steps, repeats, warmup=0, device=self.device).items():
            case = self.cases[name]
            case.seconds = seconds
            case.peak = peak_memory(partial(self.run, case), self.device) if cuda else None
            for _ in range((repeats + 1) // 2):
                self.watch(case)

    def results(self) -> dict[str, dict[str, Any]]:
        """Return what was found, by case: ratios are to the full model."""
        full, found = self.cases["full"], {}
        for name, case in self.cases.items():
            turns = [mine / whole for mine, whole in zip(case.seconds, full.seconds, strict=True)]
            ratio, predicted = statistics.median(turns), case.flops / full.flops
            found[name] = {
                "flops": case.flops,
                "predicted": predicted,
                "seconds": statistics.median(case.seconds),
                "seconds_range": [min(case.seconds), max(case.seconds)],
                "ratio": ratio,
                "ratio_range": [min(turns), max(turns)],
                "ratio_to_predicted": ratio / predicted,
                "processor_seconds": statistics.median(case.processor),
                "processor_ratio": statistics.median(case.processor) / statistics.median(full.processor),
                "hooks": statistics.median(case.hooks) if case.hooks else None,
                "around": statistics.median(case.around) if case.around else None,
                "peak_bytes": case.peak,
            }
        return found


def show(found: dict[str, dict[str, Any]], peak: float | None) -> None:
    """Print results as a table."""
    head = ("run", "seconds", "share of peak", "time / full (turns)", "FLOPs / full", "time to FLOPs",
            "processor time / full", "in hooks", "around", "CUDA peak")  # fmt: skip
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for name, one in found.items():
        low, high = one["ratio_range"]
        of_peak = "" if peak is None else f"{100 * one['flops'] / one['seconds'] / peak:.0f} %"
        shares = ["" if one[key] is None else f"{100 * one[key]:.2f} %" for key in ("hooks", "around")]
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.2f} GiB"
        print(
            f"| {name} | {one['seconds']:.4g} | {of_peak} | {one['ratio']:.4f} ({low:.4f} to {high:.4f}) "
            f"| {one['predicted']:.4f} | {one['ratio_to_predicted']:.3f} | {one['processor_ratio']:.4f} "
            f"| {' | '.join(shares)} | {memory} |"
        )
    held = [one for one in found.values() if one["hooks"] is not None]
    worst, dearest = max(one["ratio_to_predicted"] for one in held), max(one["hooks"] for one in held)
    processor = max(one["processor_ratio"] / one["predicted"] for one in held)
    print(
        f"time to FLOPs: at most {worst:.3f}, of the processor {processor:.3f} (wanted {SLOWEST}); "
        f"in hooks: at most {100 * dearest:.2f} % (wanted {100 * DEAREST:g} %)"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["2b"])
    parser.add_argument("--layers", type=int, help="decoder layers; by default the shape's own")
    parser.add_argument("--tiles", type=int, default=5, help="tiles of every image, thumbnail included")
    parser.add_argument("--text", type=int, default=60, help="prompt slots of text")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--rows", action="store_true", help="also FastV, whose hooks recompute a row of attention")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {given.threads} threads"
    )
    results = []
    for shape in given.shape:
        model = build(shape, given.layers, dtype, device)
        bench = Bench(model, given.tiles, given.text, given.batch, given.rows)
        depth = Decoder(model.config).depth
        print(f"\n{shape}, {depth} layers, {given.batch} x ({bench.visual_tokens} visual + {given.text} text) slots, "
              f"{given.dtype}, {machine}, torch {torch.__version__}", flush=True)  # fmt: skip
        bench.measure(given.repeats)
        peak = None if shape == "tiny" else matmul_peak(dtype, device)  # too small to be bound by products
        found = bench.results()
        show(found, peak)
        results.append({"shape": shape, "layers": depth, "tiles": given.tiles, "text": given.text,
                        "batch": given.batch, "dtype": given.dtype, "machine": machine, "torch": torch.__version__,
                        "matmul_peak": peak, "cases": found})  # fmt: skip
        if given.json:
            given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        del bench, model


if __name__ == "__main__":
    main()
