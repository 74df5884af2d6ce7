"""The one pass over an annotation file: the same records as a parser finds, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgp_lightning.data import annotations
from pgp_lightning.data.annotations import MAX_RECORD_BYTES, Annotations
from pgp_lightning.data.records import UnusableRecord
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a"', "is not closed, 2 records"),
        ('[{"a": "]', "is not closed"),
        ('[{"a": 1}] {"b": 2}', "something follows the list, at byte 10"),
        ("[{}}, {}]", "something follows the list"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Annotations.scan(tmp_path / "a.json")


def test_elements_that_are_no_records_are_refused_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[1, "a,b", [2, 3], {"a": [1, 2]}, nonsense, {"b": 1},]')
    found = Annotations.scan(tmp_path / "a.json")
    kept: list[Any] = []
    for number in range(len(found)):
        try:
            kept.append(found.read(number))
        except UnusableRecord as error:
            kept.append(error.reason)
    assert kept == ["bad-json"] * 3 + [{"a": [1, 2]}, "bad-json", {"b": 1}, "bad-json"]


@pytest.mark.parametrize(("name", "megabytes"), [("a.jsonl", 200), ("a.json", 60)])
def test_a_line_of_200_megabytes_takes_no_memory(tmp_path: Path, name: str, megabytes: int) -> None:
    before, after = (b"[", b"]") if name == "a.json" else (b"", b"")
    with (tmp_path / name).open("wb") as file:
        file.write(before + b'{"a": "')
        file.seek(megabytes << 20)  # a hole: zeros that take no disk
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
