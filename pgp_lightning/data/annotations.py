"""Annotation files: where each record lies, found in one pass, so that no file is ever in memory as a whole.

JSON lines are cut at their line ends (LF, CR LF or CR), a list at the commas between its elements; which of the two a
file is, its first character says, not its name. The pass looks at nothing else and keeps three numbers a record, so
neither a line without end nor brackets without bottom take memory: such a record is refused when it is asked for, by
its length or by the parser.

Damage to the file is not one bad record: it may hide any number of them. So a file is refused as a whole, with the byte
and the line, if a list is no JSON between its records (after a quote that is not escaped, texts and what lies between
them change places), if a line holds a second record behind a whole one, if the last line ends in the middle of one, if
a part of it was never written (zeros, wherever they stand), and if it is compressed, UTF-16, or another kind of file.
What cannot be told from one bad record counts as one: a line that is cut off within a text and goes on with the next
record is one `bad-json`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pgp_lightning.data.json_list import HOLE, ListScan, damaged
from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.errors import DataError

__all__ = ["MAX_RECORD_BYTES", "Annotations"]

MAX_RECORD_BYTES = 4 << 20  # the longest record of the public mixtures has some 100 kB
_BLOCK = 1 << 20
_HEAD = 1 << 16
_SPREAD_OBJECT = re.compile(rb'\s*\{[ \t]*[\r\n]\s*"')
# How files begin that are no annotations, and what to do.
_OTHERS = {
    b"\x1f\x8b": "is compressed by gzip: unpack it (gunzip -k); records are read by their place, for which a file has "
    "to be plain",
    b"BZh": "is compressed by bzip2: unpack it (bunzip2 -k)",
    b"\xfd7zXZ": "is compressed by xz: unpack it (unxz -k)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it (unzstd)",
    b"PK\x03\x04": "is a ZIP archive: unpack it",
    b"PAR1": "is Parquet: write it as JSON lines (datasets' to_json), its images as files",
    b"ARROW1": "is Arrow: write it as JSON lines (datasets' to_json), its images as files",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file: fetch it (git lfs pull)",
    codecs.BOM_UTF16_LE: "is UTF-16: write it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "is UTF-16: write it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


@dataclass(frozen=True)
class Annotations:
    """The records of an annotation file; build it by `scan`.

    Args:
        file: JSON lines or a JSON list, UTF-8.
        spans: first byte and the one after the last of every record, int64 (n, 2).
        lines: the line of every record's first byte, from 1, int64 (n,).
        sha256: of the file.
    """

    file: Path
    spans: np.ndarray
    lines: np.ndarray
    sha256: str

    @classmethod
    def scan(cls, file: Path) -> Annotations:
        """Find the records of a file: elements of a list if it begins with `[`, else lines; blank lines are none.

        Raises:
            FileNotFoundError: if there is no such file.
            DataError: if it is another kind of file, or damaged, naming the byte and the line.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, or is no file: give the path of the annotations")
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
            _check_kind(file, head)
            start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            is_list = head[start:].lstrip().startswith(b"[")
            opened.seek(0)
            digest.update(opened.read(start))
            blocks = _blocks(opened, digest)
            spans, lines = _elements(ListScan(file, start), blocks) if is_list else _line_spans(file, blocks, start)
            if is_list and len(spans) == 1 and not _read(opened, *spans[0].tolist()).strip():
                spans, lines = spans[:0], lines[:0]
        found = cls(file, spans, lines, digest.hexdigest())
        if not is_list:
            found._check_end()
        return found

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, number: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            UnusableRecord: if it is too large, not UTF-8, or no JSON object.
            DataError: if what stands in its place is several records.
        """
        start, stop = self.spans[number].tolist()
        with self.file.open("rb") as opened:
            data = _read(opened, start, stop)
        if stop - start > MAX_RECORD_BYTES:
            self._check_single(number, data.decode("utf-8", "replace"))
            raise UnusableRecord("record-too-large", f"{stop - start} bytes, the limit is {MAX_RECORD_BYTES}")
        try:
            text = data.decode("utf-8-sig")  # a mark may also stand where files were joined
        except UnicodeDecodeError as error:
            raise UnusableRecord("bad-encoding", f"expected UTF-8: {error}") from error
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._check_single(number, text)
            raise UnusableRecord("bad-json", str(error)) from error
        if not isinstance(value, dict):
            raise UnusableRecord("bad-json", f"expected an object, got {type(value).__name__}")
        return value

    def _check_single(self, number: int, text: str) -> None:
        """Refuse a file of which a line holds a second record behind a whole one."""
        text = text.lstrip()
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return
        if text[end:].lstrip("\ufeff, \t\r").startswith("{"):
            raise self._damage(int(self.spans[number, 0]), number, "two records in one line: a line end is missing")

    def _check_end(self) -> None:
        """Refuse JSON lines that end in the middle of a record."""
        start, stop = self.spans[-1].tolist() if len(self) else (0, -1)
        if stop != self.file.stat().st_size or stop - start > MAX_RECORD_BYTES:
            return  # there is a line end behind it, or nothing can be said
        with self.file.open("rb") as opened:
            data = _read(opened, start, stop)
        try:
            json.loads(data)
        except (ValueError, RecursionError) as error:
            what = f"the file ends in the middle of a record ({error})"
            raise self._damage(start, len(self) - 1, what) from error

    def _damage(self, byte: int, number: int, what: str) -> DataError:
        return damaged(self.file, byte, int(self.lines[number]), what)


def _check_kind(file: Path, head: bytes) -> None:
    """Refuse what is no annotation file."""
    told = next((told for start, told in _OTHERS.items() if head.startswith(start)), None)
    if told is None and b"\0" in head[:4]:
        told = "is UTF-16 or UTF-32, or no text: write it as UTF-8 (iconv)"
    if told is None and _SPREAD_OBJECT.match(head.removeprefix(codecs.BOM_UTF8)):
        told = "begins with an object over several lines: write one record a line (jq -c .), or one list of records"
    if told is not None:
        raise DataError(f"{file} {told}; expected JSON lines or one JSON list of records, UTF-8")


def _read(opened: BinaryIO, start: int, stop: int) -> bytes:
    opened.seek(start)
    return opened.read(min(stop - start, MAX_RECORD_BYTES))


def _blocks(opened: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    """Yield a file in pieces, none of which ends between CR and LF, hashing them."""
    while block := opened.read(_BLOCK):
        while block.endswith(b"\r") and (more := opened.read(1)):
            block += more
        digest.update(block)
        yield block


def _elements(scan: ListScan, blocks: Iterator[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the spans of a list's elements, int64 (n, 2), and their lines, int64 (n,)."""
    for block in blocks:
        scan.feed(block)
    return scan.elements()


def _line_spans(file: Path, blocks: Iterator[bytes], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the spans of all lines that are not blank, int64 (n, 2), and their numbers, int64 (n,)."""
    spans: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    offset, line, begun = start, 1, False  # `begun`: the line that began in an earlier block is not blank
    for block in blocks:
        octets = np.frombuffer(block, np.uint8)
        ends = octets == ord("\n")
        returns = octets == ord("\r")
        returns[:-1] &= ~ends[1:]
        stops = np.flatnonzero(ends | returns)
        if (hole := block.find(b"\0")) >= 0:
            raise damaged(file, offset + hole, line + int(np.searchsorted(stops, hole)), HOLE)
        filled = np.concatenate([[0], np.cumsum(octets > ord(" "), dtype=np.int32)])
        counts = filled[np.append(stops, len(octets))] - filled[np.concatenate([[0], stops + 1])]
        counts[0] += begun
        firsts = np.concatenate([[start], stops + 1 + offset])
        kept = counts[:-1] > 0
        spans.append(np.stack([firsts[:-1], stops + offset], axis=1)[kept])
        numbers.append(line + np.flatnonzero(kept))
        start = int(firsts[-1])
        offset, line, begun = offset + len(octets), line + len(stops), bool(counts[-1])
    if begun:
        spans.append(np.array([[start, offset]]))
        numbers.append(np.array([line]))
    return (
        np.concatenate([np.empty((0, 2)), *spans]).astype(np.int64),
        np.concatenate([np.empty(0), *numbers]).astype(np.int64),
    )
