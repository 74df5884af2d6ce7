"""The prefill state by itself: what is kept keeps its order, its place and everything that belongs to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pgp_lightning.prefill_state import PrefillState, pack, take

WIDTH = 3


class Positions(nn.Module):
    """Rotary positions that can be read: cosines are the position, sines its negative."""

    def forward(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cos = position[..., None].expand(-1, -1, 2).to(hidden.dtype)
        return cos, -cos


def make(rows: list[tuple[int, int, int]]) -> PrefillState:
    """Return the state of a prompt: text, visual tokens and text of each row, padded on the left.

    A slot's hidden states are its row, its slot and 1.
    """
    width = max(map(sum, rows))
    token, valid = torch.full((len(rows), width), -1), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (before, visual, after) in enumerate(rows):
        pad = width - before - visual - after
        valid[row, pad:] = True
        token[row, pad + before : pad + before + visual] = torch.arange(visual)
    origin = torch.arange(width).expand(len(rows), -1)
    place = torch.arange(len(rows))[:, None].expand(-1, width)
    hidden = torch.stack([place, origin, torch.ones_like(origin)], dim=-1).float()
    position = (valid.cumsum(dim=1) - 1).clamp(min=0)
    return PrefillState(
        hidden=hidden,
        token=token,
        valid=valid,
        origin=origin,
        rope=Positions()(hidden, position),
        counts=torch.tensor([visual for _, visual, _ in rows]),
        next_position=valid.sum(dim=1),
        rotary=Positions(),
    )


PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=4)


@st.composite
def states(draw: st.DrawFn) -> PrefillState:
    return make(draw(PROMPTS))


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int]) -> Tensor:
    rows = st.lists(st.booleans(), min_size=shape[1], max_size=shape[1])
    return torch.tensor(draw(st.lists(rows, min_size=shape[0], max_size=shape[0])))


def listed(state: PrefillState) -> list[list[tuple[int, int, float]]]:
    """Return every row's live slots: origin, visual token, position."""
    return [
        [
            (int(state.origin[row, slot]), int(state.token[row, slot]), float(state.rope[0][row, slot, 0]))
            for slot in state.valid[row].nonzero().flatten().tolist()
        ]
        for row in range(len(state.valid))
    ]


def consistent(state: PrefillState) -> None:
    """Check what holds of every state."""
    # Padding is on the left, some row has none, and it holds no visual token.
    assert bool((state.valid.int().diff(dim=1) >= 0).all()) and bool(state.valid[:, :1].any())
    assert not (state.visual & ~state.valid).any()
    for row, slots in enumerate(listed(state)):
        origins = [origin for origin, _, _ in slots if origin >= 0]
        assert origins == sorted(set(origins))
        for slot, (origin, _, _) in zip(state.valid[row].nonzero().flatten().tolist(), slots, strict=True):
            # Everything moved together.
            assert origin < 0 or state.hidden[row, slot].tolist() == [row, origin, 1]
    assert torch.equal(state.rope[0], -state.rope[1])
    assert {len(v[0]) for v in (state.hidden, state.token, state.valid, state.origin, *state.rope)} == {
        state.valid.shape[1]
    }


@given(data=st.data(), state=states())
def test_keeping_slots_keeps_order_and_origin(data: st.DataObject, state: PrefillState):
    before, start = listed(state), state
    for _ in range(3):
        mask = data.draw(masks(tuple(state.valid.shape)))
        mask[0, -1] = True  # something stays
        expected = [
            [entry for entry, slot in zip(row, live.nonzero().flatten().tolist(), strict=True) if keep[slot]]
            for row, live, keep in zip(before, state.valid, mask, strict=True)
        ]
        kept = state.keep(mask)
        assert listed(kept) == expected
        consistent(kept)
        assert (kept is state) == (expected == before)
        assert kept.counts is state.counts and (kept.behind is start.valid or kept is start)
        state, before = kept, expected


@given(data=st.data(), state=states())
def test_keeping_visual_tokens_never_drops_text(data: st.DataObject, state: PrefillState):
    gone: set[tuple[int, int]] = set()
    text = [[origin for origin, token, _ in row if token < 0] for row in listed(state)]
    shape = (len(state.valid), int(state.counts.max()))
    for _ in range(3):
        keep = data.draw(masks(shape))
        gone |= {(row, token) for row, token in (~keep).nonzero().tolist()}
        state = state.keep_tokens(keep)
        consistent(state)
        for row, slots in enumerate(listed(state)):
            left = [token for token in range(int(state.counts[row])) if (row, token) not in gone]
            assert [token for _, token, _ in slots if token >= 0] == left
            assert [origin for origin, token, _ in slots if token < 0] == text[row]
            # `kept` says the same, in the order of visual tokens.
            assert state.kept[row].nonzero().flatten().tolist() == left
    assert state.kept.shape == shape and state.kept.dtype == torch.bool


@given(state=states())
def test_keeping_everything_is_the_same_object(state: PrefillState):
    everything = torch.ones(len(state.valid), int(state.counts.max()), dtype=torch.bool)
    assert state.keep_tokens(everything) is state
    assert state.keep(torch.ones_like(state.valid)) is state
    assert state.keep(state.valid, full_depth=True) is state
    assert state.to(torch.device("cpu")) is state


@given(data=st.data(), state=states())
def test_scores_go_to_tokens_and_come_back(data: st.DataObject, state: PrefillState):
    scores = torch.arange(state.valid.numel()).reshape(state.valid.shape) - 3.5
    state = state.keep_tokens(data.draw(masks((len(state.valid), int(state.counts.max())))))
    scores = take(scores, state.origin)
    found = state.to_tokens(scores)
    assert found.dtype == torch.float32 and found.shape == (len(state.valid), int(state.counts.max()))
    expected = torch.full_like(found, -torch.inf)
    for row in range(len(found)):
        for slot in range(state.valid.shape[1]):
            if state.token[row, slot] >= 0:
                expected[row, state.token[row, slot]] = scores[row, slot]
    assert torch.equal(found, expected) and torch.equal(state.kept, expected > -torch.inf)
    assert torch.equal(state.to_tokens(scores.double()), expected)
    assert torch.equal(found.gather(1, state.token.clamp(min=0))[state.visual], scores[state.visual].float())


@given(data=st.data(), state=states())
def test_a_full_depth_cut_names_the_slots_that_the_layers_behind_keep(data: st.DataObject, state: PrefillState):
    handed, left = state, state.valid.clone()
    for step in range(4):
        mask = data.draw(masks(tuple(state.valid.shape)))
        mask[0, int((state.origin[0] >= 0).nonzero()[-1])] = True
        full_depth = data.draw(st.booleans())
        if full_depth:
            # Origins are places in the prompt, which is what this layer was handed.
            rows, slots = (state.valid & ~mask & (state.origin >= 0)).nonzero(as_tuple=True)
            left[rows, state.origin[rows, slots]] = False
        state = state.keep(mask, full_depth)
        if step == data.draw(st.integers(0, 5)):
            state = state.append(torch.full((len(state.valid), WIDTH), 9.0), state.next_position)
    if state is handed:
        assert state.behind is None and state.place is None
        return
    assert state.behind is not None and torch.equal(state.behind, left)
    assert (state.behind is handed.valid) == torch.equal(left, handed.valid)
    assert state.place is not None and torch.equal(state.place[state.valid], state.origin[state.valid])
    slots, valid = pack(state.behind)
    for row, found in enumerate(left):
        assert slots[row, valid[row]].tolist() == found.nonzero().flatten().tolist()


@given(data=st.data(), state=states())
def test_an_appended_token_is_last_and_no_visual_token(data: st.DataObject, state: PrefillState):
    state = state.keep_tokens(data.draw(masks((len(state.valid), int(state.counts.max())))))
    token = torch.randn(len(state.valid), WIDTH)
    longer = state.append(token, state.next_position)
    assert torch.equal(longer.hidden[:, -1], token) and bool(longer.valid[:, -1].all())
    assert longer.origin[:, -1].tolist() == longer.token[:, -1].tolist() == [-1] * len(token)
    assert torch.equal(longer.rope[0][:, -1, 0].long(), state.next_position)
    assert torch.equal(longer.kept, state.kept)
    consistent(longer)
    back = longer.keep(longer.origin >= 0)
    assert listed(back) == listed(state)
    for field in fields(PrefillState):
        if field.name not in ("rope", "rotary", "counts", "next_position", "shift", "place", "behind"):
            assert torch.equal(getattr(back, field.name)[back.valid], getattr(state, field.name)[state.valid])


@given(data=st.data(), state=states())
def test_renumbering_counts_live_slots(data: st.DataObject, state: PrefillState):
    lengths = state.valid.sum(dim=1)
    for _ in range(2):
        state = state.keep_tokens(data.draw(masks((len(state.valid), int(state.counts.max()))))).renumber()
        for row, slots in enumerate(listed(state)):
            assert [position for _, _, position in slots] == list(range(len(slots)))
            # The first generated token, which the model puts at the prompt's whole length, comes next.
            assert state.shift is not None and int(lengths[row] - state.shift[row]) == len(slots)
        consistent(state)


def test_rewriting_hidden_states_keeps_their_dtype_and_all_else():
    state = make([(1, 3, 2), (0, 2, 1)])
    other = state.replace(torch.zeros(2, 6, WIDTH, dtype=torch.float64))
    assert other.hidden.dtype == torch.float32 and not other.hidden.any()
    same: list[Any] = [field.name for field in fields(PrefillState) if field.name != "hidden"]
    assert all(getattr(other, name) is getattr(state, name) for name in same)


def test_requests_rows_repeat_for_beams():
    state = make([(1, 3, 2)] * 6)
    assert state.expand(torch.tensor([5, 7])).tolist() == [5, 5, 5, 7, 7, 7]
    assert state.expand(torch.arange(6)[:, None]).tolist() == [[0], [1], [2], [3], [4], [5]]


def test_gathering_slots():
    values = torch.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    slots = torch.tensor([[3, 0], [1, 1]])
    for of in (values, values[..., 0], values[..., 0, 0]):
        taken = take(of, slots)
        assert torch.equal(taken, torch.stack([of[row, slots[row]] for row in range(2)]))
