"""Prompt slots against a twin that appends one slot after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgp_lightning.vlm.processor import PromptIds
from pgp_lightning.vlm.slots import Slots, lay_out

CPU = torch.device("cpu")
IDS = st.lists(st.integers(1, 99), max_size=4)
PROMPTS = st.builds(
    PromptIds, st.lists(st.integers(1, 99), min_size=1, max_size=4), IDS.map(lambda ids: [7, *ids]), IDS
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[PromptIds], list[int], list[list[int]] | None]:
    """Draw prompts, token counts, and which tokens are kept (None for all)."""
    prompts = draw(st.lists(PROMPTS, min_size=1, max_size=4))
    counts = [draw(st.integers(1, 6)) for _ in prompts]
    if draw(st.booleans()):
        return prompts, counts, None
    kept = [sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))) for count in counts]
    return prompts, counts, kept


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    widest = max(map(len, rows))
    numbers = torch.tensor([row + [0] * (widest - len(row)) for row in rows])
    return numbers, torch.tensor([[True] * len(row) + [False] * (widest - len(row)) for row in rows])


def slow_lay_out(
    prompts: list[PromptIds], counts: list[int], kept: list[list[int]] | None, cut: bool
) -> tuple[list[dict[str, list[int]]], list[tuple[int, int, int]]]:
    """Append slot after slot; return each row, and (row, source slot, target) of every supervised token."""
    rows, supervised = [], []
    for b, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        row: dict[str, list[int]] = {"ids": [], "positions": [], "visual": []}
        position = 0
        for token in prompt.before:
            row["ids"].append(token)
            row["positions"].append(position)
            position += 1
        for number in range(count):
            if kept is None or number in kept[b]:
                row["visual"].append(len(row["ids"]))
                row["ids"].append(0)
                row["positions"].append(position)
            position += 1
        if not cut:
            for token in prompt.after:
                row["ids"].append(token)
                row["positions"].append(position)
                position += 1
            for place, token in enumerate(prompt.answer):
                supervised.append((b, len(row["ids"]) - 1, token))
                if place < len(prompt.answer) - 1:
                    row["ids"].append(token)
                    row["positions"].append(position)
                    position += 1
        rows.append(row)
    return rows, supervised


@given(layouts(), st.booleans())
def test_equals_the_slow_twin(layout: Any, cut: bool):
    prompts, counts, kept = layout
    options = {} if kept is None else dict(zip(("kept", "kept_mask"), padded(kept), strict=True))
    slots = lay_out(prompts, counts, CPU, cut=cut, **options)
    rows, supervised = slow_lay_out(prompts, counts, kept, cut)
    widest = max(len(row["ids"]) for row in rows)
    assert slots.ids.shape == slots.mask.shape == slots.positions.shape == (len(rows), widest)
    for b, row in enumerate(rows):
        length = len(row["ids"])
        assert slots.ids[b].tolist() == row["ids"] + [0] * (widest - length)
        assert slots.mask[b].tolist() == [1] * length + [0] * (widest - length)
        assert slots.positions[b, :length].tolist() == row["positions"]
        # Positions rise on padding too: a fall or a jump there would look like the border of packed sequences.
        assert (slots.positions[b, 1:] > slots.positions[b, :-1]).all()
        assert slots.visual[b][slots.visual_mask[b]].tolist() == row["visual"]
        assert (slots.visual[b][~slots.visual_mask[b]] == 0).all()
    found = zip(slots.rows.tolist(), slots.sources.tolist(), slots.targets.tolist(), strict=True)
    assert list(found) == supervised
    for tensor in (slots.ids, slots.mask, slots.positions, slots.visual, slots.rows, slots.sources, slots.targets):
        assert tensor.dtype == torch.int64


def example() -> tuple[list[PromptIds], list[int]]:
    return [PromptIds([5, 6], [7, 8], [9, 3]), PromptIds([5], [7, 8, 8], [9, 4, 3])], [4, 2]


def test_a_worked_example_with_gaps():
    prompts, counts = example()
    slots = lay_out(
        prompts, counts, CPU, kept=torch.tensor([[0, 3], [1, 0]]), kept_mask=torch.tensor([[True, True], [True, False]])
    )
    assert slots.ids.tolist() == [[5, 6, 0, 0, 7, 8, 9], [5, 0, 7, 8, 8, 9, 4]]
    assert slots.positions.tolist() == [[0, 1, 2, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7]]
    assert slots.visual.tolist() == [[2, 3], [1, 0]]
    assert list(zip(slots.rows.tolist(), slots.sources.tolist(), slots.targets.tolist(), strict=True)) == [
        (0, 5, 9), (0, 6, 3), (1, 4, 9), (1, 5, 4), (1, 6, 3)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_place_and_gather(dtype: torch.dtype):
    prompts, counts = example()
    slots = lay_out(prompts, counts, CPU)
    embeddings = torch.randn(*slots.ids.shape, 3, dtype=dtype)
    visual = torch.randn(2, 4, 3)
    placed = slots.place(embeddings, visual)
    assert placed.dtype == dtype
    expected = embeddings.clone()
    for b in range(2):
        for place in range(counts[b]):
            expected[b, len(prompts[b].before) + place] = visual[b, place].to(dtype)
    assert torch.equal(placed, expected)
    gathered = slots.gather(placed)
    assert torch.equal(gathered[slots.visual_mask], visual[slots.visual_mask].to(dtype))


def test_gradients_reach_the_placed_tokens_and_no_padding():
    prompts, counts = example()
    slots: Slots = lay_out(prompts, counts, CPU)
    visual = torch.randn(2, 4, 3, requires_grad=True)
    slots.place(torch.zeros(*slots.ids.shape, 3), visual).sum().backward()
    assert visual.grad is not None
    assert torch.equal(visual.grad, slots.visual_mask[..., None].expand(-1, -1, 3).float())
