"""A record before it is a conversation: as a builder makes it, as a shard holds it, and why it may be unusable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pgp_lightning.errors import DataError

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_MEMBER_BYTES",
    "MAX_TEXT_BYTES",
    "RawRecord",
    "SampleBuilder",
    "UnusableRecord",
    "parse_text",
]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_MEMBER_BYTES = 64 << 20
MAX_TEXT_BYTES = 8 << 20  # of a record's JSON, which takes some twenty times as much when it is parsed


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class UnusableRecord(DataError):
    """A record that cannot be used.

    Args:
        reason: a short stable slug.
        detail: what was found, for people; the same whenever it is looked at, so addresses of objects are taken out.
        key: the record's key, where it is known.
        where: what else leads to it, such as `file`, `line`, `id` and `image`.
    """

    def __init__(self, reason: str, detail: str, key: str = "", where: Mapping[str, str | int] | None = None) -> None:
        detail = _ADDRESS.sub("", detail)
        super().__init__(reason, detail, key, where)
        self.reason, self.detail, self.key, self.where = reason, detail, key, dict(where or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@runtime_checkable
class SampleBuilder(Protocol):
    """What makes the records of a source; named by a manifest's `build:`, picklable when several processes write.

    If it also has `reasons`, all those of its `UnusableRecord`s, a manifest's `expected_rejects` are checked by them.
    """

    def __len__(self) -> int:
        """Return the number of records, those that turn out to be unusable included."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        """Return key, encoded image, the image's extension, and the record; a pure function of the index.

        Raises:
            UnusableRecord: if there is no such thing; the record is then left out and counted.
        """

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, all that the records depend on.

        Raises:
            FileNotFoundError: if what they are made of is not on this machine; finished shards are then taken as found.
        """


@dataclass(frozen=True)
class RawRecord:
    """A record as it lies in a shard; None stands for a member that is not there."""

    key: str
    image: bytes | None
    text: bytes | None


def parse_text(text: bytes | None) -> object:
    """Return a record's JSON.

    Raises:
        ValueError: if there is none, or it is longer or nested deeper than any honest one.
    """
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, the limit is {MAX_TEXT_BYTES}")
    try:
        return json.loads(text or b"")
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
