"""What the package asks for, what the lock holds and what the lowest environment holds belong together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# flash-attn builds against an installed torch and CUDA, so no resolver can read what it needs.
EXTRAS = [extra for extra in PROJECT["optional-dependencies"] if extra != "flash"]


def wanted(*extras: str) -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return [wish for wish in map(Requirement, texts) if wish.name != PROJECT["name"]]


def pins(file: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in found), f"{file} pins every version exactly"
    return {pin.name: Version(str(pin.specifier)[2:]) for pin in found}


def test_the_lock_says_how_it_was_made_and_holds_what_every_extra_wants():
    assert "uv pip compile pyproject.toml" in "".join((ROOT / "constraints.txt").read_text().splitlines()[:2])
    locked = pins("constraints.txt")
    for wish in wanted(*EXTRAS):
        assert locked[wish.name.lower()] in wish.specifier, f"{wish} against {locked[wish.name.lower()]}: lock again"


def test_the_lowest_environment_holds_the_lower_bounds():
    lowest = pins("tests/lowest.txt")
    assert lowest["torch"] == pins("constraints.txt")["torch"]
    for wish in wanted("sentencepiece", "dev"):
        (bound,) = (Version(part.version) for part in wish.specifier if part.operator == ">=")
        pin = lowest[wish.name.lower()]
        # The first release of a series counts as its bound: 8.3.0 for 8.3, and 2.3.1 for 2.3 where 2.3.0 was withdrawn.
        same = pin.release[: len(bound.release)] == bound.release
        assert same or wish.name == "torch", f"{wish} against {pin}: raise the bound, or lock the lowest again"


def test_every_cap_has_its_reason():
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if re.search(r'^    "[a-z-]+(\[.*\])?[^"]*<', line):
            assert "capped: " in line, line
