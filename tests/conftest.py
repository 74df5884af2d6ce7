"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Read when torch is imported, by the programs that tests start, too. Several tests at a time, and processes within one,
# wait for each other's threads longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline per example measures the machine's load, not the code; pytest-timeout catches what hangs. Derandomised, so
# that a run in CI fails only for what changed.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


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
