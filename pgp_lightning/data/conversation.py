"""One record -> a checked conversation: question turns about one tiled image.

A record that cannot be used raises `UnusableRecord` with a short stable reason, which training counts per source:

- `no-image`: the record has no image;
- `bad-image`: the image does not decode, is of another format, or has too many pixels;
- `bad-record`: the JSON is missing or is no record;
- `no-turns`: there is no question turn;
- `empty-question`, `empty-answer`: a turn lacks its text;
- `bad-system`: `system` is no text;
- `bad-text`: a text holds a placeholder of images, which models would take for one, or half a surrogate pair, which
  tokenizers refuse;
- `bad-relevant`: `relevant` is no list of visual token indices of the image;
- `too-long`: a turn does not fit the length budget even with a single tile.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from pgp_lightning.data.machine_faults import refuse_lack_of_memory
from pgp_lightning.data.records import RawRecord, UnusableRecord, parse_text
from pgp_lightning.vlm.tiles import Empty, TileGrid, TileRule, cut_tiles, new_tiles

__all__ = [
    "Conversation",
    "ConversationReader",
    "Processor",
    "Turn",
    "limited_rule",
    "open_image",
    "read_system",
    "read_turns",
    "stated_size",
]

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")
# An image is a field of the record; these would become slots of images that are not there.
_PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>")


class Processor(Protocol):
    """What data needs to know of a model: how it tiles, how long its prompts are; picklable for worker processes."""

    @property
    def rule(self) -> TileRule:
        """How the model tiles images."""

    @property
    def max_length(self) -> int:
        """Longest prompt with answer, in slots."""

    def prompt_length(self, question: str, answer: str, visual_tokens: int, system: str | None = None) -> int:
        """Return the number of slots of a prompt with its answer, with another system text if one is given."""

    def fits(self, question: str, answer: str, visual_tokens: int, budget: int, system: str | None = None) -> bool:
        """Say whether a prompt with its answer takes at most so many slots."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `relevant` are the indices of the visual tokens that matter, where they are known."""

    question: str
    answer: str
    relevant: tuple[int, ...] | None = None
    type: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns about one image; tiles are uint8 (T, 3, S, S), thumbnail last.

    `system` takes the place of the chat format's own system text, an empty one of its whole system block; None leaves
    it.
    """

    key: str
    turns: tuple[Turn, ...]
    tiles: np.ndarray
    grid: TileGrid
    system: str | None = None


@dataclass(frozen=True)
class ConversationReader:
    """Turns a raw record into a conversation.

    An image that makes a turn too long is tiled more coarsely, down to one tile, before the record is given up; it
    is never cut. `relevant` counts the tokens of the finest tiling, which the record may state as `tokens`: on any
    other grid, because fewer tiles had to do or because this model tiles otherwise, it does not apply and is dropped.
    The turns of a record stand or fall together; turns that are not used are not checked.

    Args:
        processor: the model's tile rule and prompt lengths.
        turns: use the first question turn of a record, or all.
        max_length: length budget in prompt slots; by default the processor's.
        max_tiles: greatest number of tiles of an image, the thumbnail apart; by default, and at most, the processor's.
        max_pixels: largest image that is decoded.
    """

    processor: Processor
    turns: Literal["first", "all"] = "first"
    max_length: int | None = None
    max_tiles: int | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: RawRecord, max_tiles: int | None = None, empty: Empty = new_tiles) -> Conversation:
        """Read, check and tile a record.

        Args:
            raw: the record.
            max_tiles: its source's greatest number of tiles, which takes the place of the reader's own.
            empty: makes the array that the tiles are written to.

        Raises:
            UnusableRecord: if it cannot be used.
        """
        if raw.image is None:
            raise UnusableRecord("no-image", f"{raw.key} has no image")
        record, turns = read_turns(raw, self.turns)
        system = read_system(raw.key, record)
        image = self.open_image(raw.key, raw.image)
        rule = self.rule(max_tiles)
        try:
            finest = rule.grid(*image.size)
        except ValueError as error:
            raise UnusableRecord("bad-image", f"{raw.key}: {error}") from error
        for turn in turns:
            if turn.relevant is not None and max(turn.relevant, default=0) >= record.get("tokens", finest.tokens):
                raise UnusableRecord("bad-relevant", f"{raw.key}: an index exceeds the image's visual tokens")
        limit = self._tile_limit(raw.key, turns, system, rule, *image.size)
        try:
            tiles, grid = cut_tiles(image, self.processor.rule, limit, empty)
        except _IMAGE_ERRORS as error:
            refuse_lack_of_memory(error)
            raise UnusableRecord("bad-image", f"{raw.key}: {error}") from error
        if grid != finest or record.get("tokens", grid.tokens) != grid.tokens:
            turns = tuple(replace(turn, relevant=None) for turn in turns)
        return Conversation(raw.key, turns, tiles, grid, system)

    def rule(self, max_tiles: int | None = None) -> TileRule:
        """Return how images of a source are tiled at the finest."""
        return limited_rule(self.processor.rule, self.max_tiles if max_tiles is None else max_tiles)

    @property
    def budget(self) -> int:
        """Longest prompt with answer, in slots."""
        return self.processor.max_length if self.max_length is None else self.max_length

    def open_image(self, key: str, data: bytes) -> Image.Image:
        """Open an image without decoding its pixels yet.

        Raises:
            UnusableRecord: if it is no image, or too large.
        """
        return open_image(key, data, self.max_pixels)

    def _tile_limit(
        self, key: str, turns: tuple[Turn, ...], system: str | None, rule: TileRule, width: int, height: int
    ) -> int:
        """Return the greatest number of tiles with which every turn fits the length budget."""
        model, budget, limit, visual = self.processor, self.budget, rule.max_tiles, 0
        while limit >= 1:
            grid = limited_rule(rule, limit).grid(width, height)
            visual = grid.tokens
            if all(model.fits(turn.question, turn.answer, visual, budget, system) for turn in turns):
                return limit
            limit = min(limit, grid.columns * grid.rows) - 1
        length = max(model.prompt_length(turn.question, turn.answer, visual, system) for turn in turns)
        raise UnusableRecord("too-long", f"{key}: {length} slots with one tile, the budget is {budget}")


# What PIL raises for input that is no image, for a damaged one, and for one that is too large to be honest.
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(key: str, data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image of a record without decoding its pixels yet.

    Raises:
        UnusableRecord: if it is no image, or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise UnusableRecord("bad-image", f"{key}: {len(data)} bytes that are no {', '.join(_FORMATS)}") from error
    except _IMAGE_ERRORS as error:
        refuse_lack_of_memory(error)
        raise UnusableRecord("bad-image", f"{key}: {error}") from error
    if image.width * image.height > max_pixels:
        raise UnusableRecord("bad-image", f"{key}: {image.size} is more than {max_pixels} pixels")
    return image


def read_turns(raw: RawRecord, which: Literal["first", "all"]) -> tuple[dict[str, Any], tuple[Turn, ...]]:
    """Parse a record and check its first turn, or all; its image is not looked at.

    Returns:
        The record's JSON object, and the turns.

    Raises:
        UnusableRecord: if it is no record, or a turn is none.
    """
    record = _parse(raw)
    return record, tuple(_turn(raw.key, value) for value in _selected(raw.key, record, which))


def read_system(key: str, record: Mapping[str, Any]) -> str | None:
    """Return a record's own system text, None if it has none.

    Raises:
        UnusableRecord: if it is no text, or one that a model cannot be given.
    """
    text = record.get("system")
    if text is None:
        return None
    if not isinstance(text, str):
        raise UnusableRecord("bad-system", f"{key}: expected a text, got {text!r:.80}")
    _check_text(key, "system text", text)
    return text


def stated_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the width and height in pixels that a record states, None if it does not, or no image can be so large."""
    size = record.get("width"), record.get("height")
    if all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 31 for side in size):
        return size  # type: ignore[return-value]
    return None


def limited_rule(rule: TileRule, most: int | None) -> TileRule:
    """Return a rule with at most so many tiles, the thumbnail apart; None leaves it as it is."""
    if most is None or most >= rule.max_tiles:
        return rule
    return replace(rule, min_tiles=min(rule.min_tiles, most), max_tiles=most)


def _parse(raw: RawRecord) -> dict[str, Any]:
    """Return a record's JSON object."""
    try:
        record = parse_text(raw.text)
    except ValueError as error:
        raise UnusableRecord("bad-record", f"{raw.key}: {error}") from error
    if not isinstance(record, dict):
        raise UnusableRecord("bad-record", f"{raw.key}: expected an object, got {type(record).__name__}")
    if "tokens" in record and not _is_index(record["tokens"]):
        raise UnusableRecord("bad-record", f"{raw.key}: tokens must be a count, got {record['tokens']!r}")
    return record


def _selected(key: str, record: dict[str, Any], which: Literal["first", "all"]) -> list[Any]:
    """Return the turns to use."""
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UnusableRecord("no-turns", f"{key} has no question turn")
    return turns[:1] if which == "first" else turns


def _turn(key: str, value: object) -> Turn:
    """Check one turn."""
    if not isinstance(value, dict):
        raise UnusableRecord("bad-record", f"{key}: expected a turn, got {type(value).__name__}")
    texts = {}
    for name in ("question", "answer"):
        text = value.get(name)
        if not isinstance(text, str) or not text.strip():
            raise UnusableRecord(f"empty-{name}", f"{key}: expected a text, got {text!r}")
        _check_text(key, name, text)
        texts[name] = text
    relevant = value.get("relevant")
    if relevant is not None:
        if not isinstance(relevant, list) or not all(_is_index(index) for index in relevant):
            raise UnusableRecord("bad-relevant", f"{key}: expected a list of token indices")
        relevant = tuple(sorted(set(relevant)))
    kind = str(value.get("type", ""))
    _check_unicode(key, "type", kind)
    return Turn(**texts, relevant=relevant, type=kind)


def _check_text(key: str, name: str, text: str) -> None:
    if found := next((mark for mark in _PLACEHOLDERS if mark in text), None):
        raise UnusableRecord("bad-text", f"{key}: the {name} holds {found!r}")
    _check_unicode(key, name, text)


def _check_unicode(key: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("bad-text", f"{key}: the {name} holds half a surrogate pair") from error


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
