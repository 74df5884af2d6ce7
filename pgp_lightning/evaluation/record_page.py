"""Single records of shards, to look at: in the terminal, and on a page with pictures and boxes.

Records are shown as they lie in the shards, those that cannot be used too, with the reason. They come from elsewhere:
nothing in them is taken for markup, and characters that would steer a terminal are replaced.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

from pgp_lightning.data.conversation import ConversationReader, open_image, read_system, read_turns, stated_size
from pgp_lightning.data.index import Index
from pgp_lightning.data.manifest import Source
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.curve import COLOURS
from pgp_lightning.evaluation.html_page import html_page, printable
from pgp_lightning.vlm.tiles import as_rgb

__all__ = ["ShownRecord", "choose_records", "print_records", "records_page", "show_record"]

SIDE = 448  # longer side of a picture at most, in pixels
SHORT = 300  # characters of a text, unless all are wanted
Box = tuple[float, float, float, float]
Place = tuple[int, int, int]  # source, shard, record


@dataclass(frozen=True)
class ShownTurn:
    """A question, its answer, its valid boxes in fractions of the image, and notes about both."""

    question: str
    answer: str
    boxes: tuple[Box, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class ShownRecord:
    """What is shown of a record.

    Args:
        source: its source's name.
        key: its key.
        facts: size of the image and the like.
        turns: its turns, none if it cannot be read.
        problem: why it cannot be used; empty if nothing was found.
        raw: the beginning of its JSON, if its turns cannot be shown.
        picture: RGB, at most 448 pixels long; None if the image cannot be decoded.
        boxes: its own valid boxes, in fractions of the image.
        system: its own system text; None if it has none.
    """

    source: str
    key: str
    facts: str
    turns: tuple[ShownTurn, ...] = ()
    problem: str = ""
    raw: str = ""
    picture: Image.Image | None = field(default=None, repr=False)
    boxes: tuple[Box, ...] = ()
    system: str | None = None


def choose_records(
    sources: Sequence[Source], indices: Sequence[Index], reader: ShardReader, count: int, seed: int, key: str | None
) -> list[Place]:
    """Return the places of some records drawn at random, in the order of the shards, or of those with a key.

    Raises:
        ConfigError: if no record has the key.
        DataError: if a shard is not as its index promises.
    """
    shards = [(s, n, shard) for s, index in enumerate(indices) for n, shard in enumerate(index.shards)]
    if key is not None:
        found = [
            (s, n, i) for s, n, shard in shards for i in range(shard.samples) if reader.describe(shard, i)[0] == key
        ]
        if not found:
            names = ", ".join(source.name for source in sources)
            raise ConfigError(f"no record has the key {key!r} in {names}: keys are names of files up to the first dot")
        return found
    ends = np.cumsum([shard.samples for _, _, shard in shards])
    total = int(ends[-1])
    drawn = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    at = np.searchsorted(ends, drawn, side="right").tolist()
    return [
        (*shards[n][:2], int(place) - int(ends[n]) + shards[n][2].samples)
        for n, place in zip(at, drawn.tolist(), strict=True)
    ]


def show_record(
    source: Source, raw: RawRecord, usable: ConversationReader | None = None, full: bool = False
) -> ShownRecord:
    """Return what is shown of a record; nothing that may be wrong with it is an error.

    Args:
        source: where it comes from.
        raw: the record.
        usable: says whether a model can use it; without it, only what the record itself tells is checked.
        full: keep texts whole, in place of their first 300 characters.
    """
    picture, facts, problem = _picture(raw)
    record: dict[str, Any] = {}
    turns: tuple[ShownTurn, ...] = ()
    system: str | None = None
    try:
        record, checked = read_turns(raw, "all")
        system = read_system(raw.key, record)
        shown = zip(checked, record["turns"], strict=True)
        turns = tuple(
            ShownTurn(
                _shortened(turn.question, full),
                _shortened(turn.answer, full),
                _boxes(value)[0],
                _notes(value, record, None if turn.relevant is None else len(turn.relevant)),
            )
            for turn, value in shown
        )
    except UnusableRecord as error:
        problem = problem or str(error)
    if usable is not None:
        try:
            grid = usable(raw, source.max_tiles).grid
            facts.append(f"{grid.columns} × {grid.rows} tiles{' and a thumbnail' if grid.thumbnail else ''}")
            facts.append(f"{grid.tokens} visual tokens")
        except UnusableRecord as error:
            problem = str(error)
    stated = stated_size(record)
    if stated and picture and stated != (picture.info["width"], picture.info["height"]):
        facts.append(f"the record states {stated[0]} × {stated[1]}")
    if notes := _notes({"boxes": record.get("boxes")}, record, None):
        facts.append(notes)
    text = "" if turns else _shortened((raw.text or b"").decode("utf-8", "replace"), full)
    return ShownRecord(
        source.name,
        printable(raw.key),
        ", ".join(facts),
        turns,
        printable(problem),
        text,
        picture,
        _boxes(record)[0],
        None if system is None else _shortened(system, full),
    )


def _picture(raw: RawRecord) -> tuple[Image.Image | None, list[str], str]:
    """Return a record's picture made small, what is known of it, and why there is none."""
    if raw.image is None:
        return None, [], f"no-image: {raw.key} has no image"
    size = f"{len(raw.image):,} bytes"
    try:
        image = open_image(raw.key, raw.image)
        width, height = image.size
        small = as_rgb(image)
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    except UnusableRecord as error:
        return None, [size], str(error)
    except Exception as error:  # what decoders raise for hostile bytes is not a closed list
        return None, [size], f"bad-image: {type(error).__name__}: {error}"
    small.info = {"width": width, "height": height}
    return small, [f"{width} × {height} {image.format}", size], ""


def _boxes(value: dict[str, Any]) -> tuple[tuple[Box, ...], int]:
    """Return the boxes of a record or a turn that are some, and the number of those that are none."""
    found = value.get("boxes")
    boxes = found if isinstance(found, list) else [] if found is None else [found]
    good = tuple(tuple(map(float, box)) for box in boxes if _is_box(box))
    return good, len(boxes) - len(good)  # type: ignore[return-value]


def _is_box(box: object) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    if not numbers or not isinstance(box, list) or not all(math.isfinite(x) and 0 <= x <= 1 for x in box):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])


def _notes(value: dict[str, Any], record: dict[str, Any], relevant: int | None) -> str:
    """Say how many boxes and relevant tokens there are."""
    boxes, bad = _boxes(value)
    notes = [f"{len(boxes)} box{'es' * (len(boxes) > 1)}"] if boxes else []
    notes += [f"{bad} box{'es that are' if bad > 1 else ' that is'} none"] if bad else []
    if relevant is not None:
        notes.append(f"{relevant} relevant tokens" + (f" of {record['tokens']}" if "tokens" in record else ""))
    return ", ".join(notes)


def _shortened(text: str, full: bool) -> str:
    text = printable(text)
    return text if full or len(text) <= SHORT else f"{text[:SHORT]}… ({len(text):,} characters)"


def print_records(records: Sequence[ShownRecord]) -> None:
    """Print records to standard output, problems in red if that is a terminal."""
    console = Console(highlight=False, soft_wrap=True)
    for record in records:
        console.print(Text(f"{record.source}/{record.key}", style="bold"), Text(record.facts))
        if record.problem:
            console.print(Text(f"  cannot be used: {record.problem}", style="red"))
        if record.raw:
            console.print(Text(f"  {record.raw}"))
        if record.system is not None:
            console.print(Text(f"  system {_indented(record.system)}"))
        for number, turn in enumerate(record.turns, 1):
            for mark, text in (("Q", turn.question), ("A", turn.answer)):
                console.print(Text(f"  {number:>3} {mark} {_indented(text)}"))
            if turn.notes:
                console.print(Text(f"        {turn.notes}"))
        console.print()


def _indented(text: str) -> str:
    return text.replace("\n", "\n        ")


def records_page(title: str, records: Sequence[ShownRecord]) -> str:
    """Return an HTML file with the records, their pictures in it."""
    title = printable(title)
    articles = "\n".join(f'<article class="sheet">{"".join(_article(record))}</article>' for record in records)
    return html_page(title, f"<h1>{escape(title)}</h1>\n{articles}")


def _article(record: ShownRecord) -> Iterator[str]:
    if record.picture is not None:
        out = io.BytesIO()
        _with_boxes(record).save(out, "JPEG", quality=88)
        data = base64.b64encode(out.getvalue()).decode()
        width, height = record.picture.size
        yield (
            f'<img width="{width}" height="{height}" alt="{escape(record.key)}" src="data:image/jpeg;base64,{data}">'
        )
    yield f'<div class="turns"><h2>{escape(record.key)}</h2>'
    yield f'<p class="notes">{escape(record.source)}: {escape(record.facts)}</p>'
    if record.problem:
        yield f'<p class="bad">cannot be used: {escape(record.problem)}</p>'
    if record.raw:
        yield f"<pre>{escape(record.raw)}</pre>"
    if record.system is not None:
        yield f'<p class="notes">system: {escape(record.system)}</p>'
    yield "<dl>"
    for number, turn in enumerate(record.turns, 1):
        notes = f'<dd class="notes">{escape(turn.notes)}</dd>' if turn.notes else ""
        yield f"<dt>{number}. {escape(turn.question)}</dt><dd>{escape(turn.answer)}</dd>{notes}"
    yield "</dl></div>"


def _with_boxes(record: ShownRecord) -> Image.Image:
    """Return a record's picture with its boxes: the record's own in black and white, a turn's in its colour."""
    assert record.picture is not None
    drawn = record.picture.copy()
    draw = ImageDraw.Draw(drawn)
    groups = [("", "#000000", record.boxes)]
    groups += [(str(n), COLOURS[(n - 1) % len(COLOURS)], turn.boxes) for n, turn in enumerate(record.turns, 1)]
    for label, colour, boxes in groups:
        for left, top, right, bottom in boxes:
            x, y = left * (drawn.width - 1), top * (drawn.height - 1)
            frame = (x, y, max(x, right * (drawn.width - 1)), max(y, bottom * (drawn.height - 1)))
            draw.rectangle(frame, outline="white", width=4)
            draw.rectangle(frame, outline=colour, width=2)
            if label:
                place = draw.textbbox((x + 5, y + 3), label, font_size=13)
                draw.rectangle((place[0] - 3, place[1] - 2, place[2] + 3, place[3] + 2), fill=colour)
                draw.text((x + 5, y + 3), label, fill="white", font_size=13)
    return drawn
