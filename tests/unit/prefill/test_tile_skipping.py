"""Tiles without a kept token pass the vision tower by, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgp_lightning.guides.base import Guide
from pgp_lightning.prefill import pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import cache_of_output
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs, tiles_of_rows
from pgp_lightning.vlm.request import Request
from tests.tiny import GRIDS, QUESTIONS, row_of, tiny_request
from tests.unit.prefill.made import Given, ask, build, shared, without_stop

SIZE = 4  # visual tokens of a tile


class Fixed(Guide):
    """Gives these scores, (B, M), padding marked in them."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, request: Request) -> Tensor:
        return self.scores


def ranked(request: Request, tiles: list[list[int]]) -> Fixed:
    """Score high what lies in these tiles of each row."""
    scores = Given()(request)
    for row, wanted in enumerate(tiles):
        for tile in wanted:
            scores[row, tile * SIZE : (tile + 1) * SIZE] += 10
    return Fixed(scores)


@contextmanager
def counting(vlm: VLM) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Collect how many tiles the tower gets, and what stands behind the projector."""
    seen: list[int] = []
    features: list[Tensor] = []
    model = vlm.model.model
    inner = vlm.vision_layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    original: Callable[..., Tensor] = model.get_placeholder_mask

    def noted(*args: object, image_features: Tensor, **kwargs: object) -> Tensor:
        features.append(image_features)
        return original(*args, image_features=image_features, **kwargs)

    model.get_placeholder_mask = noted
    try:
        yield seen, features
    finally:
        inner.remove()
        del model.get_placeholder_mask


SHARED = (0, 1, 2, 0)
# Which tiles of each row score highest, out of 3, 1, 5 and 3; the ratio; and how many of the 12 are needed at least.
NEEDED: dict[str, tuple[list[list[int]], float, int | None]] = {
    "one tile of each": ([[1], [0], [4], [2]], 0.2, 4),
    "two of the large image": ([[0], [0], [0, 3], [0]], 0.34, 5),
    "another tile for the other question": ([[0], [0], [2], [2]], 0.3, None),
    "all tiles": ([[0], [0], [0], [0]], 1.0, 12),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NEEDED)
@torch.no_grad()
def test_the_same_logits_for_fewer_tiles(name: str, attention: str):
    vlm = shared("internvl", attention)
    request = ask(vlm, QUESTIONS, images=SHARED)
    inputs = prompt_inputs(vlm, request)
    tiles, ratio, count = NEEDED[name]
    outputs = []
    for skip in (True, False):
        pruner = Guided(ranked(request, tiles), 0, ratio, skip_tiles=skip)
        with pruned(vlm, pruner, inputs, request) as run, counting(vlm) as (seen, features):
            out = without_stop(vlm, inputs)
        outputs.append((out, seen, features[0]))
        assert pruner.keep is not None
        needed = torch.cat(
            [row[:n].view(-1, SIZE).any(dim=1) for row, n in zip(pruner.keep, request.counts, strict=True)]
        )
    (ours, seen, features), (theirs, all_seen, all_features) = outputs
    assert seen == [int(needed.sum())] and all_seen == [12]
    assert seen == [count] or (count is None and seen[0] < 12)
    assert torch.equal(features[needed], all_features[needed]) and not features[~needed].any()
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    for a, b in zip(cache_of_output(ours).layers, cache_of_output(theirs).layers, strict=True):
        width = int(run.slots[0].max())
        held = torch.arange(a.keys.shape[2]) >= (width - run.slots[0])[:, None]  # padding holds whatever was dropped
        for ours_held, theirs_held in ((a.keys, b.keys), (a.values, b.values)):
            assert torch.equal(ours_held.transpose(1, 2)[held], theirs_held.transpose(1, 2)[held])


@torch.no_grad()
def test_one_tile_of_a_single_question():
    vlm = shared("internvl")
    request = row_of(ask(vlm), 2)
    inputs = prompt_inputs(vlm, request)
    outputs = []
    for skip in (True, False):
        with (
            pruned(vlm, Guided(ranked(request, [[3]]), 0, 0.05, skip_tiles=skip), inputs, request),
            counting(vlm) as (seen, _),
        ):
            outputs.append(without_stop(vlm, inputs))
        assert seen == [1 if skip else 5]
    assert all(map(torch.equal, outputs[0].logits, outputs[1].logits))


@torch.no_grad()
def test_beams_and_samples_share_the_tiles_of_their_question():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}):
        outputs = []
        for skip in (True, False):
            pruner = Guided(ranked(request, [[1], [0], [4]]), 0, 0.2, skip_tiles=skip)
            with pruned(vlm, pruner, inputs, request), counting(vlm) as (seen, _):
                outputs.append(without_stop(vlm, inputs, **options))
            assert seen == [3 if skip else 9]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@torch.no_grad()
def test_layers_behind_the_first_see_every_tile():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, Guided(Given(), 1, 0.05), inputs, request), counting(vlm) as (seen, _):
        without_stop(vlm, inputs)
    assert seen == [9]


@torch.no_grad()
def test_features_that_are_there_already_need_no_tower():
    vlm = shared("internvl")
    request = ask(vlm)
    pixels, features = (
        prompt_inputs(vlm, request),
        prompt_inputs(vlm, request, features=vlm.visual_tokens(request.tiles)),
    )
    outputs = []
    for inputs in (pixels, features):
        with pruned(vlm, Guided(Given(), 0, 0.2), inputs, request), counting(vlm) as (seen, _):
            outputs.append(without_stop(vlm, inputs))
    assert seen == []
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), rtol=0, atol=2e-5)


@torch.no_grad()
def test_one_tile_families_are_not_touched():
    vlm = shared("llava")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    outputs = []
    for skip in (True, False):
        with pruned(vlm, Guided(Given(), 0, 0.1, skip_tiles=skip), inputs, request) as run:
            outputs.append(without_stop(vlm, inputs))
        assert run.kept[0].sum(dim=1).tolist() == [1, 1, 1]
    assert all(map(torch.equal, outputs[0].logits, outputs[1].logits))


def test_gradients_pass_through_what_is_needed():
    vlm = build("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    found = []
    for skip in (True, False):
        vlm.model.zero_grad()
        with pruned(vlm, Guided(ranked(request, [[1], [0], [4]]), 0, 0.2, skip_tiles=skip), inputs, request):
            vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits.logsumexp(-1).sum().backward()
        found.append({name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("vision_tower" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


def slow_twin(scores: list[float], size: int, budget: int, most: int) -> set[int]:
    """Try every choice: of a tile's tokens that could fill the budget, and of tiles; then count who beats a token."""
    tiles = [range(first, first + size) for first in range(0, len(scores), size)]
    choices = [combinations([scores[i] for i in tile], min(budget, size)) for tile in tiles]
    worth = [max(map(sum, choice)) for choice in choices]
    best = max(combinations(range(len(tiles)), min(most, len(tiles))), key=lambda some: sum(worth[t] for t in some))
    among = [i for t in best for i in tiles[t]]
    return {i for i in among if sum((-scores[j], j) < (-scores[i], i) for j in among) < budget}


def limited(scores: list[list[float]], ratio: float, most: int, request: Request) -> list[set[int]]:
    """Return the tokens that stay of each row under a limit on tiles."""
    padded = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, scores)), True, -torch.inf)
    keep = Guided(Fixed(padded), 0, ratio, max_tiles_kept=most)._choose(padded, request)
    return [set(row.nonzero().flatten().tolist()) for row in keep]


@settings(max_examples=60)
@given(data=st.data(), most=st.integers(1, 5), ratio=st.sampled_from([0.01, 0.1, 0.17, 0.25, 0.3, 0.5, 1.0]))
def test_a_limit_on_tiles_equals_its_slow_twin(data: st.DataObject, most: int, ratio: float):
    images = data.draw(st.permutations(range(3)).map(tuple))
    request = tiny_request(QUESTIONS[:3], images=images)
    # Quarters add up exactly, and often tie.
    quarters = st.integers(-8, 8).map(lambda n: n / 4)
    rows = [data.draw(st.lists(quarters, min_size=n, max_size=n)) for n in request.counts]
    for scores, kept in zip(rows, limited(rows, ratio, most, request), strict=True):
        budget = max(1, int(len(scores) * ratio + 1e-6))
        assert kept == slow_twin(scores, SIZE, budget, most)
        assert len(kept) == min(budget, most * SIZE) and len({i // SIZE for i in kept}) <= most


# Three tiles of four tokens: one token that stands out, two good ones, and four of which none is worth the first.
PEAK, PAIR, EVEN = [9.0, 0.0, 0.0, 0.0], [6.0, 6.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("budget", "tile", "kept"),
    [(1, 0, {0}), (2, 1, {4, 5}), (3, 1, {4, 5, 6}), (4, 2, {8, 9, 10, 11}), (12, 2, {8, 9, 10, 11})],
)
def test_a_tile_is_worth_what_it_brings_into_the_budget(budget: int, tile: int, kept: set[int]):
    request = tiny_request(QUESTIONS[:1], GRIDS[:1])
    assert {i // SIZE for i in kept} == {tile}
    assert limited([PEAK + PAIR + EVEN], budget / 12, 1, request) == [kept]


@torch.no_grad()
def test_a_limit_on_tiles_is_one_on_the_towers_work():
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    for most, expected in ((1, 3), (2, 5), (None, None)):
        pruner = Guided(Fixed(Given(1)(request)), 0, 0.2, max_tiles_kept=most)
        with pruned(vlm, pruner, inputs, request) as run, counting(vlm) as (seen, _):
            without_stop(vlm, inputs)
        assert run.kept[0].sum(dim=1).tolist() == [2, 1, 4]
        assert expected is None or seen[0] <= expected


def test_tiles_of_rows_follow_the_images():
    request = tiny_request(QUESTIONS, images=(2, 0, 2, 1))
    assert tiles_of_rows(request).tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 4, 5, 6, 7, 8, 3]
    assert [grid.tiles for grid in GRIDS] == [3, 1, 5]
