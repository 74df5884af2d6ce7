"""Annotation files: where each record lies, found in one pass, so that no file is ever in memory as a whole.

JSON lines are cut at their line ends, a `.json` list at the commas between its elements. The pass looks at nothing
else and keeps two numbers a record, so neither a line without end nor brackets without bottom take memory: such a
record is refused when it is asked for, by its length or by the parser.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.errors import DataError

__all__ = ["MAX_RECORD_BYTES", "Annotations"]

MAX_RECORD_BYTES = 4 << 20  # the longest record of the public mixtures has some 100 kB
_BLOCK = 1 << 20
# What matters between texts, inside a text, and between the elements of the list itself.
_NESTED, _QUOTED, _LISTED = re.compile(rb'["{}\[\]]'), re.compile(rb'["\\]'), re.compile(rb'[",{}\[\]]')


@dataclass(frozen=True)
class Annotations:
    """The records of an annotation file; build it by `scan`.

    Args:
        file: JSON lines or a JSON list, UTF-8.
        spans: first byte and the one after the last of every record, int64 (n, 2).
        sha256: of the file.
    """

    file: Path
    spans: np.ndarray
    sha256: str

    @classmethod
    def scan(cls, file: Path) -> Annotations:
        """Find the records of a file: a list in a `.json` that begins with `[`, else one a line; empty lines are none.

        Raises:
            FileNotFoundError: if there is no such file.
            DataError: if a list is not closed, or something follows it.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, or is no file: give the path of the annotations")
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            head = opened.read(1 << 16)
            start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            is_list = file.suffix == ".json" and head[start:].lstrip().startswith(b"[")
            opened.seek(0)
            blocks = _blocks(opened, digest)
            spans = _list_spans(blocks, file) if is_list else _line_spans(blocks, start)
            if is_list and len(spans) == 1 and not _read(opened, *spans[0].tolist()).strip():
                spans = spans[:0]
        return cls(file, spans, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, number: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            UnusableRecord: if it is too large, not UTF-8, or no JSON object.
        """
        start, stop = self.spans[number].tolist()
        if stop - start > MAX_RECORD_BYTES:
            raise UnusableRecord("record-too-large", f"{stop - start} bytes, the limit is {MAX_RECORD_BYTES}")
        with self.file.open("rb") as opened:
            data = _read(opened, start, stop)
        try:
            value = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UnusableRecord("bad-encoding", f"expected UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UnusableRecord("bad-json", str(error)) from error
        if not isinstance(value, dict):
            raise UnusableRecord("bad-json", f"expected an object, got {type(value).__name__}")
        return value


def _read(opened: BinaryIO, start: int, stop: int) -> bytes:
    opened.seek(start)
    return opened.read(min(stop - start, MAX_RECORD_BYTES))


def _blocks(opened: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    """Yield a file in pieces, hashing them."""
    while block := opened.read(_BLOCK):
        digest.update(block)
        yield block


def _line_spans(blocks: Iterator[bytes], start: int) -> np.ndarray:
    """Return the spans of all lines that are not empty, int64 (n, 2)."""
    found: list[np.ndarray] = []
    offset = 0
    for block in blocks:
        stops = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset
        offset += len(block)
        if len(stops):
            spans = np.stack([np.concatenate([[start], stops[:-1] + 1]), stops], axis=1)
            found.append(spans[spans[:, 1] > spans[:, 0]])
            start = int(stops[-1]) + 1
    if offset > start:
        found.append(np.array([[start, offset]]))
    return np.concatenate([np.empty((0, 2)), *found]).astype(np.int64)


def _list_spans(blocks: Iterator[bytes], file: Path) -> np.ndarray:
    """Return the spans of all elements of a list, int64 (n, 2)."""
    bounds = array("q")  # of the opening bracket, of every comma of the list itself, of the closing bracket
    depth, quoted, closed, offset, kept = 0, False, False, 0, b""
    for block in blocks:
        text = kept + block
        place, kept = 0, b""
        while not closed:
            found = (_QUOTED if quoted else _LISTED if depth <= 1 else _NESTED).search(text, place)
            if found is None:
                break
            place, mark = found.end(), found.group()
            if mark == b"\\":
                if place == len(text):  # what it escapes is in the next block
                    kept = mark
                    break
                place += 1
            elif mark == b'"':
                quoted = not quoted
            else:
                depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b",": 0}[mark]
                if depth == 0 or (depth == 1 and (mark == b"," or not bounds)):
                    bounds.append(offset + place - 1)
                closed = depth == 0
        if closed and text[place:].strip():
            raise DataError(f"{file}: something follows the list, at byte {offset + place}: expected one JSON list")
        offset += len(text) - len(kept)
    if not closed:
        raise DataError(f"{file}: the list is not closed, {len(bounds)} records from its begin: fetch the file again")
    ends = np.array(bounds, dtype=np.int64)
    return np.stack([ends[:-1] + 1, ends[1:]], axis=1)
