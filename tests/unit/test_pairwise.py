"""The combinations that run by default hold every two values of every two axes, and the others are there too."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.pairwise import pairwise

AXES: list[dict[str, Any]] = [
    {"a": "xyz", "b": (1, 2), "c": (None, True)},
    {"a": range(30), "b": "pq", "c": "uvw", "d": (0, 1, 2)},
    {"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0, 1), "e": (0, 1)},
    {"a": "xyz", "b": (1, 2)},
]


def split(axes: dict[str, Any]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return the combinations that run by default, and those that are marked."""
    names, cases = pairwise(**axes).args
    assert names == list(axes)
    marked = [bool(case.marks) for case in cases]
    assert all(mark.name == "full" for case in cases for mark in case.marks)
    return [c.values for c, m in zip(cases, marked, strict=True) if not m], [
        c.values for c, m in zip(cases, marked, strict=True) if m
    ]


@pytest.mark.parametrize("axes", AXES)
def test_every_pair_of_values_runs_by_default(axes: dict[str, Any]):
    default, full = split(axes)
    assert sorted(default + full, key=str) == sorted(product(*axes.values()), key=str)
    for (one, first), (two, second) in combinations(enumerate(axes.values()), 2):
        assert {(case[one], case[two]) for case in default} == set(product(first, second))
    # Far from the product, not far from the two largest axes alone, which no cover can do without.
    large, next_to_it = sorted((len(axis) for axis in axes.values()), reverse=True)[:2]
    assert len(default) <= 1.5 * large * next_to_it
    assert (len(axes) > 2) == bool(full)


def test_the_choice_is_always_the_same():
    assert split(AXES[1]) == split(AXES[1])


@pairwise(one=(1, 2), two=(3, 4), three=(5, 6), indirect=["three"])
def test_values_arrive_under_their_names(one: int, two: int, three: int):
    assert (one in (1, 2), two in (3, 4), three in (50, 60)) == (True, True, True)


@pytest.fixture
def three(request: pytest.FixtureRequest) -> int:
    return 10 * request.param
