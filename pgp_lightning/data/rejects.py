"""Accounts of records that cannot be used: how many of which source, and when they are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt

from pgp_lightning.data.mixture import StreamSource
from pgp_lightning.errors import DataError

__all__ = ["DAMAGED", "RejectTally", "rejects_by_source"]

DAMAGED = "damaged-shard"
_LEAST_SEEN = 100


class RejectTally:
    """Counts unusable records and fails when a source has more of them than it may.

    Counts are this process's, since it started. A source fails for certain when its rejects exceed the allowed share
    of everything seen and of one whole pass; from 100 records on it fails as well when they exceed the allowed share
    of those seen by three standard deviations, so that a run of bad luck does not stop a run. Records of damaged
    shards come in heaps, of which a few seen early say nothing about the source: they count for the first rule only.
    """

    def __init__(self, sources: Sequence[StreamSource]) -> None:
        self._sources = {source.name: source for source in sources}
        self._seen: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def add(self, seen: Counter[str], rejected: Mapping[str, int]) -> None:
        """Add the records seen by source, and those of them rejected by "source/reason".

        Raises:
            DataError: if a source exceeds its allowed share.
        """
        self._seen.update(seen)
        self._rejected.update(rejected)
        for name in {key.rpartition("/")[0] for key in rejected}:
            self._check(self._sources[name])

    def _check(self, source: StreamSource) -> None:
        prefix = f"{source.name}/"
        reasons = {
            key.removeprefix(prefix): n for key, n in self._rejected.items() if key.rpartition("/")[0] == source.name
        }
        bad, seen, share = sum(reasons.values()), self._seen[source.name], source.allowed_rejects
        single = bad - reasons.get(DAMAGED, 0)
        certain = bad > share * max(seen, source.samples)
        likely = seen >= _LEAST_SEEN and single > share * seen + 3 * sqrt(share * seen)
        if certain or likely:
            listed = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
            raise DataError(
                f"source {source.name!r} in {source.shards[0].path.parent}: {bad} of {seen} records ({bad / seen:.1%}) "
                f"cannot be used, allowed are {share:.1%}: {listed}. Repair the data, or raise the source's "
                f"allowed_rejects in the manifest"
            )


def rejects_by_source(rejected: Mapping[str, int]) -> Counter[str]:
    """Return the sums over the reasons of "source/reason" -> records."""
    counts: Counter[str] = Counter()
    for key, number in rejected.items():
        counts[key.rpartition("/")[0]] += number
    return counts
