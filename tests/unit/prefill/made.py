"""Models with layers enough to prune between, prompts for them, and pruners that tests need only here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from pgp_lightning.attention import coming_rows, watch_attention
from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import Pruner, Run
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import VICUNA, Llava
from pgp_lightning.vlm.processor import Processor
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid, TileRule
from tests.masked_reference import Masked
from tests.tiny import QUESTIONS, tiny_model, tiny_processor, tiny_request
from tests.tiny_llava import llava_model, llava_tokenizer

LAYERS = 5
STEPS = 4
CLOSE = 2e-5
SQUARE = TileGrid(1, 1, 4, False)
FAMILIES = ("internvl", "llava")
# These releases run hooks again in the backward pass: pruning under gradient checkpointing is refused.
RECOMPUTED_WITH_HOOKS = Version(transformers.__version__) < Version("5.23")


def build(family: str, attention: str = "sdpa", layers: int = LAYERS) -> VLM:
    """Make a random model: InternVL with grouped key heads on Qwen2, or LLaVA on Llama."""
    small: Any = tiny_model() if family == "internvl" else llava_model()
    config = copy.deepcopy(small.config)
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * layers
    config._attn_implementation = attention
    torch.manual_seed(3)
    model = type(small)(config).eval()
    with torch.no_grad():
        for module in model.modules():
            # Large enough for every layer to matter, small enough for float32 to stay within the tolerance.
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1.2 * module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1.0)
    model.generation_config.eos_token_id = None
    if family == "internvl":
        return InternVL(model, tiny_processor(), "tiny")
    rule = TileRule(32, 4, 1, 1, False, "pad")
    return Llava(model, Processor(llava_tokenizer(), rule, replace(VICUNA, system=""), 256, "llava"), "tiny")


@cache
def shared(family: str, attention: str = "sdpa") -> VLM:
    """Return a model that tests leave as it is."""
    return build(family, attention)


@cache
def flashing(family: str) -> VLM:
    """Return a model; transformers refuses to load FlashAttention on a CPU, so its name is written in afterwards."""
    vlm = build(family)
    vlm.decoder.config._attn_implementation = "flash_attention_2"
    return vlm


def ask(vlm: VLM, questions: Sequence[str] = QUESTIONS[:3], images: tuple[int, ...] = ()) -> Request:
    """Return questions: of different lengths, and for InternVL about images of 12, 4 and 20 visual tokens."""
    if vlm.family == "internvl":
        return tiny_request(tuple(questions), images=images)
    generator = torch.Generator().manual_seed(7)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    if not images:
        images = tuple(range(len(questions)))
    return Request(list(questions), tiles, [SQUARE] * 3, list(images))


def without_stop(vlm: VLM, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Generate greedily whatever the tokens are, and return scores and cache too."""
    settings: dict[str, Any] = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "pad_token_id": vlm.processor.stop_id,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return vlm.model.generate(**inputs, **(settings | options))


class Given(Guide):
    """A guide that scores at random, the same for the same request."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.calls = 0

    def forward(self, request: Request) -> Tensor:
        self.calls += 1
        # A row's scores do not depend on the rows around it.
        rows = [torch.rand(64, generator=torch.Generator().manual_seed(self.seed + len(q))) for q in request.questions]
        scores = torch.stack(rows)[:, : max(request.counts)]
        return scores.masked_fill(torch.arange(scores.shape[1]) >= torch.tensor(request.counts)[:, None], -torch.inf)


class Masks(Pruner):
    """Keeps given visual tokens: by depth, bool (B, M)."""

    def __init__(self, masks: Mapping[int, Tensor], renumber: int | None = None) -> None:
        super().__init__()
        self.masks, self.layers, self.number = dict(masks), tuple(masks), renumber

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth in self.masks:
            state = state.keep_tokens(state.expand(self.masks[depth]))
        return state.renumber() if depth == self.number else state


class Staged(Pruner):
    """Drops a random half at each of three depths; rows keep different counts."""

    layers = (0, 2, 4)

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        scores = torch.rand(state.token.shape, generator=torch.Generator().manual_seed(depth))
        return state.keep(~state.visual | (scores < 0.6))


class LastRow(Pruner):
    """Keeps the half to which the last slot paid most attention in the layer before: after FastV."""

    def __init__(self, layer: int, keep_ratio: float = 0.5) -> None:
        super().__init__()
        self.layers, self.keep_ratio = (layer,), keep_ratio
        self.rows: list[Tensor] = []

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        self.rows = []
        with watch_attention(vlm.decoder_layers[self.layers[0] - 1].self_attn, self.rows.append):
            yield

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        self.importance = state.to_tokens(self.rows[-1].mean(dim=1)[:, 0])
        return state.keep_tokens(keep_top(self.importance, self.keep_ratio))


class Coming(Pruner):
    """Keeps by the attention that the coming layer would pay, at two depths: after PyramidDrop."""

    layers = (1, 3)

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        self.decoder = vlm.decoder_layers
        yield
        del self.decoder

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        rows = coming_rows(self.decoder[depth], state.hidden, state.rope, state.valid)
        self.importance = state.to_tokens(rows.mean(dim=1)[:, 0])
        return state.keep_tokens(keep_top(self.importance, 0.5))


class Merge(Pruner):
    """Averages every second visual token with its successor and drops the others."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layers = (layer,)

    @staticmethod
    def merged(hidden: Tensor, visual: Tensor) -> Tensor:
        return torch.where(visual[..., None], (hidden + hidden.roll(-1, dims=1)) / 2, hidden)

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        state = state.replace(self.merged(state.hidden, state.visual))
        return state.keep(~state.visual | (state.token % 2 == 0))


class Glimpse(Pruner):
    """Appends a temporary token, adds to it in every layer, and cuts all caches by the attention it pays.

    Args:
        layer: in front of which it is read and dropped.
        width: of the hidden states.
        cuts: `all` drops visual tokens from the caches behind as well; `first` and `last` drop there the appended token
            alone, before visual tokens are dropped here or after.
    """

    def __init__(self, layer: int, width: int, cuts: str = "all") -> None:
        super().__init__()
        self.layers, self.cuts = (0, layer), cuts
        self.tokens = torch.randn(layer, width, generator=torch.Generator().manual_seed(5))
        self.rows: list[Tensor] = []
        self.found: Tensor | None = None

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        self.rows = []
        with watch_attention(vlm.decoder_layers[self.layers[1] - 1].self_attn, self.rows.append):
            yield

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        rows, last = len(state.hidden), self.layers[1]
        if depth == 0:
            return state.append(self.tokens[0].expand(rows, -1), state.next_position)
        if depth < last:
            added = torch.cat([state.hidden[:, :-1], state.hidden[:, -1:] + self.tokens[depth]], dim=1)
            return state.replace(added)
        if depth > last:
            return state
        self.found = state.hidden[:, -1]
        self.importance = state.to_tokens(self.rows[-1].mean(dim=1)[:, 0])
        keep = keep_top(self.importance, 0.4)
        if self.cuts == "first":
            return state.keep(state.origin >= 0, full_depth=True).keep_tokens(keep)
        if self.cuts == "last":
            state = state.keep_tokens(keep)
            return state.keep(state.origin >= 0, full_depth=True)
        both = ~state.visual | keep.gather(1, state.token.clamp(min=0))
        return state.keep(both & (state.origin >= 0), full_depth=True)


class Rewriting(Pruner):
    """Changes visual tokens and drops none."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layers = (layer,)

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth not in self.layers:
            return state
        return state.replace(Merge.merged(state.hidden, state.visual))


class Recorder(Pruner):
    """Runs another pruner and notes what hidden states it hands to the layers at which it changed something."""

    def __init__(self, inner: Pruner) -> None:
        super().__init__()
        self.inner, self.layers = inner, inner.layers
        self.handed: dict[int, PrefillState] = {}

    @contextmanager
    def attached(self, vlm: VLM, inputs: Mapping[str, Any], request: Request | None) -> Iterator[None]:
        with self.inner.attached(vlm, inputs, request):
            yield

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        after = self.inner.before_layer(depth, state)
        if after is not state:
            self.handed[depth] = after
        return after

    def rewrite(self, depth: int, hidden: Tensor) -> Tensor:
        """Put the hidden states that were handed over into the slots that they came from."""
        state, hidden = self.handed[depth], hidden.clone()
        rows, slots = (state.valid & (state.origin >= 0)).nonzero(as_tuple=True)
        hidden[rows, state.origin[rows, slots]] = state.hidden[rows, slots]
        return hidden


def slots_of(vlm: VLM, inputs: Mapping[str, Any], kept: Tensor) -> Tensor:
    """Turn a keep mask of visual tokens, bool (B, M), into one of prompt slots, bool (B, P); text stays."""
    visual = inputs["input_ids"] == vlm.model.config.image_token_id
    slots = inputs["attention_mask"].bool() & ~visual
    for row in range(len(slots)):
        places = visual[row].nonzero().flatten()
        slots[row, places] = kept[row, : len(places)]
    return slots


def masked_by(vlm: VLM, inputs: Mapping[str, Any], run: Run, **options: Any) -> Masked:
    """Return what a run left behind."""
    return Masked([slots_of(vlm, inputs, kept) for kept in run.kept], **options)


def random_masks(request: Request, ratio: float, seed: int = 0) -> Tensor:
    """Return keep masks, bool (B, M), with different counts in rows and at least one token in each."""
    scores = Given(seed)(request)
    keep = (scores > 1 - ratio) & (scores != -torch.inf)
    return keep | keep_top(scores, count=1)


def hooks(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return how many forward hooks every module has."""
    return [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]


def pruners(vlm: VLM, request: Request) -> dict[str, Pruner]:
    return {
        "at 0": Guided(Given(), 0, 0.3),
        "at 2": Masks({2: random_masks(request, 0.4)}),
        "renumbered": Masks({1: random_masks(request, 0.4)}, renumber=1),
        "watching": LastRow(3),
        "glimpse": Glimpse(3, vlm.width),
    }


NAMES = ("at 0", "at 2", "renumbered", "watching", "glimpse")


def reference(vlm: VLM, inputs: dict[str, Any], name: str, run: Any, copies: int = 1) -> Masked:
    """Return what a run left behind, a request's row once."""
    run.kept[:] = [kept[::copies] for kept in run.kept]
    masked = masked_by(vlm, inputs, run, renumber=1 if name == "renumbered" else None)
    if name == "glimpse":
        masked.decode = [masked.decode[3]] * 3 + list(masked.decode[3:])  # cut from the caches behind
    return masked
