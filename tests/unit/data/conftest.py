"""Fixtures of the data tests; worker processes import `data_world` by name, so its folder goes on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from data_world import SIZES, PictureBuilder, stream_source

from pgp_lightning.data.mixture import StreamSource
from pgp_lightning.data.writing import write_source


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamSource, ...]:
    """Three sources of very different sizes, in shards that do not divide them."""
    root = tmp_path_factory.mktemp("world")
    for name, size in SIZES.items():
        write_source(root / name, PictureBuilder(name, size), samples_per_shard=13, progress=False)
    return tuple(stream_source(root / name) for name in SIZES)
