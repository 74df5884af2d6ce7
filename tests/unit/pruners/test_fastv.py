"""FastV: the original's scores, choices, logits and caches, and what our own K = 0 does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pgp_lightning.attention import coming_parts
from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import KeepAll, Pruner, Run, pruned
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners import fastv
from pgp_lightning.pruners.fastv import FastV, attention_received
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.decoder_call import cache_keyword
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.request import Request
from tests.masked_reference import masked_greedy
from tests.tiny import row_of
from tests.toy_decoder import ToyVLM, read_golden, toy_vlm, visual_slots
from tests.unit.prefill.made import CLOSE, FAMILIES, LAYERS, STEPS, ask, build, hooks, masked_by, shared, without_stop

E2E = ("e2e_mha_k1_keep5", "e2e_gqa_k2_keepall", "hf_mha_k3_r075", "hf_gqa_k2_r05")


def close(found: Tensor, wanted: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(found, torch.from_numpy(wanted).reshape(found.shape), atol=atol, rtol=0)


@pytest.mark.parametrize("case", ["small", "keep1", "big"])
def test_from_a_row_of_attention_to_the_slots_that_stay(case: str):
    arrays = read_golden(f"fastv_unit_{case}.npz")
    length, start, count = (arrays[key].item() for key in ("seq_len", "image_start", "num_image"))
    visual = visual_slots(start, count, length)
    nothing = torch.zeros(1, length, 1)
    state = PrefillState(
        hidden=nothing,
        token=(visual.cumsum(dim=1) - 1).masked_fill(~visual, -1),
        valid=torch.ones_like(visual),
        origin=torch.arange(length)[None],
        rope=(nothing, nothing),
        counts=torch.tensor([count]),
        next_position=torch.tensor([length]),
        rotary=torch.nn.Identity(),
    )
    score = state.to_tokens(torch.from_numpy(arrays["attn_last_row"])[:, :, 0].mean(dim=1))
    close(score[0], arrays["score"], 1e-7)
    keep = keep_top(score, count=arrays["num_keep"].item())
    assert state.keep_tokens(keep).origin[0].tolist() == arrays["keep_global"].tolist()


def toy(arrays: dict[str, np.ndarray], attention: str = "sdpa") -> tuple[ToyVLM, dict[str, Any], Tensor, FastV]:
    """Return the model of a case, its inputs, the visual slots and the pruner."""
    embeddings = torch.from_numpy(arrays["inputs_embeds"])
    count = arrays["num_image"].item()
    pruner = FastV(arrays["K"].item(), arrays["num_keep"].item() / count)
    slots = visual_slots(arrays["image_start"].item(), count, embeddings.shape[1])
    return toy_vlm(str(arrays["weights"]), attention), {"inputs_embeds": embeddings}, slots, pruner


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", E2E)
@torch.no_grad()
def test_scores_slots_and_logits_are_the_originals(case: str, attention: str):
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, pruner = toy(arrays, attention)
    with pruned(vlm, pruner, inputs, visual=slots) as run:
        logits = vlm.model(**inputs, use_cache=True).logits
    assert pruner.importance is not None
    close(pruner.importance, arrays["score"], 1e-5)
    depth, start, length = arrays["K"].item(), arrays["image_start"].item(), slots.shape[1]
    kept = run.kept[depth][0].nonzero().flatten() + start
    text = (~slots[0]).nonzero().flatten()
    assert torch.cat([kept, text]).sort().values.tolist() == arrays["keep_global"].tolist()
    assert [int(n) for n in run.slots] == [length] * depth + [len(arrays["keep_global"])] * (6 - depth)
    close(logits[0], arrays["logits_pruned" if "logits_pruned" in arrays else "prefill_logits"], 5e-4)


@pytest.mark.parametrize("case", E2E[:2])
@torch.no_grad()
def test_dropping_equals_masking_and_the_whole_model_is_the_originals(case: str):
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, pruner = toy(arrays)
    with pruned(vlm, pruner, inputs, visual=slots):
        close(vlm.model(**inputs).logits[0, -1], arrays["logits_maskmode"][0, -1], 5e-4)
    close(vlm.model(**inputs).logits, arrays["logits_full"], 5e-4)


@pytest.mark.parametrize("case", E2E[:2])
@torch.no_grad()
def test_a_prefill_for_every_token_prunes_anew_as_the_first_release_does(case: str):
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, pruner = toy(arrays)
    hidden = inputs["inputs_embeds"]
    for step, token in enumerate(arrays["nocache_tokens"].tolist()):
        inputs = {"inputs_embeds": hidden}
        with pruned(vlm, pruner, inputs, visual=slots) as run:
            logits = vlm.model(**inputs).logits[0, -1]
        close(logits, arrays["nocache_logits"][step], 5e-4)
        kept = run.kept[-1][0].nonzero().flatten() + arrays["image_start"].item()
        assert kept.tolist() == arrays["nocache_keep_visual"][step].tolist()
        assert int(logits.argmax()) == token
        hidden = torch.cat([hidden, vlm.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
        slots = torch.cat([slots, torch.zeros(1, 1, dtype=torch.bool)], dim=1)


@pytest.mark.parametrize("case", E2E[2:])
@torch.no_grad()
def test_decoding_from_the_cache_is_the_originals(case: str):
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, pruner = toy(arrays)
    assert pruner.keep_ratio == round(slots.sum().item() * (1 - arrays["R"].item())) / slots.sum().item()
    cache, length = DynamicCache(config=vlm.model.config), slots.shape[1]
    with pruned(vlm, pruner, inputs, visual=slots):
        tokens = [int(vlm.model(**inputs, **{cache_keyword(vlm.model): cache}).logits[0, -1].argmax())]
        for step in range(3):
            logits = vlm.model(
                input_ids=torch.tensor([tokens[-1:]]),
                attention_mask=torch.ones(1, length + step + 1, dtype=torch.long),
                position_ids=torch.tensor([[length + step]]),
                **{cache_keyword(vlm.model): cache},
            ).logits[0, -1]
            close(logits, arrays["decode_logits"][step], 5e-4)
            lengths = [cache.get_seq_length(depth) for depth in range(6)]
            assert lengths == arrays["cache_lengths_per_step"][step].tolist()
            tokens.append(int(logits.argmax()))
    assert tokens == arrays["decode_tokens"].tolist()


@pytest.mark.parametrize("at_once", [1, 200, 2**24])
@pytest.mark.parametrize("case", E2E)
@torch.no_grad()
def test_attention_of_all_queries_is_the_mean_of_the_whole_matrix(
    case: str, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fastv, "_AT_ONCE", at_once)
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, _ = toy(arrays)
    pruner = FastV(arrays["K"].item(), 0.5, query="all")
    with pruned(vlm, pruner, inputs, visual=slots):
        vlm.model(**inputs)
    assert pruner.importance is not None
    whole = arrays["attn_layer_Kminus1"].mean(axis=(1, 2))
    close(pruner.importance, whole[slots.numpy()], 1e-5)


def test_weights_in_memory_do_not_grow_with_rows_and_heads(monkeypatch: pytest.MonkeyPatch):
    layer: Any = shared("internvl").decoder_layers[0]  # 4 heads
    hidden, angle = torch.randn(2, 30, 48), torch.rand(2, 30, 12)
    valid = torch.arange(30) >= torch.tensor([[0], [7]])
    sizes: list[int] = []

    def seen(*given: Any) -> Any:
        for rows in coming_parts(*given):
            sizes.append(rows.numel())
            yield rows

    whole = attention_received(layer, hidden, (angle.cos(), angle.sin()), valid, "all")
    monkeypatch.setattr(fastv, "coming_parts", seen)
    monkeypatch.setattr(fastv, "_AT_ONCE", 1000)
    found = attention_received(layer, hidden, (angle.cos(), angle.sin()), valid, "all")
    torch.testing.assert_close(found, whole)
    assert max(sizes) == 2 * 4 * 4 * 30 <= 1000 and sum(sizes) == 2 * 4 * 30 * 30


@pytest.mark.parametrize("case", E2E)
@torch.no_grad()
def test_scores_for_layer_0_are_those_that_a_later_layer_would_take(case: str):
    """With embeddings in place of ids as well, and a layer beyond the last to score before."""
    arrays = read_golden(f"fastv_{case}.npz")
    vlm, inputs, slots, later = toy(arrays)
    pruner = FastV(0, later.keep_ratio, score_layer=later.layers[0])
    with pruned(vlm, pruner, inputs, visual=slots) as run:
        vlm.model(**inputs)
    close(pruner.importance, arrays["score"], 1e-5)  # type: ignore[arg-type]
    assert [int(n) for n in run.slots] == [len(arrays["keep_global"])] * 6
    with pruned(vlm, FastV(0, score_layer=6), inputs, visual=slots):
        vlm.model(**inputs)
    with (
        pytest.raises(ConfigError, match="the model has 6 layers"),
        pruned(vlm, FastV(0, score_layer=7), inputs, None, slots),
    ):
        pass


WAYS = {
    "last": {"layer": 2},
    "all": {"layer": 3, "query": "all"},
    "first_layer": {"layer": 0},
    "all_first_layer": {"layer": 0, "query": "all", "score_layer": 3},
    "early_score": {"layer": 3, "score_layer": 1},
    "late_score": {"layer": 1, "score_layer": 4},
}


def answer(vlm: VLM, pruner: Pruner, request: Request, **options: Any) -> tuple[Tensor, Tensor, Run]:
    """Return tokens (B, STEPS), their logits (B, STEPS, V) and the run."""
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request) as run:
        found = without_stop(vlm, inputs, **options)
    return found.sequences[:, -STEPS:], torch.stack(found.logits, dim=1), run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_the_model_under_masks(family: str, way: str):
    vlm = shared(family)
    request, pruner = ask(vlm), FastV(keep_ratio=0.4, **WAYS[way])  # type: ignore[arg-type]
    tokens, logits, run = answer(vlm, pruner, request)
    inputs = prompt_inputs(vlm, request)
    wanted, wanted_logits = masked_greedy(vlm, inputs, masked_by(vlm, inputs, run), STEPS)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, wanted_logits, atol=CLOSE, rtol=CLOSE)
    assert pruner.importance is not None
    assert torch.equal(run.kept[-1], keep_top(pruner.importance, 0.4))
    assert pruner.importance.isfinite().sum(dim=1).tolist() == request.counts


@pytest.mark.parametrize("query", ["last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_of_its_own_sees_what_the_run_sees(family: str, query: Any):
    """Positions and padding among it."""
    vlm = shared(family)
    request = ask(vlm)
    alone, within = FastV(0, 0.4, query, score_layer=3), FastV(3, 0.4, query)
    answer(vlm, alone, request)
    answer(vlm, within, request)
    assert alone.importance is not None
    assert within.importance is not None
    torch.testing.assert_close(alone.importance, within.importance, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_batch(way: str):
    """Rows of 12, 4 and 20 visual tokens, so most of a batch is padded."""
    vlm = shared("internvl")
    request, pruner = ask(vlm), FastV(keep_ratio=0.4, **WAYS[way])  # type: ignore[arg-type]
    _, logits, run = answer(vlm, pruner, request)
    for row, count in enumerate(request.counts):
        alone = pruner.at(0.4)
        _, logits_alone, run_alone = answer(vlm, alone, row_of(request, row))
        assert torch.equal(run.kept[-1][row, :count], run_alone.kept[-1][0])
        torch.testing.assert_close(logits[row], logits_alone[0], atol=CLOSE, rtol=CLOSE)
        assert pruner.importance is not None
        assert alone.importance is not None
        torch.testing.assert_close(pruner.importance[row, :count], alone.importance[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_returned_sequences_keep_what_one_keeps(layer: int):
    vlm = shared("internvl")
    request = ask(vlm)
    _, one, run = answer(vlm, FastV(layer, 0.4), request)
    pruner = FastV(layer, 0.4)
    _, several, run_several = answer(vlm, pruner, request, num_beams=2, num_return_sequences=2)
    assert pruner.importance is not None
    assert torch.equal(run.kept[-1], keep_top(pruner.importance, 0.4))  # a row for each of the request's
    assert torch.equal(run_several.kept[-1], run.kept[-1].repeat_interleave(2, dim=0))
    torch.testing.assert_close(several[::2, 0], one[:, 0], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_keeping_all_changes_no_bit(family: str, way: str):
    vlm = shared(family)
    request = ask(vlm)
    _, logits, _ = answer(vlm, FastV(keep_ratio=1.0, **WAYS[way]), request)  # type: ignore[arg-type]
    assert torch.equal(logits, answer(vlm, KeepAll(), request)[1])


@pytest.mark.parametrize("layer", [0, 2])
def test_nothing_stays_on_the_model_nor_of_it(layer: int):
    vlm = shared("internvl")
    request = ask(vlm)
    before, pruner = hooks(vlm.model), FastV(layer)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request):
        vlm.model.generate(**inputs, max_new_tokens=2)
        assert hooks(vlm.model) != before
    assert hooks(vlm.model) == before
    assert list(pruner.modules()) == [pruner]
    with pytest.raises(RuntimeError, match="stop"), pruned(vlm, pruner, inputs, request):
        vlm.model(**inputs)
        raise RuntimeError("stop")
    assert hooks(vlm.model) == before
    assert pruner._score is None


def test_the_scoring_pass_ends_early_and_leaves_inputs_and_cache_alone():
    vlm = build("internvl")
    request = ask(vlm)
    name, cache = cache_keyword(vlm.model), DynamicCache(config=vlm.decoder.config)
    inputs = prompt_inputs(vlm, request) | {name: cache}
    untouched = {key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)}
    ran: list[int] = []
    for depth, layer in enumerate(vlm.decoder_layers):
        layer.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
    # Layer 2 only shows its input: layers 0 and 1 run.
    with torch.no_grad(), pruned(vlm, FastV(0, 0.4, score_layer=3), inputs, request):
        assert ran == [0, 1]
        assert cache.get_seq_length() == 0
        vlm.model(**inputs)
    assert ran == [0, 1, *range(LAYERS)]
    assert inputs.keys() == {*untouched, name}
    assert all(torch.equal(inputs[key], value) for key, value in untouched.items())


def test_features_in_place_of_pixels_give_the_same_scores():
    vlm = shared("llava")
    request = ask(vlm)
    features = vlm.visual_tokens(request.tiles)
    scores = []
    for given in (None, features):
        inputs, pruner = prompt_inputs(vlm, request, features=given), FastV(0)
        with pruned(vlm, pruner, inputs, request):
            vlm.model.generate(**inputs, max_new_tokens=1)
        scores.append(pruner.importance)
    torch.testing.assert_close(scores[0], scores[1])


def test_what_cannot_be_is_refused():
    for options in ({"layer": -1}, {"score_layer": 0}, {"keep_ratio": 0.0}, {"query": "first"}):
        with pytest.raises(ConfigError):
            FastV(**options)
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    right = {key: inputs[key].flip(1) for key in ("input_ids", "attention_mask")}
    for layer in (0, 2):
        before = hooks(vlm.model)
        with (
            pytest.raises(ConfigError, match="pad prompts on the left"),
            pruned(vlm, FastV(layer), inputs | right, request),
        ):
            vlm.model(**inputs | right)
        assert hooks(vlm.model) == before
