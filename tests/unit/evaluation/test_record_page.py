"""Records to look at: whole ones, broken ones, and texts that would be markup."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.manifest import Source
from pgp_lightning.data.records import RawRecord
from pgp_lightning.evaluation.record_page import ShownRecord, print_records, records_page, show_record
from tests.html_reader import Page
from tests.tiny import tiny_processor

SOURCE = Source("charts", "train", Path("charts"), Path("m.yaml"))
EVIL = "<img src=x onerror=alert(1)>\x1b[2J & \ud800"


def png(width: int = 900, height: int = 450, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height), 0 if mode == "I;16" else (90, 160, 90)).save(out, "PNG")
    return out.getvalue()


def raw(image: bytes | None = b"", **record: Any) -> RawRecord:
    turns = [{"question": "What <b>is</b> it?", "answer": "a dot", "boxes": [[0.1, 0.2, 0.5, 0.6]], "relevant": [1, 2]}]
    return RawRecord("k-1", png() if image == b"" else image, json.dumps({"turns": turns} | record).encode())


def pictures(records: list[ShownRecord]) -> list[Image.Image]:
    """Return the pictures of the page."""
    found = [str(tag["src"]) for tag in Page(records_page("title", records)).all("img")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in found)
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in found]


def test_a_record_with_its_boxes():
    shown = show_record(SOURCE, raw(tokens=320, width=800, height=400, boxes=[[0, 0, 1, 1], [2, 0, 3, 1], "no"]))
    assert shown.facts.startswith("900 × 450 PNG, ") and "the record states 800 × 400" in shown.facts
    assert shown.facts.endswith("1 box, 2 boxes that are none") and shown.boxes == ((0, 0, 1, 1),)
    assert shown.turns[0].notes == "1 box, 2 relevant tokens of 320" and not shown.problem and not shown.raw
    (picture,) = pictures([shown])
    assert picture.size == (448, 224)
    assert sum(picture.getpixel((45, 90))[:2]) < 150 < picture.getpixel((300, 100))[1]  # type: ignore[index]
    assert picture.getpixel((0, 100))[1] < 90  # type: ignore[index]
    assert pictures([show_record(SOURCE, raw(png(40, 20)))])[0].size == (40, 20)  # never enlarged
    assert pictures([show_record(SOURCE, raw(png(600, 6, "I;16")))])[0].width == 448


def test_a_system_text_is_shown(capsys: pytest.CaptureFixture[str]):
    shown = show_record(SOURCE, raw(system="Answer in <b>French</b>,\nin capitals."))
    print_records([shown])
    assert "  system Answer in <b>French</b>,\n        in capitals.\n" in capsys.readouterr().out
    assert "system: Answer in <b>French</b>" in Page(records_page("title", [shown])).text
    without = show_record(SOURCE, raw())
    print_records([without])
    assert without.system is None and "system" not in capsys.readouterr().out
    assert show_record(SOURCE, raw(system=3)).problem.startswith("bad-system")


def test_texts_are_no_markup_and_steer_nothing(capsys: pytest.CaptureFixture[str]):
    question = EVIL.removesuffix("\ud800")  # half a pair would make the record one that cannot be used
    shown = show_record(SOURCE, raw(turns=[{"question": question, "answer": "[red]x[/red]" + "y" * 400}]))
    page = Page(records_page(EVIL, [shown]))
    assert "<img src=x onerror=alert(1)>�[2J & �" in page.text and len(page.all("img")) == 1
    assert "y… (412 characters)" in page.text
    records_page(EVIL, [shown]).encode()
    print_records([shown])
    out = capsys.readouterr().out
    assert "charts/k-1" in out and "<img src=x onerror=alert(1)>�[2J & " in out and "[red]x[/red]" in out
    assert "\x1b" not in out
    full = show_record(SOURCE, raw(turns=[{"question": "q", "answer": "y" * 400}]), full=True)
    assert full.turns[0].answer == "y" * 400


@pytest.mark.parametrize(
    ("record", "problem", "picture"),
    [
        (RawRecord("k", png(), None), "bad-record: k: Expecting value", True),
        (RawRecord("k", png(), b"<script>\xff"), "bad-record: k: ", True),
        (RawRecord("k", png(), b"[" * 100_000), "bad-record: k: ", True),
        (RawRecord("k", None, b'{"turns": []}'), "no-image: k has no image", False),
        (raw(b"no image"), "bad-image: k-1: 8 bytes that are no PNG", False),
        (raw(png()[:200]), "bad-image: ", False),
        (raw(turns=[{"question": "q", "answer": ""}]), "empty-answer: k-1: expected a text", True),
        (raw(turns=7), "no-turns: k-1 has no question turn", True),
    ],
)
def test_a_broken_record_is_shown_as_such(
    record: RawRecord, problem: str, picture: bool, capsys: pytest.CaptureFixture[str]
):
    shown = show_record(SOURCE, record)
    assert shown.problem.startswith(problem) and (shown.picture is not None) == picture
    page = Page(records_page("broken", [shown]))
    assert "cannot be used: " + shown.problem in page.text and not page.all("script")
    assert [tag for tag in page.all("p") if tag["class"] == "bad"]
    print_records([shown])
    assert f"cannot be used: {problem}" in capsys.readouterr().out


def test_with_a_base_what_it_cannot_use_is_said():
    reader = ConversationReader(tiny_processor(), turns="all")
    # Nine hundred by 450 pixels are 2 x 1 tiles and a thumbnail of four tokens each.
    assert "2 × 1 tiles and a thumbnail, 12 visual tokens" in show_record(SOURCE, raw(), reader).facts
    long = show_record(SOURCE, raw(turns=[{"question": "red " * 70, "answer": "no"}]), reader)
    assert long.problem.startswith("too-long: ") and long.turns
    wrong = show_record(SOURCE, raw(turns=[{"question": "q", "answer": "a", "relevant": [99]}]), reader)
    assert wrong.problem.startswith("bad-relevant: ")
