"""What the doctor's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgp_lightning.tools import main
from tests.integration.small_run import write_manifest
from tests.unit.doctor.case import Case


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["shards", "build", str(write_manifest(folder, folder / "data"))]) == 0
    return folder / "data"


@pytest.fixture
def case(tmp_path: Path, tiny_base: str, shards: Path) -> Case:
    return Case(tmp_path, tiny_base, shards)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that cannot be asked, and an empty cache of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"
