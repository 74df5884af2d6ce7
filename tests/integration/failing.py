"""A command that is expected to fail."""

from __future__ import annotations

import pytest

from pgp_lightning.tools import main


def fails(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run `pgp`, expect its exit code and one line that speaks of an error, and return it."""
    capsys.readouterr()
    assert main(words) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700, lines
    return lines[0]
