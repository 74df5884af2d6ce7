"""Products of parameters, of which a pairwise cover runs by default and the rest under the mark `full`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Cell = tuple[tuple[int, int], tuple[int, int]]  # two axes, each with the place of its value


def cells(places: Sequence[int]) -> set[Cell]:
    """Return the pairs of values that a combination, given as places on its axes, holds."""
    return set(combinations(enumerate(places), 2))


def cover(sizes: Sequence[int]) -> set[tuple[int, ...]]:
    """Choose combinations, greedily and the same ones always, that hold every two values of every two axes."""
    left = {places: cells(places) for places in product(*map(range, sizes))}
    missing: set[Cell] = set().union(*left.values())
    chosen = set()
    while missing:
        best = max(left, key=lambda places: len(left[places] & missing))
        missing -= left.pop(best)
        chosen.add(best)
    return chosen


def pairwise(*, indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of its axes, given by name.

    Args:
        indirect: the axes that are fixtures.
        axes: the values of each; two axes or one are taken whole.
    """
    values = {name: list(axis) for name, axis in axes.items()}
    default = cover([len(axis) for axis in values.values()]) if len(values) > 2 else None
    cases = []
    for places in product(*(range(len(axis)) for axis in values.values())):
        marks = () if default is None or places in default else (pytest.mark.full,)
        combination = (axis[place] for axis, place in zip(values.values(), places, strict=True))
        cases.append(pytest.param(*combination, marks=marks))
    return pytest.mark.parametrize(list(values), cases, indirect=list(indirect))
