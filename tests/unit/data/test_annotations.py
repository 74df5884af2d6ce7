"""The one pass over an annotation file: the same records as a parser finds, in memory that does not grow with them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_world import raw, turns, write_raw

from pgp_lightning.data import annotations
from pgp_lightning.data.annotations import MAX_RECORD_BYTES, Annotations
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import DataError

TEXTS = st.text(st.sampled_from('ab"\\{}[],:\n ö\t'), max_size=12)
VALUES = st.recursive(TEXTS | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner))
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=6)


@settings(max_examples=25, deadline=None)
@given(records=RECORDS, indent=st.sampled_from([None, 1]), bom=st.booleans(), block=st.integers(1, 40))
def test_the_pass_finds_what_the_parser_finds(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], indent: int | None, bom: bool, block: int
) -> None:
    folder = tmp_path_factory.mktemp("found")
    head = b"\xef\xbb\xbf" * bom
    lines = b"".join(json.dumps(record).encode() + b"\r\n\n" for record in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "_BLOCK", block)
        for name, data in (
            ("a.json", json.dumps(records, indent=indent, ensure_ascii=False).encode()),
            ("a.jsonl", lines),
        ):
            (folder / name).write_bytes(head + data)
            found = Annotations.scan(folder / name)
            assert [found.read(number) for number in range(len(found))] == records
            assert found.sha256 == hashlib.sha256(head + data).hexdigest()


def test_a_last_line_without_an_end_and_lines_in_a_json_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_text('{"a": 1}\n\n{"a": 2}')
        found = Annotations.scan(tmp_path / name)
        assert [found.read(number) for number in range(len(found))] == [{"a": 1}, {"a": 2}]


RECORD = '{"id": %d, "conversations": [{"from": "human", "value": "%s"}, {"from": "gpt", "value": "A chair."}]}'


def listed(texts: dict[int, str], between: str = ",\n") -> str:
    """Return a list of 40 records, some of which say something else."""
    return "[" + between.join(RECORD % (number, texts.get(number, "What?")) for number in range(40)) + "]"


LISTED = listed({})
DAMAGED_LISTS: dict[str, tuple[str, int, str]] = {
    "two quotes far apart": (listed({7: 'A 12" pipe', 30: 'A 12" pipe'}), 8, "'p' outside of any text"),
    "two quotes in one record": (listed({7: 'A 12" and a 3" pipe'}), 8, "'d' outside of any text"),
    "quotes before commas": (listed({7: 'A 12", red', 30: 'A 12", red'}), 8, "'d' outside of any text"),
    "quotes at the ends": (listed({7: '12"', 30: '12"'}, ", "), 1, "'o' outside of any text"),
    "a missing quote": (LISTED.replace('"What?"', '"What?', 1), 1, "'o' outside of any text"),
    "a missing quote in each of two": (LISTED.replace('"What?"', '"What?', 2), 1, "'o' outside of any text"),
    "a bracket lost and one too many": (
        listed({7: "~", 30: "^"}).replace('~"}', '"').replace('^"', '"}'),
        8,
        "a bracket is closed that was not opened",
    ),
    "a bracket of the wrong kind": (LISTED.replace("}]}", "]}}", 1), 1, "a bracket is closed that was not opened"),
    "a missing comma": (LISTED.replace("},\n", "}\n", 1), 2, "a comma is missing between two records"),
    "a hole": (listed({7: "\0\0\0"}), 8, "zeros: this part of the file was never written"),
    "a hole between records": (LISTED.replace("},\n", "},\n\0\0\0", 1), 2, "zeros: this part of the file"),
    "a comment": (LISTED.replace("},\n", "}, // one\n", 1), 1, "'/' outside of any text"),
    "names of Python": (LISTED.replace('"What?"', "None", 1), 1, "'o' outside of any text"),
    "not closed": (LISTED[:-1], 40, "the list is not closed, 40 records"),
    "cut in a text": (LISTED[:-20], 40, "the list is not closed, 40 records"),
    "more behind it": (LISTED + "\n\n " + RECORD, 42, "something follows the list"),
    "two lists": (LISTED + LISTED, 40, "something follows the list"),
}


@pytest.mark.parametrize("case", DAMAGED_LISTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_a_damaged_list_is_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int, case: str
) -> None:
    text, line, message = DAMAGED_LISTS[case]
    monkeypatch.setattr(annotations, "_BLOCK", block)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: damaged at byte \d+, line {line}: {re.escape(message)}") as caught:
        Annotations.scan(tmp_path / name)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    if "outside" in message:  # the byte is that of the character it names
        byte = re.search(r"byte (\d+)", str(caught.value))
        assert byte and text[int(byte[1])] == message[1]


def test_a_damaged_list_of_many_records_is_no_build_with_one_reject(tmp_path: Path) -> None:
    lines = [json.dumps(raw(conversations=turns(answer="A 12_ pipe." if n in (100, 250) else "x"))) for n in range(500)]
    options = write_raw(tmp_path, [])
    file = tmp_path / "notes.json"
    file.write_text(f"[{','.join(lines)}]".replace("12_", '12"'))
    with pytest.raises(DataError, match=r"notes\.json: damaged at byte \d+, line 1: 'p' outside of any text"):
        write_source(tmp_path / "a", InstructionRecords(**{**options, "annotations": str(file)}), progress=False)
    assert not (tmp_path / "a").exists()


def test_elements_that_are_no_records_are_refused_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[1, "a,b", [2, 3], {"a": [1, 2]},\n {"a" 1},\n\n{"b": 1},]')
    found = Annotations.scan(tmp_path / "a.json")
    assert kinds(found) == ["bad-json"] * 3 + [{"a": [1, 2]}, "bad-json", {"b": 1}, "bad-json"]
    assert found.lines.tolist() == [1, 1, 1, 1, 2, 4, 4]


def kinds(found: Annotations) -> list[Any]:
    """Return every record, or the reason why it is none."""
    kept: list[Any] = []
    for number in range(len(found)):
        try:
            kept.append(found.read(number))
        except UnusableRecord as error:
            kept.append(error.reason)
    return kept


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1 << 20, 1, 4])
def test_lines_end_in_any_way_and_blank_ones_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, block: int
) -> None:
    monkeypatch.setattr(annotations, "_BLOCK", block)
    texts = ["", '{"a": 1}', " \t ", '{"a": 2}', "", "  ", '\ufeff{"a": 3}', " ", ""]
    (tmp_path / "a.jsonl").write_bytes(end.join(texts).encode())
    found = Annotations.scan(tmp_path / "a.jsonl")
    assert kinds(found) == [{"a": 1}, {"a": 2}, {"a": 3}] and found.lines.tolist() == [2, 4, 7]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_list_is_one_by_its_content(tmp_path: Path, name: str, indent: int | None) -> None:
    records = [{"a": [n]} for n in range(3)]
    (tmp_path / name).write_text("\ufeff\n " + json.dumps(records, indent=indent) + "\n \n")
    found = Annotations.scan(tmp_path / name)
    assert kinds(found) == records and found.lines.tolist() == ([2, 2, 2] if indent is None else [3, 8, 13])


LINES = b'{"a": 1}\n{"a": 2}\n'
OTHERS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(LINES), "is compressed by gzip: unpack it"),
    "truncated gzip": (gzip.compress(LINES)[:20], "is compressed by gzip: unpack it"),
    "bzip2": (bz2.compress(LINES), "is compressed by bzip2"),
    "xz": (lzma.compress(LINES), "is compressed by xz"),
    "zip": (b"PK\x03\x04...", "is a ZIP archive"),
    "parquet": (b"PAR1\x15\x04...PAR1", "is Parquet"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS"),
    "UTF-16": (LINES.decode().encode("utf-16"), "is UTF-16: write it as UTF-8"),
    "UTF-16 big": (LINES.decode().encode("utf-16-be"), "is UTF-16 or UTF-32"),
    "UTF-16 little": (LINES.decode().encode("utf-16-le"), "is UTF-16 or UTF-32"),
    "UTF-32": (LINES.decode().encode("utf-32-be"), "is UTF-16 or UTF-32"),
    "an object": (json.dumps({"data": [{"a": 1}]}, indent=1).encode(), "begins with an object over several lines"),
    "objects": (b'{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "begins with an object over several lines"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_refused_by_its_kind(tmp_path: Path, kind: str) -> None:
    data, message = OTHERS[kind]
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=f"a.jsonl {message}.*; expected JSON lines or one JSON list"):
        Annotations.scan(tmp_path / "a.jsonl")


def test_lines_cut_off_in_the_last_record(tmp_path: Path) -> None:
    for length in (10, 12, 16):
        (tmp_path / "a.jsonl").write_bytes(LINES[:length])
        with pytest.raises(DataError, match=r"damaged at byte 9, line 2: the file ends in the middle of a record"):
            Annotations.scan(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(LINES[:-1])
    assert kinds(Annotations.scan(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"a": 2}{"a": 3}', "two records in one line"),
        (b'{"a": 2}\xef\xbb\xbf {"a": 3}', "two records in one line"),
        (b'{"a": 2}, {"a": 3},', "two records in one line"),
        (b'{"a": 2} {"a": ' + b"9" * (5 << 20) + b"}", "two records in one line"),
    ],
)
def test_a_line_of_several_records_is_damage(tmp_path: Path, second: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + second + b'\n{"a": 4} nonsense\n')
    found = Annotations.scan(tmp_path / "a.jsonl")
    assert found.read(0) == {"a": 1}
    with pytest.raises(DataError, match=rf"damaged at byte \d+, line 3: {message}") as caught:
        found.read(1)
    assert type(caught.value) is DataError
    with pytest.raises(UnusableRecord, match="bad-json"):
        found.read(2)


@pytest.mark.parametrize(
    ("data", "byte", "line"),
    [
        (LINES + bytes(5000), 18, 3),
        (LINES + b"\n" + bytes(5000) + b"\r\n" + LINES, 19, 4),
        (b'{"a": 1}\r\n \0 \r{"a": 2}', 11, 2),
        (b'{"a": 1}\n{"a": "' + bytes(9) + b'"}\n', 16, 2),
        (b'{"a": "' + b"x" * MAX_RECORD_BYTES + b"\n" + bytes(9), MAX_RECORD_BYTES + 8, 2),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 5])
def test_a_hole_in_lines_is_refused_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, byte: int, line: int, block: int
) -> None:
    monkeypatch.setattr(annotations, "_BLOCK", max(block, len(data) >> 6))
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=rf"damaged at byte {byte}, line {line}: zeros: this part of the file"):
        Annotations.scan(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("name", "megabytes"), [("a.jsonl", 100), ("a.json", 60)])
def test_a_line_of_100_megabytes_takes_no_memory(tmp_path: Path, name: str, megabytes: int) -> None:
    before, after = (b"[", b"]") if name == "a.json" else (b"", b"")
    with (tmp_path / name).open("wb") as file:
        file.write(before + b'{"a": "')
        for _ in range(megabytes):
            file.write(b"x" * (1 << 20))
        file.write(b'"}' + (b",\n" if before else b"\n") + b'{"b": 1}' + after)
    tracemalloc.start()
    try:
        found = Annotations.scan(tmp_path / name)
        with pytest.raises(UnusableRecord, match=f"limit is {MAX_RECORD_BYTES}") as caught:
            found.read(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "record-too-large" and len(found) == 2 and found.read(1) == {"b": 1}
    assert peak < 24 << 20
