"""Guides that tests only look at."""

from __future__ import annotations

import pytest

from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.vlm.request import Request
from tests.tiny import QUESTIONS, tiny_request
from tests.unit.guides.made import make


@pytest.fixture(scope="module")
def guide(tiny_base: str) -> PosteriorGuide:
    """A guide that tests only look at."""
    return make(tiny_base)


@pytest.fixture(scope="module")
def native(tiny_base: str) -> PosteriorGuide:
    """A guide with the family's native order in both passes."""
    return make(tiny_base, bottleneck_order="image_first", reconstruction_order="image_first")


@pytest.fixture(scope="module")
def mixed(tiny_base: str) -> PosteriorGuide:
    """A guide whose second pass has the other order than its first."""
    return make(tiny_base, reconstruction_order="image_first")


@pytest.fixture
def request_() -> Request:
    """Four questions about three images of different sizes; two share one."""
    return tiny_request(QUESTIONS, images=(0, 1, 2, 0))
