"""Settings of the whole suite."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Read when torch is imported, by the programs that tests start, too. Several tests at a time, and processes within one,
# wait for each other's threads longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What we take from other libraries: the mechanism, guides, pruners and loading. A fit and a comparison bear the mark
# themselves.
CONTRACT = tuple(
    Path(__file__).parent / "unit" / part for part in ("prefill", "guides", "pruners", "vlm", "test_attention.py")
)


def pytest_configure(config: pytest.Config) -> None:
    """Draw fewer examples where the mark `full` is left out."""
    # A deadline per example measures the machine's load, not the code; pytest-timeout catches what hangs. Derandomised,
    # so that a run in CI fails only for what changed.
    examples = 25 if "not full" in config.option.markexpr else 100
    settings.register_profile("suite", deadline=None, derandomize=True, max_examples=examples)
    settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the contract by folder, before marks are selected by."""
    for item in items:
        if item.get_closest_marker("full") is None and any(item.path.is_relative_to(part) for part in CONTRACT):
            item.add_marker("contract")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model of the InternVL family, made once."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llava_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model of the LLaVA-1.5 family, made once."""
    from tests.tiny_llava import save_llava

    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script as a program in this process, whose imports it need not repeat, and return what it printed."""

    def call(script: Path, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
        monkeypatch.syspath_prepend(script.parent)  # it imports its neighbours
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return call
