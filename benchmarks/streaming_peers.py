"""The same records through other libraries' loaders, with our decoding, tiling and collation.

WebDataset is a dependency of the package. litdata and Hugging Face `datasets` are none: `pip install litdata datasets`.
Each reads its own format, in order and without a shuffle, which favours it: a record's picture and JSON are kept as the
bytes that they are in the shards.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from streaming_data import SHARDS, in_memory
from torch.utils.data import DataLoader

from pgp_lightning.data.collate import Batch, Item, collate
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.mixture import StreamSource
from pgp_lightning.data.records import RawRecord

__all__ = ["Make", "installed", "loader_options", "peers"]

# workers -> the batches of one pass over all records.
Make = Callable[[int], Iterator[Batch]]


def installed(name: str) -> bool:
    """Say whether an optional library is there."""
    return importlib.util.find_spec(name) is not None


def loader_options(workers: int) -> dict[str, Any]:
    """Return what every DataLoader gets: workers started and filled as `TrainingLoader` starts and fills its own."""
    if not workers:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgp_lightning.data.loader"])
    return {"num_workers": workers, "multiprocessing_context": context, "prefetch_factor": 2}


def convert(reader: ConversationReader, key: str, image: bytes, text: bytes) -> Item:
    """Do to a record what our loader does."""
    return Item(reader(RawRecord(key, image, text)), key.partition("-")[0], 0)


def _of_tar(reader: ConversationReader, sample: dict[str, Any]) -> Item:
    return convert(reader, sample["__key__"], sample["jpg"], sample["json"])


def _of_rows(reader: ConversationReader, rows: list[dict[str, Any]]) -> Batch:
    return collate([convert(reader, row["key"], row["image"], row["text"]) for row in rows])


def _of_examples(reader: ConversationReader, examples: list[dict[str, Any]]) -> Batch:
    # The library has parsed the JSON; writing it again takes some microseconds.
    items = [
        convert(reader, example["__key__"], example["jpg"]["bytes"], json.dumps(example["json"]).encode())
        for example in examples
    ]
    return collate(items)


def _webdataset(shards: list[str], reader: ConversationReader, batch_size: int, workers: int) -> Iterator[Batch]:
    stream = webdataset.WebDataset(shards, shardshuffle=False)
    batches = stream.map(partial(_of_tar, reader)).batched(batch_size, collation_fn=collate)
    return iter(DataLoader(batches, batch_size=None, **loader_options(workers)))


def _litdata(folder: str, reader: ConversationReader, batch_size: int, workers: int) -> Iterator[Batch]:
    from litdata import StreamingDataLoader, StreamingDataset

    stream = StreamingDataset(folder, shuffle=False)
    collation = partial(_of_rows, reader)
    options = loader_options(workers)
    return iter(StreamingDataLoader(stream, batch_size=batch_size, collate_fn=collation, **options))


def _parquet(files: list[str], reader: ConversationReader, batch_size: int, workers: int) -> Iterator[Batch]:
    from datasets import load_dataset

    stream: Any = load_dataset("parquet", data_files=files, split="train", streaming=True)
    collation = partial(_of_rows, reader)
    return iter(DataLoader(stream, batch_size=batch_size, collate_fn=collation, **loader_options(workers)))


def _tars(shards: list[str], reader: ConversationReader, batch_size: int, workers: int) -> Iterator[Batch]:
    from datasets import Image, load_dataset

    stream: Any = load_dataset("webdataset", data_files=shards, split="train", streaming=True)
    stream = stream.cast_column("jpg", Image(decode=False))
    collation = partial(_of_examples, reader)
    return iter(DataLoader(stream, batch_size=batch_size, collate_fn=collation, **loader_options(workers)))


def _row(record: RawRecord) -> dict[str, Any]:
    return {"key": record.key, "image": record.image, "text": record.text}


def _write_litdata(folder: Path, records: list[RawRecord]) -> None:
    """Write litdata's chunks, of about the size of a shard of WebDataset's recipe or of an eighth of the records."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    size = sum(len(record.image or b"") for record in records) // 8
    writer = BinaryWriter(str(folder), chunk_bytes=min(size, 64 << 20))
    for number, record in enumerate(records):
        writer[number] = _row(record)
    writer.done()
    writer.merge()


def _write_parquet(folder: Path, records: list[RawRecord]) -> None:
    """Write as many parquet files as there are shards."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    each = len(records) // SHARDS
    for number in range(SHARDS):
        rows = [_row(record) for record in records[number * each : (number + 1) * each]]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{number:05d}.parquet")


def peers(
    sources: tuple[StreamSource, ...], folder: Path, reader: ConversationReader, batch_size: int
) -> tuple[dict[str, Make], list[str]]:
    """Write what the peers read, and return their loaders by name and a line for each one that is left out."""
    shards = [str(shard.path) for source in sources for shard in source.shards]
    found: dict[str, Make] = {"webdataset": partial(_webdataset, shards, reader, batch_size)}
    missing = [f"{name}: not installed, left out" for name in ("litdata", "datasets") if not installed(name)]
    if installed("litdata"):
        if not (folder / "litdata").exists():
            _write_litdata(folder / "litdata", in_memory(sources))
        found["litdata"] = partial(_litdata, str(folder / "litdata"), reader, batch_size)
    if installed("datasets"):
        if not (folder / "parquet").exists():
            _write_parquet(folder / "parquet", in_memory(sources))
        files = sorted(str(file) for file in (folder / "parquet").iterdir())
        found["datasets, parquet"] = partial(_parquet, files, reader, batch_size)
        found["datasets, tars"] = partial(_tars, shards, reader, batch_size)
    return found, missing
