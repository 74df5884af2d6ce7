"""Records: what makes one unusable, and what happens to images that are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from data_world import WordProcessor, picture

from pgp_lightning.data.collate import Item, collate
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.grouping import SlotEstimate
from pgp_lightning.data.records import RawRecord, UnusableRecord

GOOD = {"question": "what colour", "answer": "red", "relevant": [3, 1, 3], "type": "colour"}


def raw(record: Any, image: bytes | None = None) -> RawRecord:
    """Return a record with a 16 x 16 image, which makes 2 x 2 tiles and a thumbnail: 20 visual tokens."""
    return RawRecord("key", picture() if image is None else image, json.dumps(record).encode())


def test_reads_a_record() -> None:
    found = ConversationReader(WordProcessor())(raw({"turns": [GOOD, {"question": ""}]}))
    (turn,) = found.turns
    assert (turn.question, turn.answer, turn.relevant, turn.type) == ("what colour", "red", (1, 3), "colour")
    assert (found.key, found.grid.tokens, found.tiles.shape, found.tiles.dtype) == ("key", 20, (5, 3, 8, 8), np.uint8)
    for form in ("JPEG", "WEBP"):
        assert ConversationReader(WordProcessor())(raw({"turns": [GOOD]}, picture(form=form))).grid == found.grid


@pytest.mark.parametrize("system", ["be brief and kind", "", None])
def test_a_system_text_is_part_of_the_conversation_and_of_its_length(system: str | None) -> None:
    words = len((system or "").split())
    record = {"turns": [GOOD, GOOD]} | ({} if system is None else {"system": system})
    reader = ConversationReader(WordProcessor(), turns="all", max_length=20 + 3 + words)
    found = reader(raw(record))
    assert found.system == system and found.grid.tokens == 20
    shorter = replace(reader, max_length=20 + 2 + words)
    assert shorter(raw(record)).grid.tokens < 20
    batch = collate([Item(found, "s", 0), Item(replace(found, system="other"), "s", 1)])
    assert batch.request.systems == [system, system, "other", "other"]
    assert batch.select([3, 0]).request.systems == ["other", system]
    text = json.dumps({**record, "width": 16, "height": 16}).encode()
    estimate = SlotEstimate(ConversationReader(WordProcessor()))(text, lambda: (16, 16))
    assert estimate == 20 + len((system or "") + "what colourred") // 4


@pytest.mark.parametrize(
    ("record", "image", "reason"),
    [
        ({"turns": [GOOD], "system": ["be", "brief"]}, None, "bad-system"),
        ({"turns": [GOOD], "system": "<image>"}, None, "bad-text"),
        ({"turns": [GOOD], "system": "\ud800"}, None, "bad-text"),
        ({"turns": [GOOD], "system": "why " * 97}, None, "too-long"),
        ({"turns": [GOOD]}, b"", "bad-image"),
        ({"turns": [GOOD]}, picture()[:60], "bad-image"),
        ({"turns": [GOOD]}, picture(form="GIF"), "bad-image"),
        ({"turns": [GOOD]}, picture(width=2000, height=1000), "bad-image"),
        ([], None, "bad-record"),
        ({"turns": ["hello"]}, None, "bad-record"),
        ({"turns": [GOOD], "tokens": "many"}, None, "bad-record"),
        ({}, None, "no-turns"),
        ({"turns": []}, None, "no-turns"),
        ({"turns": [{**GOOD, "question": " "}]}, None, "empty-question"),
        ({"turns": [{**GOOD, "answer": ""}]}, None, "empty-answer"),
        ({"turns": [{**GOOD, "answer": 7}]}, None, "empty-answer"),
        ({"turns": [{**GOOD, "question": "<image>\nwhat colour"}]}, None, "bad-text"),
        ({"turns": [{**GOOD, "answer": "<IMG_CONTEXT>"}]}, None, "bad-text"),
        ({"turns": [GOOD, {**GOOD, "answer": ""}]}, None, "empty-answer"),
        ({"turns": [{**GOOD, "relevant": [20]}]}, None, "bad-relevant"),
        ({"turns": [{**GOOD, "relevant": [-1]}]}, None, "bad-relevant"),
        ({"turns": [{**GOOD, "relevant": [True]}]}, None, "bad-relevant"),
        ({"turns": [{**GOOD, "relevant": "1 2"}]}, None, "bad-relevant"),
        ({"turns": [{**GOOD, "question": "why " * 97}]}, None, "too-long"),
    ],
)
def test_reasons(record: Any, image: bytes | None, reason: str) -> None:
    with pytest.raises(UnusableRecord) as caught:
        ConversationReader(WordProcessor(), turns="all", max_pixels=1_000_000)(raw(record, image))
    assert caught.value.reason == reason and "key" in str(caught.value)


@pytest.mark.parametrize(("image", "text", "reason"), [(None, b"{}", "no-image"), (picture(), None, "bad-record")])
def test_members_that_are_not_there(image: bytes | None, text: bytes | None, reason: str) -> None:
    with pytest.raises(UnusableRecord) as caught:
        ConversationReader(WordProcessor())(RawRecord("key", image, text))
    assert caught.value.reason == reason


@pytest.mark.parametrize(("which", "count"), [("first", 1), ("all", 3)])
def test_turns(which: Literal["first", "all"], count: int) -> None:
    assert len(ConversationReader(WordProcessor(), turns=which)(raw({"turns": [GOOD] * 3})).turns) == count


@pytest.mark.parametrize(
    ("width", "budget", "tokens"), [(16, 23, 20), (16, 22, 4), (16, 7, 4), (32, 15, 12), (32, 14, 4)]
)
def test_too_long_means_fewer_tiles_first(width: int, budget: int, tokens: int) -> None:
    # 3 words; a square makes 2 x 2 tiles and a thumbnail (20 tokens), a 2:1 image 2 and a thumbnail (12), or one (4).
    image = picture(width=width, height=16)
    found = ConversationReader(WordProcessor(), max_length=budget)(raw({"turns": [GOOD]}, image))
    assert found.grid.tokens == tokens <= budget - 3
    assert len(found.tiles) == found.grid.tiles


def test_relevant_tokens_apply_to_the_finest_grid_only() -> None:
    reader = ConversationReader(WordProcessor(), max_length=10)
    assert reader(raw({"turns": [GOOD]})).turns[0].relevant is None
    full = ConversationReader(WordProcessor())
    assert full(raw({"turns": [GOOD], "tokens": 20})).turns[0].relevant == (1, 3)
    # Counted on the grid of another model: no mistake of the record, but nothing to use either.
    elsewhere = {"turns": [{**GOOD, "relevant": [1, 300]}], "tokens": 320}
    assert full(raw(elsewhere)).turns[0].relevant is None
    with pytest.raises(UnusableRecord, match="bad-relevant"):
        full(raw({**elsewhere, "tokens": 300}))


def test_the_longest_turn_decides() -> None:
    turns = [GOOD, {**GOOD, "question": "what colour " * 4}]
    assert ConversationReader(WordProcessor(), "first", 23)(raw({"turns": turns})).grid.tokens == 20
    assert ConversationReader(WordProcessor(), "all", 23)(raw({"turns": turns})).grid.tokens == 4
