"""Measure one training step of the posterior guide against two plain implementations of the same step.

    python benchmarks/two_pass_step.py --size embedded 1b --tiles 1 5 --json step.json

README.md in this folder says what is compared, how, and what came out.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from step_flops import LiveBytes, count_flops
from step_report import Measured, agrees, print_costs, print_counts, ratios
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn import functional
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

from pgp_lightning.embedded.pair import build_model, build_processor
from pgp_lightning.evaluation.training_flops import Shape, training_flops
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.objective import divergence_loss, objective, reconstruction_loss
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.processor import ChatTemplate
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.slots import lay_out
from pgp_lightning.vlm.tiles import TileGrid, TileRule

BETA = 0.5
RANK = 32
# Words of the system prompt, the question and the answer: of InternVL2.5's system prompt and a short visual
# instruction, and of a question of the embedded world.
WORDS = {"1b": (40, 24, 16), "embedded": (0, 8, 2)}
VARIANTS = {
    "ours": "tower once, pass 1 cut at the last visual slot, logits at the supervised slots",
    "a": "tower once, whole rows and all their logits in both passes",
    "b": "as a, and the tower runs in both passes",
    "checkpointed": "ours with gradient checkpointing",
}


@dataclass
class Sample:
    """A batch of one question about one image of random pixels."""

    request: Request
    answers: list[str]
    noise: Tensor


def build_model_of(size: str, dtype: torch.dtype) -> InternVLForConditionalGeneration:
    """Build a model with random weights: of the embedded guide's size, or of InternVL2.5-1B's."""
    torch.manual_seed(0)
    model: nn.Module = (
        build_model("guide", seed=0)
        if size == "embedded"
        else InternVLForConditionalGeneration._from_config(  # type: ignore[no-untyped-call]
            internvl2_5_1b(), attn_implementation="sdpa", dtype=dtype
        )
    )
    return cast(InternVLForConditionalGeneration, model.to(dtype))


def build_guide(
    model: InternVLForConditionalGeneration, size: str, lora_dropout: float = 0.05, gradient_checkpointing: bool = False
) -> PosteriorGuide:
    """Make a guide of a model, in training mode, with a tokenizer that gives every word one id."""
    processor = replace(build_processor("guide"), template=ChatTemplate(" ".join(["word"] * WORDS[size][0])))
    if size != "embedded":
        processor = replace(processor, rule=TileRule(), max_length=8192)
    vlm = InternVL(model, processor, f"{size}, random weights")
    guide = PosteriorGuide(
        vlm, lora_rank=RANK, lora_dropout=lora_dropout, gradient_checkpointing=gradient_checkpointing
    )
    return guide.train()


def internvl2_5_1b() -> InternVLConfig:
    """Return the geometry of InternVL2.5-1B: InternViT-300M, Qwen2.5-0.5B with 151,674 untied embeddings."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        attention_bias=True,
        image_size=(448, 448),
        patch_size=(14, 14),
    )
    text = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151674,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return InternVLConfig(vision_config=vision, text_config=text, image_seq_length=256, tie_word_embeddings=False)


def build_sample(guide: PosteriorGuide, size: str, tiles: int, device: torch.device) -> Sample:
    """Make a sample whose image has a number of tiles (the last is the thumbnail if there are several)."""
    rule, (_, question, answer) = guide.vlm.processor.rule, WORDS[size]
    grid = TileGrid(max(1, tiles - 1), 1, rule.tokens_per_side, thumbnail=tiles > 1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (tiles, 3, rule.tile_size, rule.tile_size), generator=generator, dtype=torch.uint8)
    noise = torch.randn(1, grid.tokens, guide.vlm.width, generator=generator)
    request = Request([" ".join(["word"] * question)], pixels, [grid]).to(device)
    return Sample(request, [" ".join(["word"] * answer)], noise.to(device))


def ours(guide: PosteriorGuide, sample: Sample) -> Tensor:
    """Return the loss of the step as training takes it."""
    found = guide.bottleneck_pass(sample.request, guide.visual_tokens(sample.request))
    latents = guide.bottleneck.sample(found.posterior, sample.noise)
    predicted = guide.reconstruction_pass(sample.request, sample.answers, latents)
    return objective(reconstruction_loss(*predicted), divergence_loss(found.divergence, found.mask), BETA)


def plain(guide: PosteriorGuide, sample: Sample, tower_twice: bool) -> Tensor:
    """Return the same loss from two calls of the whole model on the whole row.

    Each call takes the row that training collates, answer included, and returns logits at every slot, as transformers'
    models do unless told otherwise; the first call is made for its last hidden states.
    """
    model, request = guide.vlm.model, sample.request
    prompt = guide.vlm.processor.prompt(request.questions[0], sample.answers[0], "question_first")
    slots = lay_out([prompt], request.counts, request.tiles.device)

    def call(visual: Tensor) -> InternVLCausalLMOutputWithPast:
        embeddings = slots.place(model.get_input_embeddings()(slots.ids), visual)
        output: InternVLCausalLMOutputWithPast = model(
            inputs_embeds=embeddings,
            attention_mask=slots.mask,
            position_ids=slots.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        return output

    # The logits of the first call are dropped at once, which is kinder to the baseline's memory than keeping them.
    states = cast(tuple[Tensor, ...], call(guide.visual_tokens(request)).hidden_states)[-1]
    posterior = guide.bottleneck(slots.gather(states))
    latents = guide.bottleneck.sample(posterior, sample.noise)
    if tower_twice:
        guide.visual_tokens(request)
    logits = cast(Tensor, call(latents).logits)[0]
    targets = torch.full((len(logits),), -100, device=logits.device)
    targets[slots.sources] = slots.targets
    reconstruction = functional.cross_entropy(logits.float(), targets, ignore_index=-100)
    return objective(reconstruction, divergence_loss(guide.bottleneck.divergence(posterior), slots.visual_mask), BETA)


def shape_of(guide: PosteriorGuide, sample: Sample, variant: str) -> Shape:
    """Return the lengths that a variant's step has."""
    prompt = guide.vlm.processor.prompt(sample.request.questions[0], sample.answers[0], "question_first")
    tiles, visual = len(sample.request.tiles), sample.request.counts[0]
    cut = len(prompt.before) + visual
    # The answer's last token is predicted and not read.
    row = cut + len(prompt.after) + len(prompt.answer) - 1
    if variant in ("a", "b"):
        return Shape(tiles, 1 + (variant == "b"), visual, row, row, row, row)
    return Shape(tiles, 1, visual, cut, row, 0, len(prompt.answer), checkpointing=variant == "checkpointed")


class Bench:
    """Runs the variants of a step on one guide.

    Args:
        guide: in training mode, on its device.
        sample: on the same device.
    """

    def __init__(self, guide: PosteriorGuide, sample: Sample) -> None:
        self.guide, self.sample = guide, sample
        self.device = sample.noise.device
        self.dtype = guide.vlm.model.dtype

    def step(self, variant: str) -> Callable[[], Tensor]:
        """Return the forward half of a variant."""
        if variant in ("a", "b"):
            return lambda: plain(self.guide, self.sample, tower_twice=variant == "b")
        return lambda: ours(self.guide, self.sample)

    def prepare(self, variant: str) -> None:
        """Set checkpointing, and forget gradients: a step on fresh ones is what accumulation starts with."""
        decoder: Any = self.guide.vlm.decoder
        decoder.activation_checkpointing_disable()
        decoder.disable_input_require_grads()  # which enabling had switched on, and disabling leaves on
        if variant == "checkpointed":
            decoder.activation_checkpointing_enable({"use_reentrant": False})
        self.guide.zero_grad(set_to_none=True)

    def precision(self) -> AbstractContextManager[Any]:
        """Return autocast for half precision: the adapter's own weights stay float32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if half else nullcontext()

    def dry(self) -> Bench:
        """Return a bench whose weights have shapes and no data: its steps cost no time and no memory.

        The guide's own code runs, and every operation passes torch's counter and the tally as it would with data.
        """
        with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
            return Bench(copy.deepcopy(self.guide), self.sample)

    def look(self, variant: str) -> Measured:
        """Run a step that counts and tallies."""
        self.prepare(variant)
        cuda = self.device.type == "cuda"
        tally = nullcontext() if cuda else LiveBytes(self.guide)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
        with tally, self.precision():
            counted = count_flops(self.guide, RANK, self.step(variant))
        if isinstance(tally, LiveBytes):
            start, peak = tally.start, tally.peak
        else:
            peak = torch.cuda.max_memory_allocated()
        shape = shape_of(self.guide, self.sample, variant)
        return Measured(shape, training_flops(self.guide.vlm.model.config, RANK, shape), counted, peak, start)

    def time(self, variant: str) -> tuple[float, float]:
        """Time a step, forward and backward: seconds, and processor seconds of all threads."""
        self.prepare(variant)
        _wait(self.device)
        start, processor = time.perf_counter(), time.process_time()
        with self.precision():
            loss = self.step(variant)()
        loss.backward()
        _wait(self.device)
        return time.perf_counter() - start, time.process_time() - processor


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure FLOP/s of a large square product: the best of several."""
    side, runs = (8192, 20) if device.type == "cuda" else (4096, 4)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * side**3 / best)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(bench: Bench, repeats: int, timed: list[str]) -> dict[str, Measured]:
    """Look at every variant once, warm up with a step of ours, then time some in turns."""
    # Only the allocator of CUDA knows its peak; a tally needs no data.
    looking = bench if bench.device.type == "cuda" else bench.dry()
    found = {variant: looking.look(variant) for variant in VARIANTS}
    print_counts(found)
    bench.time("ours")
    for _ in range(repeats):
        for variant in timed:
            seconds, processor = bench.time(variant)
            found[variant].seconds.append(seconds)
            found[variant].processor_seconds.append(processor)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON.

    Raises:
        SystemExit: if a closed form disagrees with torch's counter.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(WORDS), default=["embedded", "1b"])
    parser.add_argument("--tiles", nargs="+", type=int, default=[1, 5], help="tiles of the image, thumbnail included")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--time", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="variants to time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {given.threads} threads"
    )
    for variant, words in VARIANTS.items():
        print(f"{variant:14}{words}")
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    for size in given.size:
        guide = build_guide(build_model_of(size, dtype), size).to(device)
        for tiles in given.tiles:
            print(f"\n{size}, tiles {tiles}, {given.dtype}, {machine}, torch {torch.__version__}")
            found = measure(Bench(guide, build_sample(guide, size, tiles, device)), given.repeats, given.time)
            peak = matmul_peak(dtype, device)
            print_costs(found, peak)
            wrong += [f"{size}, tiles {tiles}, {variant}" for variant, one in found.items() if not agrees(one)]
            results.append(
                {
                    "size": size,
                    "tiles": tiles,
                    "dtype": given.dtype,
                    "machine": machine,
                    "torch": torch.__version__,
                    "matmul_peak": peak,
                    "variants": {variant: asdict(one) for variant, one in found.items()},
                    "ratios": {variant: ratios(found, variant) for variant in ("a", "b")},
                }
            )
            if given.json:
                given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        del guide
    if wrong:
        raise SystemExit(f"the closed forms disagree with torch's counter: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
