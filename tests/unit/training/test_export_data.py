"""The data that an exported guide is verified on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pgp_lightning.errors import ConfigError
from pgp_lightning.training.export import _recorded_data
from tests.integration.small_run import write_manifest


def recorded(manifest: Path, **options: Any) -> dict[str, Any]:
    """Return a checkpoint's record of its data."""
    arguments = {"manifest": str(manifest), "base": "tiny", **options}
    return {"run": {"config": {"data": {"init_args": arguments}}}}


def test_validation_data_or_else_training_data(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, tmp_path / "data")
    data, split = _recorded_data(recorded(manifest, lanes=4))
    assert (data.lanes, split) == (4, "val")
    content = yaml.safe_load(manifest.read_text())
    del content["splits"]["val"]
    manifest.write_text(yaml.safe_dump(content))
    assert _recorded_data(recorded(manifest))[1] == "train"


def test_a_checkpoint_does_not_allow_commands(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, tmp_path / "data")
    with pytest.raises(ConfigError, match="runs a shell command"):
        _recorded_data(recorded(manifest, root=f"pipe:touch {tmp_path}/ran; cat {{file}}", allow_pipe=True))
    assert not (tmp_path / "ran").exists()
