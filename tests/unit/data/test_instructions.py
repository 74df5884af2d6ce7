"""Instruction data as upstream publishes it: what becomes a record, what is refused and under which reason."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from data_world import WordProcessor, picture
from raw_world import raw, turns, write_raw

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.data.shards import verify_source
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError


def build(folder: Path, *lines: Any, **options: Any) -> InstructionRecords:
    return InstructionRecords(**write_raw(folder, lines), **options)


def refused(builder: InstructionRecords, number: int = 0) -> str:
    """Return the reason for which a record is refused."""
    with pytest.raises(UnusableRecord) as caught:
        builder[number]
    assert caught.value.detail and caught.value.key == f"notes-{number:08d}"
    return caught.value.reason


def test_a_record_of_two_turns(tmp_path: Path) -> None:
    more = [{"from": "user", "value": "And\nhere? "}, {"from": "assistant", "value": " nothing\n"}]
    system = {"from": "system", "value": "Be brief."}
    builder = build(tmp_path, raw(conversations=[system, *turns("Wo?\n<image>", "hier: ö"), *more], width=3, height=4))
    key, image, extension, record = builder[0]
    assert (key, image, extension) == ("notes-00000000", picture(), "png")
    assert record == {
        "id": "7",
        "width": 16,
        "height": 16,
        "system": "Be brief.",
        "turns": [{"question": "Wo?", "answer": "hier: ö"}, {"question": "And\nhere? ", "answer": " nothing\n"}],
    }
    found = ConversationReader(WordProcessor(), turns="all")(RawRecord(key, image, json.dumps(record).encode()))
    assert [turn.question for turn in found.turns] == ["Wo?", "And\nhere? "]
    with pytest.raises(IndexError):
        builder[1]


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("What?<image>", "What?"),
        ("What? ", "What? "),
        ("See <image>: what?", "See : what?"),
    ],
)
def test_the_placeholder_is_taken_out_of_the_first_question(tmp_path: Path, question: str, kept: str) -> None:
    assert build(tmp_path, raw(conversations=turns(question)))[0][3]["turns"][0]["question"] == kept


GPT, HUMAN = {"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}
REFUSED: list[tuple[str, Any]] = [
    ("bad-json", b"{"),
    ("bad-json", b"1"),
    ("bad-json", b'"text"'),
    ("bad-json", b'{"id": ' + b"1" * 5000 + b"}"),
    ("bad-json", b'{"image": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    ("bad-json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ("bad-encoding", b'{"image": "\xff"}'),
    ("bad-encoding", b'{"image": "one.png", "conversations": [{"from": "human", "value": "\\ud800"}, '
     b'{"from": "gpt", "value": "x"}]}'),
    ("no-conversation", raw(conversations=None)),
    ("no-conversation", raw(conversations=[])),
    ("no-conversation", raw(conversations="hello")),
    ("no-conversation", {"image": "one.png"}),
    ("bad-turns", raw(conversations=[HUMAN])),
    ("bad-turns", raw(conversations=[GPT, HUMAN])),
    ("bad-turns", raw(conversations=[*turns(), HUMAN])),
    ("bad-turns", raw(conversations=[HUMAN, HUMAN, GPT, GPT])),
    ("bad-turns", raw(conversations=[*turns(), {"from": "system", "value": "x"}])),
    ("bad-turns", raw(conversations=[{"from": "system", "value": "x"}])),
    ("bad-turns", raw(conversations=[{"from": "system", "value": 1}, *turns()])),
    ("bad-turns", raw(conversations=[{"from": "function", "value": "x"}, GPT])),
    ("bad-turns", raw(conversations=["hello", "you"])),
    ("bad-turns", raw(conversations=[{"value": "x"}, GPT])),
    ("empty-question", raw(conversations=turns(" <image>\n "))),
    ("empty-question", raw(conversations=turns(3))),
    ("empty-question", raw(conversations=[{"from": "human"}, GPT])),
    ("empty-answer", raw(conversations=turns(answer=""))),
    ("empty-answer", raw(conversations=turns(answer=None))),
    ("bad-text", raw(conversations=turns("<image><image> which?"))),
    ("bad-text", raw(conversations=[*turns(), *turns("<image> and here?")])),
    ("bad-text", raw(conversations=turns(answer="<image>"))),
    ("bad-text", raw(conversations=turns("what is <IMG_CONTEXT>?"))),
    ("bad-text", raw(conversations=turns(answer="</img>"))),
    ("bad-text", raw(conversations=turns(answer="<img>"))),
    ("bad-text", raw(conversations=[{"from": "system", "value": "<image>"}, *turns()])),
    ("text-only", raw(image=None)),
    ("text-only", raw(image="")),
    ("text-only", raw(image=[])),
    ("text-only", {"conversations": turns()}),
    ("several-images", raw(image=["one.png", "one.png"])),
    ("several-images", raw(image=["one.png", "one.png"], conversations=turns("1: <image>\n2: <image>\nWhich?"))),
    ("video", {"video": "one.mp4", "conversations": turns()}),
    ("missing-image", raw(image="two.png")),
    ("missing-image", raw(image=".")),
    ("missing-image", raw(image=3)),
    ("missing-image", raw(image="x" * 5000)),
    ("bad-boxes", raw(bbox=[1, 2, 3])),
    ("bad-boxes", raw(bbox=[8, 2, 3, 4])),
    ("bad-boxes", raw(bbox=[20, 20, 30, 30])),
    ("bad-boxes", raw(bbox=[1, 2, 3, float("nan")])),
    ("bad-boxes", raw(boxes=[[1, 2, 3, 4], "5"])),
    ("bad-boxes", raw(bbox="1, 2, 3, 4")),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "line"), REFUSED, ids=[f"{n}-{reason}" for n, (reason, _) in enumerate(REFUSED)])
def test_what_is_refused(tmp_path: Path, reason: str, line: Any) -> None:
    builder = build(tmp_path, line, raw())
    assert len(builder) == 2 and refused(builder) == reason


def test_a_good_record_beside_bad_ones_is_kept_and_every_line_counted(tmp_path: Path) -> None:
    lines = [line for _, line in REFUSED]
    builder = build(tmp_path, raw(), *lines, raw(), raw())  # three times one id
    index = write_source(tmp_path / "a", builder, 8, progress=False)
    assert verify_source(tmp_path / "a") == index
    assert index.samples == 3 and index.samples + sum(index.rejected.values()) == len(lines) + 3 == len(builder)
    report = [json.loads(line) for line in (tmp_path / "a/rejected.jsonl").read_text().splitlines()]
    assert [line["record"] for line in report] == list(range(1, len(lines) + 1))
    assert [line["reason"] for line in report] == [reason for reason, _ in REFUSED]


def test_boxes_become_fractions(tmp_path: Path) -> None:
    first, second = turns(), turns("where?", "[2, 4, 8, 8]")
    first[0]["bbox"], second[1]["boxes"] = [4, 0, 8, 16], [[0, 0, 1, 1], [-5, 8, 99, 12]]
    builder = build(tmp_path, raw(conversations=[*first, *second], bboxs=[[0, 0, 8, 4]]))
    record = builder[0][3]
    assert record["boxes"] == [[0, 0, 0.5, 0.25]]
    assert record["turns"][0]["boxes"] == [[0.25, 0, 0.5, 1]]
    assert record["turns"][1]["boxes"] == [[0, 0, 0.0625, 0.0625], [0, 0.5, 1, 0.75]]
    # What upstream says of the size counts: the boxes were drawn on that.
    chain = {"image": "one.png", "question": "who?", "answer": "me", "width": 100, "height": 200}
    half = [0, 0, 0.5, 0.5]
    for boxes, box in (("pixels", [0, 0, 50, 100]), ("thousandths", [0, 0, 500, 500]), ("fractions", half)):
        record = build(tmp_path, {**chain, "bboxs": [box]}, boxes=boxes)[0][3]
        assert record["boxes"] == [half] and record["turns"] == [{"question": "who?", "answer": "me"}]
        assert "boxes" not in record["turns"][0] and (record["width"], record["height"]) == (16, 16)


def test_keys_are_made_of_file_and_position(tmp_path: Path) -> None:
    options = write_raw(tmp_path, [raw(id="../x"), raw(id={"a": 1})], name="geoqa+ (größe).jsonl")
    found = [InstructionRecords(**options)[number] for number in (0, 1)]
    assert [key for key, *_ in found] == ["geoqa---gr--e--00000000", "geoqa---gr--e--00000001"]
    assert [record.get("id") for *_, record in found] == ["../x", None]


def test_identity_follows_content_and_settings(tmp_path: Path) -> None:
    options = write_raw(tmp_path, [raw()])
    builder = InstructionRecords(**options)
    identity = builder.identity()
    assert len(builder) == 1 and builder[0] and identity == builder.identity() == json.loads(json.dumps(identity))
    assert InstructionRecords(**options, max_pixels=9).identity() != identity
    copy = pickle.loads(pickle.dumps(builder))  # as worker processes get it
    assert copy[0] == builder[0] and copy.identity() == identity
    (tmp_path / "notes.jsonl").write_text(json.dumps(raw(id=8)) + "\n")
    assert InstructionRecords(**options).identity() != identity


def test_settings_and_files_that_are_not_there(tmp_path: Path) -> None:
    options = write_raw(tmp_path, [raw()])
    for wrong in ({"boxes": "percent"}, {"max_pixels": 0}):
        with pytest.raises(ConfigError, match="must be"):
            InstructionRecords(**options, **wrong)
    for key in options:
        with pytest.raises(ConfigError, match=r"has no shards, .* missing: .*nowhere does not exist"):
            write_source(tmp_path / "a", InstructionRecords(**{**options, key: str(tmp_path / "nowhere")}))
    assert not list(tmp_path.glob(".a.*"))


def test_every_reason_is_in_the_readme() -> None:
    text = (Path(__file__).parents[3] / "data_manifests" / "README.md").read_text(encoding="utf-8")
    table = text.split("| reason | the raw record |")[1].split("\n## ")[0]
    reasons = {reason for reason, _ in REFUSED} | {"record-too-large", "unsafe-path", "bad-image", "image-too-large"}
    assert reasons == set(re.findall(r"`([a-z]+-[a-z-]+|video)`(?=[,| ])", table))
