"""Measure how long a stream takes from its start to the first batch, at any place of an epoch.

    python benchmarks/stream_restart.py MANIFEST --at 0.95

Makes a loader as a fit does, lets it go on at a share of the first epoch, and waits for the first batch. Imports and
the tokenizer's loading come before and are not counted; what workers import is. The shards have to be there.
"""

from __future__ import annotations

import argparse
import time

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.mixture import Mixture, StreamSource


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure how long a stream takes to its first batch.")
    parser.add_argument("manifest")
    parser.add_argument("--base", default="embedded:guide")
    parser.add_argument("--at", type=float, default=0.0, help="share of the epoch that is done")
    for name, value in (("lanes", 64), ("batch-size", 4), ("group-batches", 8), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()

    from pgp_lightning.vlm.loading import load_processor  # here, because workers import this file

    reader = ConversationReader(load_processor(given.base))

    begin = time.perf_counter()
    manifest = Manifest.load(given.manifest)
    sources = tuple(StreamSource.load(source) for source in manifest.sources("train"))
    mixture = Mixture(
        sources,
        lanes=given.lanes,
        batch_size=given.batch_size,
        weights=manifest.weights,
        mixing="even",
        group_batches=given.group_batches,
    )
    batch = int(given.at * mixture.batches_per_epoch)
    loader = TrainingLoader(mixture, reader, 2 * mixture.batches_per_epoch, workers=given.workers)
    loader.load_state_dict({**loader.state_dict(), "global_batches": batch})
    planned = time.perf_counter()
    batches = iter(loader)
    next(batches)
    end = time.perf_counter()
    print(
        f"micro-batch {batch:,} of {mixture.batches_per_epoch:,} ({given.at:.0%} of an epoch of {sum(mixture.takes):,} "
        f"records, {given.workers} workers): {end - begin:.2f} s, of which {planned - begin:.2f} s for the indices"
    )


if __name__ == "__main__":
    main()
