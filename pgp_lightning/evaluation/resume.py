"""What a comparison finds in its folder when it is started again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.scoring import load_answers

__all__ = ["check_settings", "done_samples", "read_json"]

# What may change under a folder's results: other samples and answers than before do not come of it.
_FREE = ("methods", "keep_ratios", "keep_importance", "batch_size", "timed_images")


def done_samples(path: Path) -> set[tuple[str, int]]:
    """Return the samples that a file holds, and take away a last line that a killed run left unfinished.

    Raises:
        DataError: if another line cannot be read.
    """
    if not path.is_file():
        return set()
    answers = load_answers(path, partial=True)
    whole = "".join(answer.to_json() + "\n" for answer in answers)
    if whole != path.read_text(encoding="utf-8", errors="replace"):
        part = path.with_suffix(".part")
        part.write_text(whole, encoding="utf-8")
        part.replace(path)
    return {answer.sample for answer in answers}


def check_settings(path: Path, described: Mapping[str, Any]) -> None:
    """Compare a configuration with the one that a folder's results are of, and note it.

    Methods may be added or left out; one that has results must be as it was. The batch size may change.

    Args:
        path: where it is noted, in the folder of the results.
        described: the configuration; empty if nothing is known about it.

    Raises:
        ConfigError: naming the first key that differs, or if the note is damaged.
    """
    now = json.loads(json.dumps({key: value for key, value in described.items() if key != "batch_size"}))
    answered = {
        file.stem.rpartition("@")[0] or file.stem for file in path.parent.glob("*.jsonl") if file.stat().st_size
    }
    # A run that failed before its first answer binds nobody.
    before = read_json(path) if answered else {}
    kept = {name: method for name, method in before.get("methods", {}).items() if name in answered}
    then, here = _flat({**before, "methods": kept}), _flat(now)
    for key in sorted(then.keys() & here.keys()):
        if then[key] != here[key]:
            raise ConfigError(
                f"{path.parent} holds results with another {key} ({then[key]}, now {here[key]}): "
                "give another folder, or remove it"
            )
    now["methods"] = now.get("methods", {}) | kept
    path.write_text(json.dumps({**before, **now}, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the folder's own files, empty if it is missing.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): give another folder, or remove it") from None
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change: settings and, as methods.NAME, methods."""
    methods = {f"methods.{name}": method for name, method in settings.get("methods", {}).items()}
    return {key: value for key, value in settings.items() if key not in _FREE} | methods
