"""Where the elements of a JSON list lie, found block by block, and whether what stands between its texts is JSON."""

from __future__ import annotations

import re
from array import array
from pathlib import Path

import numpy as np

from pgp_lightning.errors import DataError

__all__ = ["HOLE", "ListScan", "damaged"]

HOLE = "zeros: this part of the file was never written"

_DEEPEST = 1 << 20  # brackets in brackets; the parser gives up long before
# What ends a stretch between texts, in an element and between elements. In JSON these are brackets, quotes and commas:
# numbers and true, false, null, NaN, Infinity are made of the characters passed over.
_NESTED, _LISTED = re.compile(rb"[^\s,:0-9+\-.eEtrufalsnNIiy]"), re.compile(rb"[^\s:0-9+\-.eEtrufalsnNIiy]")
_QUOTED = re.compile(rb'["\\\0]')
_TEXTS = re.compile(rb'(?:"[^"\\\0]*+(?:\\.[^"\\\0]*+)*+"[\s,:]*+)++', re.DOTALL)  # whole ones at once, for speed alone
_OPENING = {b"}": ord("{"), b"]": ord("[")}


def damaged(file: Path, byte: int, line: int, what: str) -> DataError:
    """Return the error about a file that is damaged."""
    return DataError(
        f"{file}: damaged at byte {byte}, line {line}: {what}. How many records that concerns cannot be told, so none "
        f"is used: repair the file, or fetch it again"
    )


class ListScan:
    """The pass over a file that is one list; `feed` it all blocks, then ask for `elements`.

    An element may be no JSON inside, but never so that another could be hidden in it: brackets pair, elements have
    commas between them, and nothing but brackets, quotes, commas and bare values stands outside of texts. After a quote
    that is missing, or not escaped, texts and what lies between them change places, and the next word is refused.

    Args:
        file: its name, for messages.
        start: its bytes before the first block, such as a mark of UTF-8.
    """

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        self._bounds = array("q")  # of the opening bracket, of the list's own commas, of the closing bracket
        self._lines = array("q")
        self._open = bytearray()  # the brackets that are not closed yet
        self._quoted = self._closed = False
        self._element: int | None = None  # line in which the element begins, None between elements
        self._offset, self._place, self._text = start, 0, b""
        self._line, self._counted = 1, 0

    def feed(self, block: bytes) -> None:
        """Go on with the next block.

        Raises:
            DataError: if the list is no JSON, or something follows it.
        """
        self._text += block
        while not self._closed:
            pattern = _QUOTED if self._quoted else _NESTED if len(self._open) > 1 else _LISTED
            if (found := pattern.search(self._text, self._place)) is None:
                self._place = len(self._text)
                break
            if self._quoted and found.group() == b"\\":
                if found.end() == len(self._text):  # what it escapes is in the next block
                    self._place = found.start()
                    break
                self._place = found.end() + 1
                continue
            if not self._quoted and len(self._open) > 1 and (texts := _TEXTS.match(self._text, found.start())):
                self._place = texts.end()
                continue
            if problem := self._step(found.group(), found.start()):
                raise self._damaged(found.start(), problem)
            self._place = found.end()
        if self._closed and (rest := self._text[self._place :].lstrip()):
            place = len(self._text) - len(rest)
            raise self._damaged(place, "something follows the list, where one JSON list was expected")
        self._line_at(self._place)
        self._offset += self._place
        self._text, self._place, self._counted = self._text[self._place :], 0, 0

    def elements(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the spans of all elements, int64 (n, 2), and the lines they begin in, int64 (n,).

        Raises:
            DataError: if the list is not closed.
        """
        if not self._closed:
            raise self._damaged(0, f"the list is not closed, {len(self._bounds)} records from its begin")
        bounds = np.array(self._bounds, dtype=np.int64)
        return np.stack([bounds[:-1] + 1, bounds[1:]], axis=1), np.array(self._lines, dtype=np.int64)

    def _step(self, mark: bytes, place: int) -> str:
        """Take one mark, and return what is wrong with it."""
        if mark == b"\0":
            return HOLE
        if self._quoted:  # the quote that closes a text
            self._quoted = False
            return ""
        if mark == b",":
            self._bound(place)
            return ""
        if mark in _OPENING:
            if not self._open or self._open.pop() != _OPENING[mark]:
                return "a bracket is closed that was not opened"
            if not self._open:
                self._bound(place)
                self._closed = True
            return ""
        if mark not in b'"[{':
            return f"{mark.decode('latin-1')!r} outside of any text: before it a quote is missing, or is not escaped"
        if len(self._open) == 1:
            if self._element is not None:
                return "a comma is missing between two records"
            self._element = self._line_at(place)
        if mark == b'"':
            self._quoted = True
            return ""
        self._open += mark
        if len(self._open) == 1:
            self._bounds.append(self._offset + place)
        return "brackets in brackets without end" if len(self._open) > _DEEPEST else ""

    def _bound(self, place: int) -> None:
        """Note where an element ends."""
        line = self._line_at(place)
        self._lines.append(line if self._element is None else self._element)
        self._bounds.append(self._offset + place)
        self._element = None

    def _line_at(self, place: int) -> int:
        """Return the line of a place, which is not before the last one that was asked for."""
        self._line += self._text.count(b"\n", self._counted, place)
        self._counted = place
        return self._line

    def _damaged(self, place: int, what: str) -> DataError:
        return damaged(self.file, self._offset + place, self._line_at(place), what)
