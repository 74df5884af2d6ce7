"""The stream as jobs of any number of ranks and workers deliver it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from data_world import WordProcessor

from pgp_lightning.data import batches as module
from pgp_lightning.data.collate import Batch
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import Mixture

READER = ConversationReader(WordProcessor())
Summary = tuple[list[str], list[int], int, dict[str, int], int]


def summary(batch: Batch) -> Summary:
    """Return what identifies a batch, its pixels included."""
    return batch.keys, batch.indices, batch.epoch, batch.rejected, int(batch.request.tiles.long().sum())


def stream(
    mixture: Mixture,
    ranks: int,
    workers: int,
    first: int = 0,
    stop: int = 40,
    reader: ConversationReader = READER,
    repeat: int | None = None,
) -> dict[int, Summary]:
    """Return the global micro-batches first..stop-1 as the ranks of a job deliver them."""
    found = {}
    for rank in range(ranks):
        loader = TrainingLoader(mixture, reader, stop // ranks, rank, ranks, workers, repeat=repeat)
        loader.load_state_dict({**loader.state_dict(), "global_batches": first})
        for number, batch in enumerate(loader, start=first // ranks):
            found[number * ranks + rank] = summary(batch)
    return found


def simulated(
    mixture: Mixture,
    ranks: int,
    workers: int,
    first: int,
    stop: int,
    monkeypatch: pytest.MonkeyPatch,
    reader: ConversationReader = READER,
    repeat: int | None = None,
) -> dict[int, Summary]:
    """Return the same, with the workers of a DataLoader played in this process, which collects from them in turn."""
    found: dict[int, Summary] = {}
    for rank in range(ranks):
        streams = []
        for worker in range(workers):
            part = first // ranks, stop // ranks
            data = module.TrainingBatches(mixture, reader, rank, ranks, *part, repeat=repeat)
            with monkeypatch.context() as patch:
                info = SimpleNamespace(id=worker, num_workers=workers)
                patch.setattr(module, "get_worker_info", lambda info=info: info)
                streams.append(iter(list(data)))
        for number in range(first // ranks, stop // ranks):
            parcel = next(streams[(number - first // ranks) % workers])
            assert isinstance(parcel, Batch), parcel
            found[number * ranks + rank] = summary(parcel)
    return found
