"""What a comparison finds in its folder when it is started again, and by what it knows that methods are the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.scoring import Sample, load_answers
from pgp_lightning.guides.base import Guide
from pgp_lightning.vlm.family import VLM

__all__ = [
    "Part",
    "alike",
    "attributes",
    "check_settings",
    "done_samples",
    "fingerprint",
    "finished_rows",
    "read_json",
    "take_parts",
]

PARTS = "parts"
# What may change under a folder's results: other samples and answers than before do not come of it.
_FREE = ("methods", "keep_ratios", "keep_importance", "batch_size", "timed_images")
WHOLE, PART = 2**20, 2**16  # values of a tensor that is hashed whole; else so many at either end


@dataclass(frozen=True)
class Part:
    """One of the runs that share a comparison's methods, each with a folder of its own, so that none waits for another.

    Args:
        number: of the part, from 1.
        parts: how many there are.

    Raises:
        ConfigError: if there is no such part.
    """

    number: int
    parts: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.parts:
            raise ConfigError(f"expected a part from 1/{self.parts} to {self.parts}/{self.parts}, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    @classmethod
    def read(cls, text: str) -> Part:
        """Read `NUMBER/PARTS`.

        Raises:
            ConfigError: if it is none.
        """
        number, slash, parts = text.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal()):
            raise ConfigError(f"expected a part as NUMBER/PARTS, such as 2/5, got {text!r}")
        return cls(int(number), int(parts))

    def inside(self, folder: Path) -> Path:
        """Return the part's folder in the comparison's."""
        return folder / PARTS / f"{self.number}_of_{self.parts}"

    def share(self, methods: Sequence[str]) -> list[str]:
        """Return the part's methods: one in so many as there are parts.

        Raises:
            ConfigError: if nothing is left for it.
        """
        if self.number > len(methods):
            raise ConfigError(f"there is no part {self}: there are {len(methods)} methods, {', '.join(methods)}")
        return list(methods[self.number - 1 :: self.parts])


def take_parts(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Copy what runs of parts have answered into the folder of the whole comparison.

    Args:
        folder: of the whole comparison.
        name: of the file with a folder's settings.
        settings: of the whole comparison.

    Raises:
        ConfigError: if a part's results are of other settings.
    """
    notes = sorted((folder / PARTS).glob(f"*/{name}"))
    for note in notes:
        check_settings(note, settings)
    for file in sorted(file for note in notes for file in note.parent.glob("*.jsonl")):
        mine, theirs = folder / file.name, file.read_bytes()
        # All append answers in the same order, so the file with more of them has those of the other.
        if not mine.is_file() or mine.read_bytes().count(b"\n") < theirs.count(b"\n"):
            mine.with_suffix(".part").write_bytes(theirs)
            mine.with_suffix(".part").replace(mine)


def done_samples(path: Path) -> set[Sample]:
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


def finished_rows(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the methods of a folder that have all samples, and those that a run left unfinished.

    A run describes its methods in `methods.json` when it is at its end. Results of others beside them are unfinished:
    of a method, say, that was taken out of the configuration after a stop. Without that file all count as finished.

    Raises:
        ConfigError: if the file is damaged.
    """
    lines, folder = {}, Path(folder)
    for file in sorted(folder.glob("*.jsonl")):
        with file.open("rb") as content:
            lines[file.name.removesuffix(".jsonl")] = sum(bool(line.strip()) for line in content)
    described = list(read_json(folder / "methods.json"))
    if not described:
        return list(lines), []
    # As many as most have: more is an error for whoever reads them, and no reason to leave out the others.
    whole = Counter(lines.get(name, 0) for name in described).most_common(1)[0][0]
    finished = [name for name in described if name in lines and lines[name] >= whole]
    return finished, [name for name in dict.fromkeys([*described, *lines]) if name not in finished]


def fingerprint(module: nn.Module) -> str:
    """Return a hash of a module's parameters and buffers: names, types, shapes and values.

    Of a tensor with more than `WHOLE` values only the first and last `PART` count: training moves all of them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # what a module adds to its state by itself
            digest.update(f"{name} {value!r}\n".encode())
            continue
        flat = value.detach().reshape(-1)
        parts = [flat] if flat.numel() <= WHOLE else [flat[:PART], flat[-PART:]]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        for part in parts:
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return the class of a pruner or guide and its public numbers, strings, booleans and tuples of them.

    Those of the modules inside follow, under their paths; foreign ones (torch's, transformers', peft's) say no more
    than their weights do. The budget is none of them, and neither is whether a module is in training mode.
    """
    found: dict[str, Any] = {}
    for path, own in _own(module):
        kind = type(own)
        found[f"{path}class"] = f"{kind.__module__}.{kind.__qualname__}"
        for name, value in vars(own).items():
            public = not name.startswith("_") and name not in ("training", "keep_ratio")
            if public and (_is_scalar(value) or (isinstance(value, tuple) and all(map(_is_scalar, value)))):
                found[f"{path}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def alike(guide: Guide) -> str:
    """Return a text that two guides share if they give the same scores: class, weights, and everything they hold.

    An object of an unknown kind is like itself only.
    """
    held = [
        [path, sorted([name, _text(value)] for name, value in vars(own).items() if name not in _MODULE)]
        for path, own in _own(guide)
    ]
    return json.dumps([attributes(guide), fingerprint(guide), held])


_MODULE = vars(nn.Module()).keys()


def _own(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those inside with their paths, but no foreign ones."""
    if type(module).__module__.partition(".")[0] in ("torch", "transformers", "peft"):
        return
    yield path, module
    for name, child in module.named_children():
        yield from _own(child, f"{path}{name}.")


def _is_scalar(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _text(value: object) -> str:
    """Return a text that stands for a value, or for one object."""
    if value is None or _is_scalar(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return repr([_text(inner) for inner in value])
    if isinstance(value, dict):
        return repr(sorted((repr(key), _text(inner)) for key, inner in value.items()))
    if isinstance(value, VLM):
        return f"{type(value).__name__}({value.base!r})"
    return f"{type(value).__name__} {id(value)}"


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compare a comparison's settings with those that a folder's results are of, and note them.

    Methods may be added or left out; one that has results must be as it was. The batch size may change.

    Args:
        path: where they are noted, in the folder of the results.
        settings: of this run; under `methods`, what is known of each.

    Raises:
        ConfigError: naming the first key that differs, or if the note is damaged.
    """
    now = json.loads(json.dumps({key: value for key, value in settings.items() if key != "batch_size"}))
    answered = {
        file.stem.rpartition("@")[0] or file.stem for file in path.parent.glob("*.jsonl") if file.stat().st_size
    }
    # A run that failed before its first answer binds nobody.
    before = read_json(path) if answered else {}
    kept = {name: method for name, method in before.get("methods", {}).items() if name in answered}
    then, here = _flat({**before, "methods": kept}), _flat(now)
    for key in sorted(then.keys() & here.keys()):
        if (found := _difference(key, then[key], here[key])) is not None:
            raise ConfigError(f"{path.parent} holds results with another {found}: give another folder, or remove it")
    methods = now.get("methods", {})
    now["methods"] = methods | {name: {**methods.get(name, {}), **method} for name, method in kept.items()}
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


def _difference(key: str, then: object, now: object) -> str | None:
    """Return where two settings first differ and how, None if nowhere."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        inner = (_difference(f"{key}.{name}", then.get(name), now.get(name)) for name in keys)
        return next((found for found in inner if found is not None), None)
    return None if then == now else f"{key} ({then}, now {now})"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change: settings and, as methods.NAME.PART, what is known of methods."""
    methods = {
        f"methods.{name}.{part}": value
        for name, method in settings.get("methods", {}).items()
        for part, value in method.items()
    }
    return {key: value for key, value in settings.items() if key not in _FREE} | methods
