"""Mappings in files: every mistake names file, line and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pgp_lightning.data.sections import Section, read_yaml
from pgp_lightning.errors import ConfigError, DataError

KEYS = ("text", "number", "integer", "flag", "choice", "name", "counts", "inner", "list")
GOOD = """\
# a comment
text: words

number: 0.5
integer: 3
flag: true
choice: red
name: a.tar
counts: {a: 1, b: 0}
inner:
  text: deep
list:
  - text: first
  -
    text: second
  - {text: third, number: 1}
"""


def read(folder: Path, text: str) -> Section:
    """Read a file with this text."""
    file = folder / "some.yaml"
    file.write_text(text)
    return read_yaml(file, KEYS)


def test_values_and_lines(tmp_path: Path) -> None:
    top = read(tmp_path, GOOD)
    assert (top.text("text"), top.number("number"), top.integer("integer")) == ("words", 0.5, 3)
    assert (top.flag("flag"), top.choice("choice", ("red", "blue")), top.bare_name("name")) == (True, "red", "a.tar")
    assert top.counts("counts") == {"a": 1, "b": 0}
    lines = GOOD.splitlines()
    for key in KEYS:
        assert lines[(top.line(key) or 0) - 1].startswith(f"{key}:")
    inner = top.section("inner", KEYS)
    assert (inner.text("text"), inner.line("text"), inner.where) == ("deep", 11, "inner")
    entries = top.sections("list", KEYS)
    assert [(entry.text("text"), entry.line("text"), entry.line()) for entry in entries] == [
        ("first", 13, 13),
        ("second", 15, 15),
        ("third", 16, 16),
    ]
    assert (top.text("flag2", ""), top.integer("none", 7), top.flag("none", False)) == ("", 7, False)


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("text: words", "text: ''", 2, "text: expected a non-empty string, got ''"),
        ("text: words", "text: 3", 2, "text: expected a non-empty string, got 3"),
        ("number: 0.5", "number: .nan", 4, "number: expected a number from 0 to 1, got nan"),
        ("number: 0.5", "number: 1.5", 4, "number: expected a number from 0 to 1, got 1.5"),
        ("number: 0.5", "number: true", 4, "number: expected a number from 0 to 1, got True"),
        ("integer: 3", "integer: 0", 5, "integer: expected an integer of at least 1, got 0"),
        ("integer: 3", "integer: 3.0", 5, "integer: expected an integer of at least 1, got 3.0"),
        ("integer: 3\n", "", 2, "integer: this key is required"),
        ("flag: true", "flag: 1", 6, "flag: expected true or false, got 1"),
        ("choice: red", "choice: green", 7, "choice: expected one of red, blue, got 'green'"),
        ("name: a.tar", "name: ../a.tar", 8, "name: expected a plain name without slashes, got '../a.tar'"),
        ("{a: 1, b: 0}", "{a: -1}", 9, "counts: expected integers of at least 0, got -1 for 'a'"),
        ("{a: 1, b: 0}", "[1]", 9, r"counts: expected a mapping, got \[1\]"),
        ("  text: deep", "  test: deep", 11, "inner.test: unknown key: did you mean 'text'"),
        ("inner:\n  text: deep", "inner: 3", 10, "inner: expected a mapping with the keys text, number"),
        ("    text: second", "    txt: second", 15, r"list\[1\].txt: unknown key: did you mean 'text'"),
        ("- {text: third, number: 1}", "- third", 16, r"list\[2\]: expected a mapping"),
        ("- {text: third, number: 1}", "- {number: 1}", 16, r"list\[2\].text: this key is required"),
    ],
)
def test_a_mistake_names_file_line_and_key(tmp_path: Path, before: str, after: str, line: int, message: str) -> None:
    assert GOOD.count(before) == 1

    def use() -> None:
        top = read(tmp_path, GOOD.replace(before, after))
        calls: list[Callable[[], object]] = [
            lambda: top.text("text"),
            lambda: top.number("number", high=1.0),
            lambda: top.integer("integer"),
            lambda: top.flag("flag"),
            lambda: top.choice("choice", ("red", "blue")),
            lambda: top.bare_name("name"),
            lambda: top.counts("counts"),
            lambda: top.section("inner", KEYS).text("text"),
            lambda: [entry.text("text") for entry in top.sections("list", KEYS)],
        ]
        for call in calls:
            call()

    with pytest.raises(ConfigError, match=f"^{tmp_path}/some.yaml:{line}: {message}"):
        use()


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("text: a\nname: b\ntext: c\n", 3, "text: this key is already in line 1: keep one of them"),
        ("inner:\n  text: a\n  text: b\n", 3, "text: this key is already in line 2"),
        ("text: a\nname: [\n", 3, "cannot be read as YAML: while parsing a flow node"),
        ("text: a\n\tname: b\n", 2, "cannot be read as YAML"),
        (
            "text: !!python/object/apply:os.system [ls]\n",
            1,
            "cannot be read as YAML: could not determine a constructor",
        ),
        ("text: a\n---\ntext: b\n", 2, "cannot be read as YAML: expected a single document"),
        ("? [a]\n: b\n", 1, "cannot be read as YAML: while constructing a mapping, found unhashable key"),
        ("text: a\n3: b\n", 2, "3: unknown key: the keys are text"),
        ("- a\n", 1, r"expected a mapping with the keys text.*got \['a'\]"),
    ],
)
def test_what_is_no_mapping_names_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"some\.yaml:{line}: .*{message}"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping with the keys text.*got None"),
        (b"text: \xff\n", "cannot be read as YAML: 'utf-8' codec"),
        (b"text: \x00\n", "cannot be read as YAML: unacceptable character"),
        (b"text: 2024-99-99\n", "cannot be read as YAML: month must be in 1..12"),
        (b"text: " + b"[" * 3000, "cannot be read as YAML: it is nested too deeply"),
    ],
)
def test_what_has_no_line_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"some\.yaml:? {message}"):
        read_yaml(file, KEYS)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist in /"):
        read_yaml(tmp_path / "none.yaml", KEYS)


def test_aliases_and_merges_keep_their_lines(tmp_path: Path) -> None:
    text = "inner: &one\n  text: a\n  number: 1\nlist:\n  - <<: *one\n    number: many\n  - *one\n"
    first, second = read(tmp_path, text).sections("list", KEYS)
    assert (first.text("text"), first.line("text"), second.text("text"), second.line("number")) == ("a", 2, "a", 3)
    with pytest.raises(ConfigError, match=r"some.yaml:6: list\[0\].number: expected a number"):
        first.number("number")


def test_a_bomb_of_aliases_or_a_loop_is_told_in_short(tmp_path: Path) -> None:
    levels = "".join(f"  - &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    top = read(tmp_path, f"list:\n  - &l0 [x]\n{levels}text: *l29\n")  # 9 ** 29 times x
    with pytest.raises(ConfigError, match=r"some.yaml:32: text: expected a non-empty string, got \[") as caught:
        top.text("text")
    assert len(str(caught.value)) < 1000
    loop = read(tmp_path, "text: &a [*a]\n")
    with pytest.raises(ConfigError, match=r"some.yaml:1: text: expected a non-empty string"):
        loop.text("text")


def test_a_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some.yaml:1: number: expected a number from 0 to inf, got 1000"):
        read(tmp_path, f"number: 1{'0' * 400}\n").number("number")


def test_other_formats_name_the_key_only(tmp_path: Path) -> None:
    section = Section(tmp_path / "index.json", "", {"inner": {"integer": -1}}, KEYS, DataError)
    with pytest.raises(DataError, match=r"index\.json: inner\.integer: expected an integer of at least 1, got -1"):
        section.section("inner", KEYS).integer("integer")
