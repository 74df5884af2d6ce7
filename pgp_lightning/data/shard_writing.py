"""One shard of a build: records become a tar of the same bytes every time, and an entry says that it is finished."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgp_lightning.data.records import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    SampleBuilder,
    UnusableRecord,
)
from pgp_lightning.errors import ConfigError

__all__ = ["WRITING_REASONS", "ShardTask", "file_sha256", "write_shard", "write_text"]

WRITING_REASONS = ("bad-encoding", "image-too-large", "record-too-large")  # of any builder's records

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: records first..stop-1."""

    part: Path
    file: str
    first: int
    stop: int

    @property
    def entry(self) -> Path:
        """Where the shard's entry goes once it is finished."""
        return self.part / "entries" / f"{Path(self.file).stem}.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the shard's entry if an earlier build finished it."""
        try:
            entry = json.loads(self.entry.read_text(encoding="utf-8"))
            fits = entry["samples"] + sum(entry["rejected"].values()) == self.stop - self.first
            whole = not entry["samples"] or (self.part / "files" / self.file).stat().st_size == entry["bytes"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None  # not there, or not what we write: the shard is written again
        return entry if fits and whole else None


def write_shard(builder: SampleBuilder, task: ShardTask, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write one shard, then its entry, which is returned; each appears under its name when it is complete.

    Raises:
        ConfigError: if the builder makes what cannot be read back, or memory runs out.
    """
    temporary = _temporary(task.part)
    try:
        entry = _fill(temporary, builder, task, advance)
        if entry["samples"]:
            temporary.replace(task.part / "files" / task.file)
    finally:
        temporary.unlink(missing_ok=True)
    write_text(task.part, task.entry, json.dumps(entry))
    return entry


def _fill(path: Path, builder: SampleBuilder, task: ShardTask, advance: Callable[[], None]) -> dict[str, Any]:
    """Write a tar of a task's usable records and return its entry."""
    keys: set[str] = set()
    totals = Counter(records=0, turns=0, question_characters=0, answer_characters=0, image_bytes=0, reencoded=0)
    report: list[dict[str, Any]] = []
    with path.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(task.first, task.stop):
                try:
                    key, members, sizes = _members(builder, number)
                except UnusableRecord as error:
                    found = {"record": number, "key": error.key, "reason": error.reason, "detail": error.detail}
                    report.append(error.where | found)
                except MemoryError as error:
                    raise ConfigError(
                        f"{path.parent}: memory ran out at record {number}, for which it is not left out: build again, "
                        f"with fewer workers or more memory; finished shards are kept"
                    ) from error
                else:
                    if key in keys:
                        raise ConfigError(f"record {number}: expected a new key, got {key!r} again")
                    keys.add(key)
                    totals.update(sizes)
                    for name, data in members.items():
                        header = tarfile.TarInfo(name)  # its defaults: no time, no owner, mode 0644
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))
                advance()
        file.flush()
        os.fsync(file.fileno())
    return {
        "file": task.file,
        "samples": totals["records"],
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "rejected": dict(Counter(line["reason"] for line in report)),
        "totals": dict(totals),
        "report": report,
    }


def _members(builder: SampleBuilder, number: int) -> tuple[str, dict[str, bytes], dict[str, int]]:
    """Return a record's key, its members by file name, and what it adds to the source's totals.

    Raises:
        UnusableRecord: if the record is to be left out.
        ConfigError: if the builder makes what cannot be read back.
    """
    key, image, extension, record = builder[number]
    if not _KEY.fullmatch(key):
        raise ConfigError(f"record {number}: expected a new key of up to 80 letters, digits, _ and -, got {key!r}")
    if extension not in IMAGE_EXTENSIONS:
        raise ConfigError(f"record {number}: expected an image in {IMAGE_EXTENSIONS}, got {extension!r}")
    try:
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("bad-encoding", f"a text holds half a surrogate pair ({error.reason})", key) from error
    limits = (("image-too-large", image, MAX_MEMBER_BYTES), ("record-too-large", text, MAX_TEXT_BYTES))
    for reason, data, limit in limits:
        if len(data) > limit:
            raise UnusableRecord(reason, f"{len(data)} bytes, a shard holds up to {limit}", key)
    turns = [turn for turn in record.get("turns", ()) if isinstance(turn, dict)]
    sizes = {
        "records": 1,
        "turns": len(turns),
        "question_characters": sum(len(str(turn.get("question", ""))) for turn in turns),
        "answer_characters": sum(len(str(turn.get("answer", ""))) for turn in turns),
        "image_bytes": len(image),
        "reencoded": int("reencoded" in record),
    }
    if "system" in record:  # a count that most sources do without
        sizes["system_texts"] = 1
    return key, {f"{key}.{extension}": image, f"{key}.json": text}, sizes


def _temporary(part: Path) -> Path:
    # Random: a process of a killed build may live on for a moment and must not write into our file.
    return part / f"{uuid.uuid4().hex}.tmp"


def write_text(part: Path, path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = _temporary(part)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
