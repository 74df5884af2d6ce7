"""The package's floors: a file imports only from its own floor and from lower ones (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "pgp_lightning"
ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
LINES = 400

FLOORS = {
    # 0 mathematics
    "errors": 0, "bottleneck": 0, "objective": 0, "selection": 0, "warning_signal": 0,
    # 1 foreign models seen from outside
    "vlm": 1, "attention": 1, "pruner": 1, "prefill": 1, "prefill_driver": 1, "prefill_guard": 1, "prefill_inputs": 1,
    "prefill_state": 1,
    # 2 methods
    "guides": 2, "pruners": 2,
    # 3 data
    "data": 3, "embedded": 3,
    # 4 training
    "training": 4,
    # 5 evaluation
    "evaluation": 5,
    # 6 doors
    "cli": 6, "tools": 6, "tools_shards": 6, "doctor": 6, "doctor_data": 6, "finding": 6, "__main__": 6,
}  # fmt: skip


def module_name(file: Path) -> str:
    """Dotted name of a file, `__init__` kept, so that relative imports resolve alike everywhere."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> str:
    """The entry of the floor table a dotted name of the package stands for; "" for the package itself."""
    name = [*module.split("."), ""][1]
    return "" if name == "__init__" else name


def floor(module: str) -> int:
    """The package's own __init__ is imported before everything else, so it stands on the ground."""
    return FLOORS.get(room(module), 0)


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import in a source, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            # `from package import name`: the name may be a module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def too_high(source: str, module: str) -> list[str]:
    own = [(line, name) for line, name in imports(source, module) if name.split(".")[0] == PACKAGE]
    return [f"line {line}: {name}" for line, name in own if floor(name) > floor(module)]


def test_the_walk_finds_the_package():
    assert {"bottleneck", "objective", "selection"} <= {room(module_name(file)) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_imports_from_a_higher_floor(file: Path):
    found = too_high(file.read_text(encoding="utf-8"), module_name(file))
    assert not found, f"{module_name(file)} is on floor {floor(module_name(file))} and imports {', '.join(found)}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_file_belongs_to_a_floor(file: Path):
    name = room(module_name(file))
    assert name == "" or name in FLOORS, f"put {name} into the floor tables of this test and of CONTRIBUTING.md"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_is_long(file: Path):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{lines} lines: a file this long holds two subjects, give each its own"


@pytest.mark.parametrize("file", [f for f in FILES if floor(module_name(f)) == 0], ids=module_name)
def test_the_ground_floor_needs_torch_alone(file: Path):
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    found = {name.split(".")[0] for _, name in imports(file.read_text(encoding="utf-8"), module_name(file))}
    assert found <= allowed, f"{found - allowed} on floor 0"


@pytest.mark.parametrize(
    "source",
    [
        "import pgp_lightning.training.pgp",
        "import torch, pgp_lightning.cli as door",
        "from pgp_lightning.training.pgp import PGP",
        "from pgp_lightning import training",
        "from .. import training",
        "from ..training import pgp",
        "from ..training.pgp import PGP",
        "def later():\n    from pgp_lightning.training import pgp",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pgp_lightning.training.pgp import PGP",
        "try:\n    import pgp_lightning.evaluation\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('pgp_lightning.training.pgp')",
    ],
)
def test_the_walk_sees_an_import_wherever_it_stands(source: str):
    assert too_high(source, f"{PACKAGE}.data.module")


@pytest.mark.parametrize(
    "source",
    [
        "from pgp_lightning.embedded.world import WORLD_VERSION",
        "from pgp_lightning import errors, __version__",
        "from . import collate\nfrom .collate import Batch\nfrom ..vlm.tiles import TileGrid",
        "import training\nfrom training.pgp import PGP",
    ],
)
def test_the_walk_allows_the_own_floor_lower_ones_and_strangers(source: str):
    assert not too_high(source, f"{PACKAGE}.data.module")
