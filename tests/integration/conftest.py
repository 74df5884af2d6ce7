"""What several files of end-to-end tests use, made once."""

from __future__ import annotations

import pytest

from tests.integration.mixture_run import Built, make_mixture


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The made-up mixture with 1,500 records, built."""
    return make_mixture(tmp_path_factory.mktemp("mixture") / "data", 1500)
