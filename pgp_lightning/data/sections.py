"""Mappings in YAML and JSON files, read key by key, so that every mistake is named by file, line and key.

YAML is composed into nodes first and only then turned into values: a node knows its line, a value does not. JSON's
parser keeps no lines; mistakes there are named by file and key.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pgp_lightning.errors import ConfigError, DataError

__all__ = ["Section", "read_yaml"]

_REQUIRED = object()
# Not `repr`: an alias used often enough makes a short file print for ever.
_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring, _short.maxother = 2, 6, 6, 200, 200
_shown = _short.repr


def read_yaml(file: Path, known: Sequence[str]) -> Section:
    """Read a YAML file whose content is a mapping with known keys.

    Raises:
        ConfigError: if the file is missing, is no YAML, has a key twice or has other keys, naming file and line.
    """
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _refuse_repeated_keys(file, node)
        value = None if node is None else loader.construct_document(node)  # also resolves `<<` inside the nodes
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist in {Path.cwd()}: give the path of a data manifest") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: cannot be read as YAML: {told}") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{file} cannot be read as YAML: it is nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date like 2024-99-99
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    return Section(file, "", value, known, ConfigError, node)


class Section:
    """A mapping inside a file.

    Args:
        file: where it stands.
        where: its place in there, such as `splits.train[0]`.
        value: what should be the mapping.
        known: the keys it may have.
        error: what mistakes raise.
        node: the YAML node of the value, None for other formats.

    Raises:
        ConfigError or DataError: if it is no mapping, or has an unknown key.
    """

    def __init__(
        self,
        file: Path,
        where: str,
        value: object,
        known: Sequence[str],
        error: type[ConfigError | DataError],
        node: yaml.Node | None = None,
    ) -> None:
        self.file, self.where, self.error, self.node = file, where, error, node
        if not isinstance(value, Mapping):
            raise self.problem("", f"expected a mapping with the keys {', '.join(known)}, got {_shown(value)}")
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
                raise self.problem(str(key), f"unknown key: {hint}")
        self.value = value

    def problem(self, key: str, message: str) -> ConfigError | DataError:
        """Return the error to raise about a key, or about the whole mapping for an empty key."""
        place = ".".join(part for part in (self.where, key) if part)
        line = self.line(key)
        return self.error(
            f"{self.file}{f':{line}' if line else ''}: {place + ': ' if place else ''}{message}",
        )

    def line(self, key: str = "") -> int | None:
        """Return the line of a key, of the mapping's start if it has no such key, None where lines are not known."""
        if self.node is None:
            return None
        mark = (self._pair(key) or (self.node,))[0].start_mark
        return int(mark.line) + 1

    def get(self, key: str, default: object = _REQUIRED) -> object:
        """Return a key's value, whatever it is."""
        if key not in self.value and default is _REQUIRED:
            raise self.problem(key, "this key is required")
        value: object = self.value.get(key, default)
        return value

    def text(self, key: str, default: object = _REQUIRED) -> str:
        """Return a non-empty string."""
        value = self.get(key, default)
        if not isinstance(value, str) or not (value.strip() or value == default):
            raise self.problem(key, f"expected a non-empty string, got {_shown(value)}")
        return value

    def bare_name(self, key: str) -> str:
        """Return a string that is one component of a path, so that a file cannot point out of its folder."""
        name = self.text(key)
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise self.problem(key, f"expected a plain name without slashes, got {name!r}")
        return name

    def choice(self, key: str, options: Sequence[str], default: object = _REQUIRED) -> str:
        """Return one of a few words."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in options:
            raise self.problem(key, f"expected one of {', '.join(options)}, got {_shown(value)}")
        return value

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.problem(key, f"expected true or false, got {_shown(value)}")
        return value

    def number(self, key: str, default: object = _REQUIRED, low: float = 0.0, high: float = math.inf) -> float:
        """Return a finite number within [low, high]."""
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            try:
                if math.isfinite(number := float(value)):
                    return number
            except OverflowError:
                pass  # an integer that no float holds
        raise self.problem(key, f"expected a number from {low:g} to {high:g}, got {_shown(value)}")

    def integer(self, key: str, default: object = _REQUIRED, low: int = 1) -> int:
        """Return an integer of at least `low`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.problem(key, f"expected an integer of at least {low}, got {_shown(value)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping with any keys, empty if it is not there."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.problem(key, f"expected a mapping, got {_shown(value)}")
        return dict(value)

    def counts(self, key: str) -> dict[str, int]:
        """Return a mapping of names to integers of at least 0, empty if it is not there."""
        found = self.mapping(key)
        for name, value in found.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self.problem(key, f"expected integers of at least 0, got {_shown(value)} for {name!r}")
        return found

    def section(self, key: str, known: Sequence[str]) -> Section:
        """Return the mapping under a key."""
        pair = self._pair(key)
        return self._inner(key, self.get(key), known, pair[1] if pair else self.node)

    def sections(self, key: str, known: Sequence[str]) -> list[Section]:
        """Return a non-empty list of mappings."""
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise self.problem(key, f"expected a non-empty list, got {_shown(value)}")
        pair = self._pair(key)
        nodes = pair[1].value if pair else [None] * len(value)
        return [
            self._inner(f"{key}[{number}]", entry, known, node)
            for number, (entry, node) in enumerate(zip(value, nodes, strict=True))
        ]

    def _inner(self, key: str, value: object, known: Sequence[str], node: yaml.Node | None) -> Section:
        where = ".".join(part for part in (self.where, key) if part)
        return Section(self.file, where, value, known, self.error, node)

    def _pair(self, key: str) -> tuple[yaml.Node, yaml.Node] | None:
        """Return the nodes of a key and its value, None if there are none."""
        if not isinstance(self.node, yaml.MappingNode):
            return None
        # The last one counts: what `<<` merged in stands in front of the mapping's own keys.
        return next((pair for pair in reversed(self.node.value) if str(pair[0].value) == key), None)


def _refuse_repeated_keys(file: Path, root: yaml.Node | None) -> None:
    """Raise if a mapping has a key twice, of which YAML would silently take the last."""
    todo, seen = [root], set[int]()  # a list, and every node once: aliases may form loops
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                todo.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = int(key.start_mark.line) + 1
                if key.value in lines:
                    raise ConfigError(
                        f"{file}:{line}: {key.value}: this key is already in line {lines[key.value]}: keep one of them"
                    )
                lines[key.value] = line
