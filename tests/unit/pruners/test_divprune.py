"""DivPrune: the original's choices, and what is kept in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import KeepAll, pruned
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.selection import equal_shares, keep_count, keep_top, max_min_diversity
from pgp_lightning.vlm.inputs import prompt_inputs
from tests.masked_reference import masked_greedy
from tests.tiny import row_of
from tests.toy_decoder import read_golden, toy_vlm, visual_slots
from tests.unit.prefill.made import CLOSE, FAMILIES, STEPS, ask, hooks, masked_by, shared, without_stop

CASES = ("a", "c_5pct", "d_internvl_5tiles", "i_3333", "llava_098")


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_the_originals(case: str):
    arrays = read_golden(f"divprune_{case}.npz")
    features, count = torch.from_numpy(arrays["features"]), arrays["k"].item()
    order = max_min_diversity(features, count)
    assert order.tolist() == arrays["selected_order"].tolist()
    assert order[0] == arrays["first"].item()
    unit = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(1 - unit @ unit[order[0]], torch.from_numpy(arrays["dist_row_first"]), atol=1e-5, rtol=0)


def test_where_the_original_chooses_tokens_twice_ours_are_different_ones():
    arrays = read_golden("divprune_g_dups_knownbad.npz")
    order = max_min_diversity(torch.from_numpy(arrays["features"]), arrays["k"].item())
    assert len(set(order.tolist())) == arrays["k"].item() > arrays["n_unique"].item()


def test_rounding_is_the_originals_if_asked_for():
    arrays = read_golden("divprune_rounding.npz")
    for tokens, ratio, count in zip(arrays["n"].tolist(), arrays["ratio"].tolist(), arrays["k"].tolist(), strict=True):
        assert DivPrune(ratio, rounding="round").budget(tokens) == max(1, count)
        assert DivPrune(ratio).budget(tokens) == keep_count(tokens, ratio)


@pytest.mark.parametrize("rounding", ["floor", "round"])
def test_a_decoder_keeps_the_originals_choice_in_order(rounding: Any):
    arrays = read_golden("divprune_c_5pct.npz")
    features = torch.from_numpy(arrays["features"])
    vlm, slots = toy_vlm("mha"), visual_slots(3, 256, 262)
    embeddings = torch.randn(1, 262, 32, generator=torch.Generator().manual_seed(0))
    embeddings[slots] = features
    inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(1, 262, dtype=torch.long)}
    # int(256 * 0.05) is 12, and the original's 13 is round(12.8).
    with torch.no_grad(), pruned(vlm, DivPrune(0.05, rounding=rounding), inputs, visual=slots) as run:
        vlm.model(**inputs)
    wanted = arrays["selected_order"][: 13 if rounding == "round" else 12]
    assert run.kept[0][0].nonzero().flatten().tolist() == sorted(wanted.tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["image", "tile"])
def test_a_model_keeps_what_is_diverse_among_its_projected_tokens(family: str, scope: Any):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    pruner = DivPrune(0.4, scope=scope)
    with torch.no_grad(), pruned(vlm, pruner, inputs, request) as run:
        vlm.model(**inputs)
    importance = pruner.importance
    assert importance is not None
    for row, count in enumerate(request.counts):
        single = vlm.visual_tokens(row_of(request, row).tiles) if family == "internvl" else None
        features = (vlm.visual_tokens(request.tiles[row : row + 1]) if single is None else single).flatten(0, 1)
        size = count if scope == "image" else vlm.processor.rule.tokens_per_side**2
        wanted = set()
        for tile, share in enumerate(equal_shares(keep_count(count, 0.4), count // size)):
            order = max_min_diversity(features[tile * size : (tile + 1) * size], share)
            wanted |= {tile * size + i for i in order.tolist()}
            assert importance[row, tile * size + order].tolist() == list(range(share, 0, -1))
        kept = run.kept[-1][row]
        assert set(kept.nonzero().flatten().tolist()) == wanted
        assert len(wanted) == keep_count(count, 0.4)
        assert bool((importance[row, count:] == -torch.inf).all())
        assert torch.equal(importance[row] > 0, kept)
    if scope == "image":
        assert torch.equal(keep_top(importance, 0.4), run.kept[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("renumber", [False, True])
def test_generation_equals_the_model_under_masks(family: str, renumber: bool):
    vlm = shared(family)
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, DivPrune(0.4, renumber=renumber), inputs, request) as run:
        found = without_stop(vlm, inputs)
    masked = masked_by(vlm, inputs, run, renumber=0 if renumber else None)
    tokens, logits = masked_greedy(vlm, inputs, masked, STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], tokens)
    torch.testing.assert_close(torch.stack(found.logits, dim=1), logits, atol=CLOSE, rtol=CLOSE)


def logits_of(vlm: Any, pruner: Any, request: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request) as run:
        return torch.stack(without_stop(vlm, inputs, **options).logits, dim=1), run.kept


@pytest.mark.parametrize("scope", ["image", "tile"])
def test_a_row_does_not_depend_on_its_batch(scope: Any):
    vlm = shared("internvl")
    request = ask(vlm)
    logits, kept = logits_of(vlm, DivPrune(0.4, scope=scope), request)
    for row, count in enumerate(request.counts):
        alone, kept_alone = logits_of(vlm, DivPrune(0.4, scope=scope), row_of(request, row))
        assert torch.equal(kept[0][row, :count], kept_alone[0][0])
        torch.testing.assert_close(logits[row], alone[0], atol=CLOSE, rtol=CLOSE)


def test_returned_sequences_keep_what_one_keeps():
    vlm = shared("internvl")
    request = ask(vlm)
    pruner = DivPrune(0.4)
    one, kept = logits_of(vlm, pruner, request)
    importance = pruner.importance
    several, kept_several = logits_of(vlm, pruner, request, num_beams=2, num_return_sequences=2)
    assert importance is not None and pruner.importance is not None
    assert torch.equal(pruner.importance, importance)  # a row for each of the request's
    assert torch.equal(kept_several[0], kept[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(several[::2, 0], one[:, 0], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_no_bit_and_hooks_go(family: str):
    vlm = shared(family)
    request = ask(vlm)
    before = hooks(vlm.model)
    all_, _ = logits_of(vlm, DivPrune(1.0), request)
    assert torch.equal(all_, logits_of(vlm, KeepAll(), request)[0])
    assert hooks(vlm.model) == before


def test_a_model_without_a_processor_takes_the_size_of_a_tile_from_the_request():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    kept = []
    for model in (vlm, vlm.model):
        with torch.no_grad(), pruned(model, DivPrune(0.4, scope="tile"), inputs, request) as run:
            vlm.model(**inputs)
        kept.append(run.kept[0])
    assert torch.equal(*kept)
    with pytest.raises(ConfigError, match="no processor"), pruned(vlm.model, DivPrune(scope="tile"), inputs):
        pass


def test_another_budget_is_another_pruner():
    pruner = DivPrune(0.4, scope="tile", rounding="round")
    other = pruner.at(0.2)
    assert (pruner.keep_ratio, other.keep_ratio, other.scope, other.rounding) == (0.4, 0.2, "tile", "round")


def test_what_cannot_be_is_refused():
    for options in ({"keep_ratio": 0.0}, {"scope": "row"}, {"rounding": "up"}):
        with pytest.raises(ConfigError):
            DivPrune(**options)
    slots = visual_slots(3, 16, 22)
    inputs = {"inputs_embeds": torch.randn(1, 22, 32)}
    with (
        pytest.raises(ConfigError, match="no processor"),
        pruned(toy_vlm("mha"), DivPrune(scope="tile"), inputs, None, slots),
    ):
        pass
