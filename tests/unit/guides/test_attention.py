"""The attention guide against the original code's values and against matrices that transformers returns itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides import attention as module_under_test
from pgp_lightning.guides.attention import Attended, AttentionGuide, Rows, answer_attention
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import keep_count, keep_top
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.processor import PromptOrder
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid
from tests.pairwise import pairwise
from tests.tiny import QUESTIONS, row_of, tiny_request
from tests.toy_decoder import GOLDEN, read_golden, toy_vlm, visual_slots
from tests.unit.guides.made import make

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ROWS: tuple[Rows, ...] = ("prompt", "prompt_after_image", "answer")
ORDERS: tuple[PromptOrder, ...] = ("image_first", "question_first")
E2E = sorted(path.name for path in GOLDEN.glob("sgp_e2e_*.npz"))
STOP = 2  # of the toy decoder


class Keep(Pruner):
    """Keeps given visual tokens, bool (1, M), from a layer on."""

    def __init__(self, layer: int, keep: Tensor) -> None:
        super().__init__()
        self.layers, self.keep = (layer,), keep

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        self.state = state.keep_tokens(self.keep) if depth in self.layers else state
        return self.state


def embedded(embeddings: Any) -> dict[str, Tensor]:
    embeddings = torch.as_tensor(embeddings)
    return {"inputs_embeds": embeddings, "attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.int64)}


def test_there_are_reference_values():
    assert {"sgp_e2e_a.npz", "sgp_e2e_k0_5pct.npz"} <= set(E2E)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", E2E)
def test_importance_is_the_original_codes(name: str, attention: str):
    values = read_golden(name)
    small = toy_vlm(str(values["small_weights"]), attention)
    inputs = embedded(values["small_inputs_embeds"])
    image = (values["image_start"].item(), values["num_image"].item())
    visual = visual_slots(*image, inputs["inputs_embeds"].shape[1])
    steps = len(values["small_tokens"])
    released, paper, answer = (answer_attention(small, inputs, visual, STOP, rows, steps) for rows in ROWS)
    assert released.tokens[0].tolist() == values["small_tokens"].tolist()
    expected = torch.from_numpy(values["importance"])[None]
    torch.testing.assert_close(released.importance, expected, rtol=0, atol=1e-3)
    expected = torch.from_numpy(values["importance_excl_last_visual_row"])[None]
    torch.testing.assert_close(paper.importance, expected, rtol=0, atol=1e-3)
    # The two parts, and the last row of the prompt.
    prompt, decoded = (torch.from_numpy(values[f"attn_{part}_rows"]) for part in ("prefill", "decode"))
    torch.testing.assert_close(released.prompt[0], prompt.sum(dim=(0, 1, 2)), rtol=0, atol=1e-3)
    torch.testing.assert_close(released.answer[0], decoded.sum(dim=(0, 1, 2)), rtol=0, atol=1e-3)
    torch.testing.assert_close(answer.prompt[0], prompt[:, :, -1].sum(dim=(0, 1)), rtol=0, atol=1e-3)
    assert torch.equal(answer.answer, released.answer)
    assert released.confidence.item() == pytest.approx(values["confidence"].item(), rel=1e-4)
    keep = keep_top(released.importance, values["retain_ratio"].item())
    slots = keep[0].nonzero().flatten() + values["image_start"].item()
    assert slots.tolist() == values["keep_visual_global"].tolist()
    assert keep_count(image[1], values["retain_ratio"].item()) == values["num_keep"].item()


@pytest.mark.parametrize("name", E2E)
def test_the_large_model_goes_on_as_in_the_original_code(name: str):
    values = read_golden(name)
    small, large = (toy_vlm(str(values[f"{size}_weights"])) for size in ("small", "large"))
    length = values["large_inputs_embeds"].shape[1]
    visual = visual_slots(values["image_start"].item(), values["num_image"].item(), length)
    steps = len(values["small_tokens"])
    found = answer_attention(small, embedded(values["small_inputs_embeds"]), visual, STOP, "prompt", steps)
    layer = values["prune_layer"].item()
    assert layer == int(len(large.decoder_layers) * values["prune_layer_fraction"].item())
    inputs = embedded(values["large_inputs_embeds"])
    pruner = Keep(layer, keep_top(found.importance, values["retain_ratio"].item()))
    positions: list[Tensor] = []
    count = len(values["large_tokens"])
    with torch.no_grad(), pruned(large, pruner, inputs, visual=visual) as run, noted_positions(large, positions):
        out = large.model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert pruner.state.origin[0].tolist() == values["keep_global"].tolist()
    assert out.sequences[0].tolist() == values["large_tokens"].tolist()
    logits = torch.stack(out.logits, dim=1)[0]
    torch.testing.assert_close(logits, torch.from_numpy(values["large_step_logits"]), rtol=0, atol=5e-4)
    lengths = [layer.keys.shape[2] for layer in cache_of_output(out).layers]
    assert lengths == values["large_cache_lengths_final"].tolist()
    assert [int(p[0, -1]) for p in positions[1:]] == values["large_decode_positions"].tolist()
    assert [n.item() for n in run.slots] == [length] * layer + [len(values["keep_global"])] * (6 - layer)


@contextmanager
def noted_positions(vlm: VLM, found: list[Tensor]) -> Iterator[None]:
    handle = vlm.decoder_layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def slow(vlm: VLM, request: Request, row: int, rows: Rows, order: PromptOrder, length: int) -> tuple[Tensor, ...]:
    """Compute a row's two parts from all of the eager model's matrices, and its tokens."""
    prompt = vlm.processor.prompt(request.questions[row], None, order)
    count, stop = request.counts[row], vlm.processor.stop_id
    ids = torch.tensor([[*prompt.before, *[vlm.processor.context_id] * count, *prompt.after]])
    with torch.no_grad():
        out = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=vlm.normalise(row_of(request, row).tiles),
            max_new_tokens=length,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop,
            return_dict_in_generate=True,
            output_attentions=True,
        )
    start, end = len(prompt.before), len(prompt.before) + count
    first = {"prompt": end - 1, "prompt_after_image": end, "answer": ids.shape[1] - 1}[rows]
    parts = [torch.zeros(count), torch.zeros(count)]
    for step, layers in enumerate(out.attentions):
        for matrix in layers:
            assert matrix.shape[2] == (ids.shape[1] if step == 0 else 1)
            for head in matrix[0]:
                for query in head[first:] if step == 0 else head:
                    parts[min(step, 1)] += query[start:end]
    return *parts, out.sequences[0, ids.shape[1] :]


def with_stop(vlm: VLM, token: int) -> VLM:
    """Let another token end an answer."""
    text = str(vlm.processor.tokenizer.convert_ids_to_tokens(token))
    vlm.processor = replace(vlm.processor, template=replace(vlm.processor.template, stop=text))
    assert vlm.processor.stop_id == token
    return vlm


def family(name: str, attention: Any, bases: dict[str, str]) -> tuple[VLM, Request]:
    """Return a model of a family whose answers end at different steps, and questions of different lengths for it."""
    vlm = load_vlm(bases[name], attention=attention)
    if name == "internvl":
        return vlm, tiny_request(QUESTIONS, images=(0, 1, 2, 0))
    generator = torch.Generator().manual_seed(4)
    tiles = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    questions = ["what color is the square", "how many", "is there a white cross"]
    return vlm, Request(questions, tiles, [TileGrid(1, 1, 4, False)] * 2, [0, 1, 0])


@pytest.fixture(scope="module")
def bases(tiny_base: str, llava_base: str) -> dict[str, str]:
    return {"internvl": tiny_base, "llava": llava_base}


LENGTH = 6


@pairwise(name=["internvl", "llava"], order=ORDERS, attention=["sdpa", "eager"])
def test_a_batch_is_its_rows_by_themselves_from_whole_matrices(
    name: str, order: PromptOrder, attention: str, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    # Blocks of rows that do not come out even.
    monkeypatch.setattr(module_under_test, "BLOCK", 3)
    vlm, request = family(name, attention, bases)
    eager = load_vlm(bases[name], attention="eager")
    free = AttentionGuide(vlm, order=order, max_new_tokens=LENGTH)
    free(request)
    assert free.attended is not None
    # One row's answer ends early, at least one goes on.
    tokens = free.attended.tokens
    choices = [t for row in tokens.tolist() for t in row[1:4] if any(t not in other for other in tokens.tolist())]
    for vlm_ in (vlm, eager):
        with_stop(vlm_, choices[0])
    for rows in ROWS:
        guide = AttentionGuide(vlm, rows, order, LENGTH)
        importance = guide(request)
        found = guide.attended
        assert found is not None and torch.equal(importance, found.importance)
        assert importance.dtype == torch.float32
        lengths = set()
        for row, count in enumerate(request.counts):
            prompt, answer, own = slow(eager, request, row, rows, order, LENGTH)
            lengths.add(len(own))
            assert found.tokens[row, : len(own)].tolist() == own.tolist()
            torch.testing.assert_close(found.prompt[row, :count], prompt, **CLOSE)
            torch.testing.assert_close(found.answer[row, :count], answer, **CLOSE)
            assert bool((importance[row, count:] == -torch.inf).all())
            guide(row_of(request, row))
            alone = guide.attended
            assert alone is not None
            torch.testing.assert_close(alone.importance[0], importance[row, :count], **CLOSE)
            torch.testing.assert_close(alone.confidence[0], found.confidence[row], **CLOSE)
        assert len(lengths) > 1


def test_answers_and_confidence_are_the_models_own(bases: dict[str, str]):
    vlm, request = family("internvl", "sdpa", bases)
    guide = AttentionGuide(vlm, max_new_tokens=3)
    guide(request)
    found = guide.attended
    assert found is not None and found.tokens.shape == (4, 3)
    words = [vlm.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found.tokens.tolist()]
    assert guide.answers == words
    prompt = vlm.processor.prompt(request.questions[1], None, "image_first")
    ids = torch.tensor([[*prompt.before, *[vlm.processor.context_id] * 4, *prompt.after, *found.tokens[1].tolist()]])
    with torch.no_grad():
        pixels = vlm.normalise(row_of(request, 1).tiles)
        logits = vlm.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -4:-1]
    # The model would not stop at once in this answer, so the forbidden first stop token matters for its share only.
    logits[0, vlm.processor.stop_id] = -torch.inf
    best = logits.softmax(dim=-1).gather(1, found.tokens[1][:, None])
    assert found.confidence[1].item() == pytest.approx(best.prod().item() ** (1 / 3), rel=1e-4)


def test_an_answer_has_a_token_before_its_stop():
    values = read_golden("sgp_e2e_a.npz")
    vlm, inputs = toy_vlm(str(values["small_weights"])), embedded(values["small_inputs_embeds"])
    visual = visual_slots(values["image_start"].item(), values["num_image"].item(), 38)
    first, second = values["small_tokens"][:2].tolist()
    forced = answer_attention(vlm, inputs, visual, stop=first, max_new_tokens=1).tokens[0]
    assert forced.item() != first
    # An answer of one token and the stop token: one forward after the prompt's.
    short = answer_attention(vlm, inputs, visual, stop=second)
    assert short.tokens[0].tolist() == [first, second]
    step = torch.from_numpy(values["attn_decode_rows"])[:, :, 0].sum(dim=(0, 1))
    torch.testing.assert_close(short.answer[0], step, rtol=0, atol=1e-4)
    one = answer_attention(vlm, inputs, visual, STOP, max_new_tokens=1)
    assert not one.answer.any()


def hooks_of(model: nn.Module) -> list[str]:
    """Return where the model's hooks come from; transformers leaves some of its own."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook.__module__ for hook in hooks]


def test_the_model_stays_as_it_was_also_after_an_exception(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    vlm, request = family("internvl", "sdpa", bases)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    vlm.model.model.language_model.layers[1].train()
    training = {name: module.training for name, module in vlm.model.named_modules()}
    config = vlm.model.generation_config.to_dict()
    guide = AttentionGuide(vlm, max_new_tokens=2)
    guide(request)

    def check() -> None:
        assert all(name.startswith("transformers.") for name in hooks_of(vlm.model))
        assert {name: module.training for name, module in vlm.model.named_modules()} == training
        assert vlm.model.generation_config.to_dict() == config
        assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in vlm.model.parameters())

    check()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vlm.model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        guide(request)
    check()


def test_dropout_of_a_model_in_training_does_not_reach_the_answers(bases: dict[str, str]):
    posterior = make(bases["internvl"], lora_dropout=0.5)
    request = tiny_request(QUESTIONS, images=(0, 1, 2, 0))
    guide = AttentionGuide(posterior.vlm, max_new_tokens=3)
    expected = guide(request)
    posterior.train()
    assert torch.equal(guide(request), expected)
    assert any(module.training for module in posterior.vlm.model.modules())


def test_an_adapted_model_pays_other_attention(bases: dict[str, str]):
    request = tiny_request(QUESTIONS, images=(0, 1, 2, 0))
    plain = AttentionGuide(bases["internvl"], max_new_tokens=3)(request)
    adapted = AttentionGuide(make(bases["internvl"]).vlm, max_new_tokens=3)(request)
    some = plain > -torch.inf
    assert torch.equal(some, adapted > -torch.inf)
    assert (plain - adapted)[some].abs().max() > 0.1


def test_the_vision_tower_runs_once_an_image(bases: dict[str, str]):
    vlm, request = family("internvl", "sdpa", bases)
    seen: list[int] = []
    handle = vlm.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    AttentionGuide(vlm, max_new_tokens=2)(request)
    handle.remove()
    assert seen == [len(request.tiles)]


def test_the_parts_add_up_and_begin_empty(bases: dict[str, str]):
    vlm, request = family("llava", "sdpa", bases)
    guide = AttentionGuide(vlm, max_new_tokens=3)
    assert guide.attended is None and guide.answers == []
    importance = guide(request)
    assert isinstance(guide.attended, Attended)
    torch.testing.assert_close(guide.attended.prompt + guide.attended.answer, importance)


def test_wrong_arguments_are_refused(bases: dict[str, str]):
    with pytest.raises(ConfigError, match="rows must be prompt, prompt_after_image or answer, got 'all'"):
        AttentionGuide(bases["internvl"], rows="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        AttentionGuide(bases["internvl"], max_new_tokens=0)
    with pytest.raises(ConfigError, match="no model at"):
        AttentionGuide("/nowhere/at/all")
