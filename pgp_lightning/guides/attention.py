"""SGP: the attention that a small VLM pays while it answers ranks visual tokens.

Paper: "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs" (SGP, released as
SGL), Section 3.2: the small model reads the prompt and generates its answer; a visual token's importance is the
attention paid to it, summed over all layers and heads, by the prompt's tokens and the generated ones.

Two choices of the release are not in the paper, and are the defaults here: the rows begin with the last visual token's
own (`rows="prompt"`; the paper's text means `prompt_after_image`), and an answer has at least one token before the stop
token. The last generated token is never fed back and so pays no attention. Ours: sums in float32 where the release adds
up bfloat16, batches, and rows recomputed beside the model, so that it need not form attention matrices.

The paper's early exit (SEE) is not built; `Attended.confidence` is its first half.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from pgp_lightning.attention import watch_attention
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide, evaluating
from pgp_lightning.vlm.family import VLM, Attention
from pgp_lightning.vlm.inputs import prompt_inputs, read_answers
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.processor import PromptOrder
from pgp_lightning.vlm.request import Request

__all__ = ["Attended", "AttentionGuide", "Rows", "answer_attention"]

Rows = Literal["prompt", "prompt_after_image", "answer"]
"""Whose attention counts, besides that of the generated tokens.

`prompt`: the prompt from its last visual token on, that token included (the release).
`prompt_after_image`: the prompt behind its last visual token (the paper).
`answer`: the prompt's last token alone, the one that predicts the answer's first.
"""

BLOCK = 64  # rows of a layer at a time: memory stays linear in the prompt


class Attended(NamedTuple):
    """What B answers of a model paid attention to."""

    prompt: Tensor
    """Float32 (B, M): what the prompt's rows paid to each visual token, -inf on padding."""
    answer: Tensor
    """Float32 (B, M): what the generated tokens paid, -inf on padding."""
    tokens: Tensor
    """int64 (B, n): the generated tokens; a row goes on with stop tokens after its first."""
    confidence: Tensor
    """Float32 (B,): geometric mean of the probabilities of an answer's tokens, its stop token included."""

    @property
    def importance(self) -> Tensor:
        """Both parts together: float32 (B, M), -inf on padding."""
        return self.prompt + self.answer


class AttentionGuide(Guide):
    """A small VLM as it is, which answers the question.

    The prompt's rows outweigh a short answer's by their number; `attended` has the two parts of the last call.

    Args:
        base: the small VLM: `embedded:guide`, a local folder, or a repository on the hub; from Python also a model in
            memory, which `dtype` and `attention` then leave as it is (a `PosteriorGuide`'s `vlm` comes with its
            adapter).
        rows: whose attention counts besides the answer's: `prompt` (from the last visual token on, that one included;
            the release), `prompt_after_image` (the paper), or `answer` (the prompt's last token alone). With
            `question_first` the question is in none of them.
        order: prompt order; a family's own is `image_first`. With `question_first` visual tokens see the question.
        max_new_tokens: longest answer, its stop token included.
        dtype: of the weights and passes; sums are float32 always.
        attention: attention implementation of transformers; `auto` is flash-attn where it can run, else sdpa.

    Attributes:
        attended: what the last call found, None before the first.
        answers: the model's own answers of the last call.

    Raises:
        ConfigError: if the base cannot be loaded, or an argument is out of range.
    """

    def __init__(
        self,
        base: str | VLM = "embedded:guide",
        rows: Rows = "prompt",
        order: PromptOrder = "image_first",
        max_new_tokens: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Attention = "auto",
    ) -> None:
        super().__init__()
        _check(rows, max_new_tokens)
        self.rows, self.order, self.max_new_tokens = rows, order, max_new_tokens
        self.vlm = load_vlm(base, getattr(torch, dtype), attention) if isinstance(base, str) else base
        self.model: nn.Module = self.vlm.model
        self.attended: Attended | None = None
        self.answers: list[str] = []

    @torch.no_grad()
    def forward(self, request: Request) -> Tensor:
        """Generate an answer to every question and return the importance (B, M), float32, -inf on padding."""
        vlm = self.vlm
        with evaluating(vlm.model):
            # Once an image, however many questions ask about it.
            inputs = prompt_inputs(vlm, request, self.order, vlm.visual_tokens(request.tiles))
            visual = vlm.visual_slots(inputs["input_ids"])
            self.attended = answer_attention(vlm, inputs, visual, vlm.processor.stop_id, self.rows, self.max_new_tokens)
        self.answers = read_answers(vlm, self.attended.tokens)
        return self.attended.importance


@torch.no_grad()
def answer_attention(
    vlm: VLM,
    inputs: Mapping[str, Any],
    visual: Tensor,
    stop: int,
    rows: Rows = "prompt",
    max_new_tokens: int = 16,
) -> Attended:
    """Generate greedily and sum up the attention paid to visual slots over layers, heads and rows.

    Args:
        vlm: the model, used as it is.
        inputs: what `generate` takes: prompts padded on the left, as `input_ids` or `inputs_embeds` (B, N, d).
        visual: bool (B, N), the slots of visual tokens; at least one in every row.
        stop: the token that ends an answer. A row's forwards after it, which wait for longer answers, do not count.
        rows: the prompt's rows that count.
        max_new_tokens: longest answer, its stop token included.

    Raises:
        ConfigError: if an argument is out of range.
    """
    _check(rows, max_new_tokens)
    slot = torch.arange(visual.shape[1], device=visual.device)
    image_end = (visual * slot).amax(dim=1, keepdim=True)
    last = visual.shape[1] - 1
    first = {"prompt": image_end, "prompt_after_image": image_end + 1, "answer": torch.full_like(image_end, last)}
    sums, probabilities = _Sums(slot >= first[rows]), _Probabilities()
    with ExitStack() as watches:
        for layer in vlm.decoder_layers:
            attention = layer.get_submodule("self_attn")
            watches.enter_context(watch_attention(attention, sums.add, sums.rows, BLOCK))
        generated = vlm.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=stop,
            pad_token_id=stop,
            logits_processor=[probabilities],
        )
    # Given ids, `generate` returns them in front of the new ones.
    tokens = generated[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else generated
    ended = (tokens == stop).cumsum(dim=1) > 0
    running = torch.cat([torch.ones_like(ended[:, :1]), ~ended[:, :-1]], dim=1)
    paid = sums.prompt.new_zeros(sums.prompt.shape)
    for step, values in enumerate(sums.steps):
        # Step t feeds token t; a row alone never feeds its stop token.
        paid += values * ~ended[:, step, None]
    logs = torch.stack(probabilities.best, dim=1).log()
    confidence = ((logs * running).sum(dim=1) / running.sum(dim=1)).exp()
    return Attended(_by_token(sums.prompt, visual), _by_token(paid, visual), tokens, confidence)


class _Sums:
    """Adds up what is paid to the prompt's slots, whichever layer it comes from.

    Args:
        asked: bool (B, N), the slots whose rows count.
    """

    def __init__(self, asked: Tensor) -> None:
        self.slots = asked.shape[1]
        self.rows = int(self.slots - asked.any(dim=0).int().argmax())
        self.asked = asked[:, -self.rows :]
        self.prompt = torch.zeros(asked.shape, device=asked.device)
        """Float32 (B, N)."""
        self.steps: list[Tensor] = []
        """By forward after the prompt's: float32 (B, N)."""
        self._added = 0

    def add(self, rows: Tensor) -> None:
        """Take the next rows (B, H, R, K) of a layer."""
        paid = rows[..., : self.slots].sum(dim=1).to(self.prompt.device)
        step = rows.shape[3] - self.slots - 1
        if step < 0:
            # A layer shows all its blocks before the next layer runs.
            start = self._added % self.rows
            self._added += paid.shape[1]
            # No matrix product, which might round to TF32.
            self.prompt += (paid * self.asked[:, start : start + paid.shape[1], None]).sum(dim=1)
            return
        if step == len(self.steps):
            self.steps.append(torch.zeros_like(self.prompt))
        self.steps[step] += paid[:, 0]


class _Probabilities(LogitsProcessor):
    """Notes the probability of each step's best token, float32 (B,), and changes nothing."""

    def __init__(self) -> None:
        self.best: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.best.append(scores.float().softmax(dim=-1).amax(dim=-1))
        return scores


def _by_token(values: Tensor, visual: Tensor) -> Tensor:
    """Bring values of slots (B, N) into the order of visual tokens: (B, M), -inf on padding."""
    found = [row[slots] for row, slots in zip(values, visual, strict=True)]
    return pad_sequence(found, batch_first=True, padding_value=-torch.inf)


def _check(rows: str, max_new_tokens: int) -> None:
    if rows not in ("prompt", "prompt_after_image", "answer"):
        raise ConfigError(f"rows must be prompt, prompt_after_image or answer, got {rows!r}")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
