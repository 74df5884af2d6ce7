"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# A deadline per example measures the machine's load, not the code; pytest-timeout catches what hangs. Derandomised, so
# that a run in CI fails only for what changed.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
