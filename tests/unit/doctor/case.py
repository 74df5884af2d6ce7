"""A configuration for the doctor, which a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgp_lightning.doctor import examine
from pgp_lightning.finding import Finding
from tests.integration.small_run import small_config, write_config, write_manifest


class Case:
    """A configuration of a tiny model on a few records, which a test may spoil."""

    def __init__(self, folder: Path, base: str, data: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        shutil.copytree(base, self.base)
        self.config = small_config(write_manifest(folder, data))
        self.config["trainer"]["default_root_dir"] = str(folder / "run")
        self.set_base(self.base)

    @property
    def model(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.config["model"]["init_args"]
        return arguments

    @property
    def guide(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.model["guide"]["init_args"]
        return arguments

    @property
    def data(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.config["data"]["init_args"]
        return arguments

    def set_base(self, base: object) -> None:
        self.guide["base"] = self.data["base"] = str(base)

    def write(self) -> Path:
        return write_config(self.folder, self.config)

    def examine(self, answer_model: str | None = None) -> list[Finding]:
        return examine([self.write()], answer_model)

    def finds(self, state: str, what: str, *words: str, answer_model: str | None = None) -> list[Finding]:
        findings = self.examine(answer_model)
        mine = [one.detail for one in findings if (one.state, one.what) == (state, what)]
        assert any(all(word in detail for word in words) for detail in mine), "\n".join(map(str, findings))
        return findings

    def rewrite_manifest(self, **changes: Any) -> Any:
        """Change the top level of the manifest and return its content."""
        content = yaml.safe_load(Path(self.data["manifest"]).read_text()) | changes
        self.write_manifest(content)
        return content

    def write_manifest(self, content: Any) -> None:
        Path(self.data["manifest"]).write_text(yaml.safe_dump(content, sort_keys=False))


def has_memory(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr("pgp_lightning.doctor.device_memory", lambda device: ("a small device", int(count)))
