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

from pgp_lightning.data import conversation
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.data.rejects import DAMAGED
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


def part(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


def said(question: Any, answer: Any = "A cat.", role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: "user", content: question}, {role: "assistant", content: answer}]


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
    ("unknown-layout", {"image": "one.png"}),
    ("unknown-layout", {}),
    ("unknown-layout", {"text": "A caption.", "image": "one.png"}),
    ("unknown-layout", {"instruction": "What?", "input": "", "output": "A cat.", "image": "one.png"}),
    ("unknown-layout", {"messages": turns(), "conversations": turns(), "image": "one.png"}),
    ("unknown-layout", raw(audio="a.wav")),
    ("unknown-layout", raw(conversations=turns([{"type": "audio", "audio": "a.wav"}]))),
    ("unknown-layout", raw(conversations=turns([3]))),
    ("unknown-layout", {"query": "What?", "response": "A cat.", "history": "none", "image": "one.png"}),
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
    ("text-only", raw(image=None, conversations=turns("What?"))),
    ("text-only", raw(image="", conversations=turns("What?"))),
    ("text-only", raw(image=[], images=[], conversations=turns("What?"))),
    ("text-only", {"id": "a.png", "conversations": turns("Is <img src=a> a tag?")}),
    ("image-not-named", {"conversations": turns()}),
    ("image-not-named", raw(image=None)),
    ("image-not-named", raw(image=None, conversations=[*turns("Hi"), *turns("<|image_pad|>?")])),
    ("image-not-named", {"image_path": "one.png", "conversations": turns("What?")}),
    ("image-not-named", {"pictures": ["one.JPG"], "question": "What?", "answer": "A cat."}),
    ("image-not-named", {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                                      {"role": "assistant", "content": "A cat."}]}),
    ("image-no-file", raw(image="https://example.org/one.png")),
    ("image-no-file", raw(image="data:image/png;base64,iVBORw0KGgo=")),
    ("image-no-file", raw(image=None, images=[{"bytes": "iVBORw0KGgo=", "path": None}])),
    ("several-images", raw(images=["two.png"])),
    ("several-images", raw(image=None, conversations=turns("<img>one.png</img><img>two.png</img>?"))),
    ("video", raw(image=None, videos=["one.mp4"])),
    ("video", raw(image=None, conversations=turns([{"type": "video", "video": "one.mp4"}]))),
    ("bad-turns", raw(system="Be brief.", conversations=[{"from": "system", "value": "Be long."}, *turns()])),
    ("bad-turns", raw(system=["Be brief."])),
    ("bad-turns", raw(conversations=[{"from": "system"}, *turns()])),
    ("bad-turns", raw(conversations=[*turns(), {"from": "function_call", "value": "x"}, GPT])),
    ("several-images", raw(image=["one.png", "one.png"])),
    ("several-images", raw(image=["one.png", "one.png"], conversations=turns("1: <image>\n2: <image>\nWhich?"))),
    ("several-images", {"messages": said([part("image", image="one.png")] * 2), "images": ["one.png"]}),
    ("several-images", {"messages": said([part("image", image="one.png")]), "images": ["two.png"]}),
    ("several-images", {"messages": said([part("image", image="one.png")] * 2)}),
    ("unknown-layout", raw(question="What?", answer="A cat.")),
    ("unknown-layout", {"image": "one.png", "question": "?", "answer": "A", "query": "?", "response": "A"}),
    ("unknown-layout", raw(conversations=[{"from": "human", "role": "assistant", "value": "What?"}, GPT])),
    ("empty-answer", {"image": "one.png", "question": "What?", "answer": None}),
    ("no-conversation", {"image": "one.png", "messages": None, "question": "What?"}),
    ("video", {"video": "one.mp4", "conversations": turns()}),
    ("missing-image", raw(image="two.png")),
    ("missing-image", raw(image=".")),
    ("missing-image", raw(image=3)),
    ("missing-image", raw(image="x" * 5000)),
    ("bad-boxes", raw(bbox=[1, 2, 3])),
    ("bad-boxes", raw(bbox=[8, 2, 3, 4])),
    ("bad-boxes", raw(bbox=[20, 20, 30, 30])),
    ("bad-boxes", raw(bbox=[1, 2, 3, float("nan")])),
    ("bad-boxes", raw(bbox=[1, 2, 10**400, 4])),
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


WHAT = [part("text", text="What?")]
LAYOUTS: dict[str, dict[str, Any]] = {
    "LLaVA": {"image": "one.png", "conversations": turns("<image>\nWhat?", "A cat.")},
    "a list of one": {"image": ["one.png"], "conversations": turns("What?\n<image>", "A cat.")},
    "ShareGPT": {
        "images": "one.png",
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "chatgpt", "value": "A cat."}],
    },
    "ms-swift": {"messages": said("<image>What?"), "images": ["one.png"]},
    "ms-swift with dicts": {"messages": said("<image>What?"), "images": [{"path": "one.png", "bytes": None}]},
    "LLaMA-Factory": {"conversations": said("<image>What?", role="from", content="value"), "images": ["one.png"]},
    "image and images": {"image": "one.png", "images": ["one.png"], "messages": said("What?")},
    "TRL": {"messages": said([part("image"), *WHAT], [part("text", text="A cat.")]), "images": ["one.png"]},
    "parts that name it": {"messages": said([part("image", image="one.png"), *WHAT])},
    "parts with a path": {"messages": said([part("image", path="one.png"), *WHAT])},
    "OpenAI": {"messages": said([*WHAT, part("image_url", image_url={"url": "one.png"})])},
    "Qwen": {"conversations": said([{"image": "file://IMAGES/a%20b.png"}, {"text": "What?"}], "A cat.")},
    "Qwen-VL": {"conversations": said("Picture 1: <img>one.png</img>\nWhat?", role="from", content="value")},
    "Visual CoT": {"image": "one.png", "question": "What?", "answer": "A cat."},
    "query": {"images": ["one.png"], "query": "<image>What?", "response": "A cat."},
    "nulls beside a pair": {"image": "one.png", "conversations": None, "messages": None, "query": None, "history": None,
                            "question": "What?", "answer": "A cat."},
    "nulls in a pair": {"image": "one.png", "question": None, "answer": None, "query": "What?", "response": "A cat."},
    "nulls beside turns": {"image": "one.png", "images": None, "messages": None, "question": None, "answer": None,
                           "system": None, "conversations": turns("What?", "A cat.")},
    "nulls in turns": {"image": "one.png", "messages": [
        {"from": None, "value": None, "role": "user", "content": "What?"},
        {"from": "gpt", "value": "A cat.", "role": None, "content": None}]},
    "nulls in parts": {"messages": said([{"type": "image", "text": None, "image": None, "path": "one.png"},
                                         {"image": None, "type": None, "text": "What?"}])},
    "a part and a name": {"messages": said([part("image", image="one.png"), *WHAT]), "images": ["one.png"]},
    "the same under all keys": {"messages": said([part("image", image="one.png"), *WHAT]), "images": ["one.png"],
                                "image": "one.png"},
    "an empty system text": {"image": "one.png", "conversations": turns("What?", "A cat."), "system": ""},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_common_layouts_are_one_record(tmp_path: Path, layout: str) -> None:
    options = write_raw(tmp_path, [], {"a b.png": picture()})
    text = json.dumps(LAYOUTS[layout]).replace("IMAGES", options["images"])
    builder = build(tmp_path, text.encode())
    record = {"width": 16, "height": 16, "turns": [{"question": "What?", "answer": "A cat."}]}
    assert builder[0][1:] == (picture(), "png", record)


def test_system_texts_and_histories_of_other_layouts(tmp_path: Path) -> None:
    system = {"role": "system", "content": [part("text", text="Be "), part("text", text="brief.")]}
    image = {"images": ["one.png"]}
    builder = build(
        tmp_path,
        {"messages": [system, *said("<image>What?"), *said("Why?", "So.")], **image},
        {"query": "Why?", "response": "So.", "history": [["<image>What?", "A cat."]], "system": "Be brief.", **image},
        {"conversations": turns("<image>What?", "A cat."), "system": "", **image},
        {"messages": [system, *said("<image>What?")], "system": "", **image},
        {"conversations": [{"from": "system", "value": ""}, *turns("<image>What?", "A cat.")], "system": "", **image},
    )
    two = [{"question": "What?", "answer": "A cat."}, {"question": "Why?", "answer": "So."}]
    found = [builder[number][3] for number in range(5)]
    assert [record.get("system") for record in found] == ["Be brief.", "Be brief.", None, "Be brief.", ""]
    assert [record["turns"] for record in found] == [two, two, *[two[:1]] * 3]


def test_boxes_of_turns_in_any_layout(tmp_path: Path) -> None:
    messages = said("<image>Where?")
    messages[0]["bbox"] = [4, 0, 8, 16]
    assert build(tmp_path, {"messages": messages, "images": ["one.png"]})[0][3]["turns"][0]["boxes"] == [
        [0.25, 0, 0.5, 1]
    ]


def test_a_reject_leads_to_the_record(tmp_path: Path) -> None:
    lines = [b"", json.dumps(raw()).encode(), b" ", b"{", json.dumps(raw(id="x", image="none.png")).encode()]
    torn = json.dumps(raw(id=8, image="torn.png")).encode()
    builder = InstructionRecords(**write_raw(tmp_path, [*lines, torn], {"torn.png": b"GIF8 no image"}))
    reports = []
    for folder in ("one", "two"):
        write_source(tmp_path / folder / "a", builder, 2, progress=False)
        reports.append((tmp_path / folder / "a" / "rejected.jsonl").read_text())
    assert reports[0] == reports[1] and "0x" not in reports[0] and " object at" not in reports[0]
    found = [json.loads(line) for line in reports[0].splitlines()]
    file = str(tmp_path / "notes.jsonl")
    told = [{key: line.get(key) for key in ("record", "reason", "file", "line", "id", "image")} for line in found]
    assert told == [
        {"record": 1, "reason": "bad-json", "file": file, "line": 4, "id": None, "image": None},
        {"record": 2, "reason": "missing-image", "file": file, "line": 5, "id": "x", "image": "none.png"},
        {"record": 3, "reason": "bad-image", "file": file, "line": 6, "id": "8", "image": "torn.png"},
    ]
    assert found[1]["detail"] == f"{tmp_path / 'images' / 'none.png'}: No such file or directory"
    assert (
        UnusableRecord("a", "<_io.BytesIO object at 0x7f00> and <b at 0xAf>").detail == "<_io.BytesIO object> and <b>"
    )


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


@pytest.mark.parametrize("width", [1 << 31, 10**400, 0, True, None])
def test_a_size_that_no_image_has_is_not_what_boxes_count(tmp_path: Path, width: Any) -> None:
    assert build(tmp_path, raw(width=width, height=32, bbox=[0, 0, 8, 8]))[0][3]["boxes"] == [[0, 0, 0.5, 0.5]]


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


def test_every_reason_is_in_the_list_of_troubles() -> None:
    text = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    built, read = (
        text.split(f"### Records that are rejected while shards are {when}")[1] for when in ("built", "read")
    )
    reasons = {reason for reason, _ in REFUSED} | {"record-too-large", "unsafe-path", "bad-image", "image-too-large"}
    listed = [line.split(":")[0] for line in (conversation.__doc__ or "").splitlines() if line.startswith("- ")]
    assert reasons == named(built) == {*InstructionRecords.reasons}
    assert set(re.findall(r"`([a-z-]+)`", " ".join(listed))) | {DAMAGED} == named(read)


def named(text: str) -> set[str]:
    """Return the reasons in the first column of a section's table."""
    rows = [line.split("|")[1] for line in text.split("\n###")[0].splitlines() if line.startswith("| `")]
    return {reason for row in rows for reason in re.findall(r"`([a-z-]+)`", row)}


def test_every_reason_is_in_the_readme() -> None:
    text = (Path(__file__).parents[3] / "data_manifests" / "README.md").read_text(encoding="utf-8")
    table = text.split("| reason | the raw record |")[1].split("\n## ")[0]
    reasons = {reason for reason, _ in REFUSED} | {"record-too-large", "unsafe-path", "bad-image", "image-too-large"}
    assert reasons == set(re.findall(r"`([a-z]+-[a-z-]+|video)`(?=[,| ])", table))
