"""Safetensors files seen as bytes: where a tensor's rows lie, and how files are written that no memory need hold.

safetensors' own writer wants all tensors of a file at once. Here a tensor to be written is named as rows of a stored
one, and its bytes go from file to file through a small buffer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgp_lightning.errors import ConfigError, DataError

__all__ = [
    "INDEX",
    "SINGLE",
    "Piece",
    "Stored",
    "read_folder",
    "read_header",
    "read_tensor",
    "sync_path",
    "verify_file",
    "write_file",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Large enough that calls cost nothing, small enough to stay in a processor's cache between reading and writing.
CHUNK = 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, and the byte of the file at which its data begin."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first dimension."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Piece:
    """A tensor made of rows of a stored one.

    Args:
        name: its own name.
        source: where the rows are.
        rows: ranges (first, end) of rows in the order in which they come.
    """

    name: str
    source: Stored
    rows: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The new tensor's shape."""
        return (sum(end - first for first, end in self.rows), *self.source.shape[1:])

    @property
    def size(self) -> int:
        """The new tensor's bytes."""
        return self.shape[0] * self.source.row_bytes

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the rows are in the source's file: ranges of bytes."""
        start, row = self.source.start, self.source.row_bytes
        return [(start + first * row, start + end * row) for first, end in self.rows]


def read_folder(folder: Path) -> dict[str, Stored]:
    """Find the tensors of a folder that holds one safetensors file, or shards and their index, from the headers alone.

    Raises:
        ConfigError: if the files are not there, not intact, or not those of the index.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if pickled:
            raise ConfigError(
                f"{folder} holds pickled weights ({pickled[0]}), and a pickle can run code: give a checkpoint of "
                "safetensors files"
            )
        raise ConfigError(f"expected {SINGLE} or {INDEX} in {folder}, found neither: give a checkpoint's folder")
    if (folder / SINGLE).is_file():
        raise ConfigError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is not the checkpoint")
    try:
        listed: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is no index of shards ({error!r}): download it again") from error
    found: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        # A shard's name comes from a file that was downloaded, so it must not lead out of the folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{index} names {name!r}, and {folder} has no such file: download it")
        held = read_header(folder / name)
        stated = {key for key, file in listed.items() if file == name}
        for key in sorted(stated ^ set(held)):
            says, has = ("holds it", "does not") if key in stated else ("does not list it there", "holds it")
            raise ConfigError(
                f"tensor {key!r} of {folder / name}: the index {says}, the file {has}; download both again"
            )
        found.update(held)
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """Find the tensors of one safetensors file.

    Raises:
        ConfigError: if the file is not intact, names a tensor twice, or one is not of floating point.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ConfigError(f"{file} names tensor {name!r} twice: download it again")
            found[name] = value
        return found

    try:
        # The library refuses files that are cut short, and headers with holes or wrong sizes.
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not an intact safetensors file ({error}): download it again") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length), object_pairs_hook=once)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(
                f"tensor {name!r} of {file} must be one of {', '.join(DTYPES)}, got {entry['dtype']}: "
                "give a checkpoint that is not quantised"
            )
    return {
        name: Stored(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read_tensor(piece: Piece) -> Tensor:
    """Read a tensor into memory of its own, in its stored dtype.

    Raises:
        DataError: if the file has become shorter since its header was read.
    """
    tensor = torch.empty(piece.shape, dtype=DTYPES[piece.source.dtype])
    view = memoryview(cast(Any, tensor.flatten().view(torch.uint8).numpy()))
    done = 0
    with piece.source.file.open("rb") as opened:
        for start, end in piece.spans:
            opened.seek(start)
            if opened.readinto(view[done : done + end - start]) != end - start:
                raise _cut_short(piece)
            done += end - start
    return tensor


def write_file(file: Path, pieces: Iterable[Piece], advance: Callable[[int], object]) -> None:
    """Write a safetensors file and wait until the disk has it.

    Args:
        file: to be written.
        pieces: its tensors, all of different names.
        advance: is told of bytes as they are written.

    Raises:
        DataError: if a source is shorter than its header says.
    """
    # Wide types first: a reader maps tensors in place, each at a multiple of its item size.
    ordered = sorted(pieces, key=lambda piece: -DTYPES[piece.source.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in ordered:
        offsets = [end, end := end + piece.size]
        header[piece.name] = {"dtype": piece.source.dtype, "shape": list(piece.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for piece in ordered:
            for chunk in _chunks(piece):
                opened.write(chunk)
                advance(len(chunk))
        opened.flush()
        os.fsync(opened.fileno())


def verify_file(file: Path, pieces: Sequence[Piece], advance: Callable[[int], object]) -> None:
    """Compare a written file, as the system now holds it, with what it was made of, bit for bit.

    Args:
        file: to be compared.
        pieces: the tensors it must hold, no other.
        advance: is told of bytes as they are compared.

    Raises:
        DataError: if it holds anything else.
    """
    held = read_header(file)
    if {name: (one.dtype, one.shape) for name, one in held.items()} != {
        piece.name: (piece.source.dtype, piece.shape) for piece in pieces
    }:
        raise DataError(f"{file} does not list the tensors that were written: look after the disk, and convert again")
    whole = bytearray(CHUNK)
    with file.open("rb", buffering=0) as opened:
        for piece in sorted(pieces, key=lambda piece: held[piece.name].start):
            opened.seek(held[piece.name].start)
            for chunk in _chunks(piece):
                again = whole if len(chunk) == CHUNK else bytearray(len(chunk))
                # A bytearray compares in one call, whereas two views are compared item by item.
                if opened.readinto(again) != len(chunk) or again != chunk:
                    raise DataError(
                        f"tensor {piece.name!r} of {file} is not what {piece.source.file} holds as "
                        f"{piece.source.name!r}: look after the disk, and convert again"
                    )
                advance(len(chunk))
        # Not before now: read through the page cache while it is there, it costs no disk. Other files need it more.
        with suppress(AttributeError, OSError):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _chunks(piece: Piece) -> Iterator[memoryview]:
    """Yield a tensor's bytes in order; each view lasts until the next one is asked for."""
    buffer = memoryview(bytearray(min(CHUNK, piece.size)))
    with piece.source.file.open("rb", buffering=0) as opened:
        for start, end in piece.spans:
            opened.seek(start)
            while start < end:
                count = opened.readinto(buffer[: end - start])
                if not count:
                    raise _cut_short(piece)
                start += count
                yield buffer[:count]


def _cut_short(piece: Piece) -> DataError:
    return DataError(f"{piece.source.file} ends before tensor {piece.source.name!r} does: has something changed it?")


def sync_path(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk: what is renamed then survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
