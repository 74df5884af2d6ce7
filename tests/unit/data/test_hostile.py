"""Shards by someone who means harm: nothing is written, memory stays bounded, every record is counted."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from data_world import WordProcessor, picture

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.index import Index
from pgp_lightning.data.loader import EvaluationLoader
from pgp_lightning.data.mixture import StreamSource
from pgp_lightning.errors import DataError

GOOD = {"turns": [{"question": "what colour", "answer": "red"}]}
MIB = 1 << 20


def png_of(width: int, height: int) -> bytes:
    """Return the header of a picture of any size, and nothing to fill it with."""
    data = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")


def text_of(record: object) -> bytes:
    return json.dumps(record).encode()


# Name of the record's members, its image and its JSON, and why it is left out; None for one that is used.
RECORDS: list[tuple[str, bytes, bytes, str | None]] = [
    ("good", picture(), text_of(GOOD), None),
    ("../../../up", picture(), text_of(GOOD), None),  # a name is only a name: nothing is written under it
    ("/etc/absolute", picture(), text_of(GOOD), None),
    ("n\udcffame", picture(), text_of(GOOD), None),
    ("id", picture(), text_of({**GOOD, "id": "\ud800"}), None),
    ("nested", picture(), b"[" * MIB, "bad-record"),
    ("wide", picture(), b"[" + b"{}," * (3 * MIB) + b"{}]", "bad-record"),
    ("digits", picture(), b'{"turns": ' + b"9" * MIB + b"}", "bad-record"),
    ("latin", picture(), text_of(GOOD).replace(b"red", b"r\xe9d"), "bad-record"),
    ("surrogate", picture(), text_of({"turns": [{"question": "\ud800", "answer": "red"}]}), "bad-text"),
    ("kind", picture(), text_of({"turns": [{**GOOD["turns"][0], "type": "\ud800"}]}), "bad-text"),
    ("bomb", png_of(100_000, 100_000), text_of(GOOD), "bad-image"),
    ("line", png_of(2**31 - 1, 1), text_of(GOOD), "bad-image"),
    ("packed", zlib.compress(bytes(MIB)), text_of(GOOD), "bad-image"),
    ("page", b"<svg onload='x()'/>", text_of(GOOD), "bad-image"),
]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for key, value in fields.items():
        setattr(header, key, value)
    tar.addfile(header, io.BytesIO(data) if data else None)


def write_index(folder: Path, samples: int) -> None:
    tar = folder / "a.tar"
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shard = {"file": "a.tar", "samples": samples, "bytes": tar.stat().st_size, "sha256": digest}
    content = {"version": 1, "source": folder.name, "samples": samples, "shards": [shard], "builder": {}}
    (folder / "index.json").write_text(json.dumps(content))


def write_hostile(folder: Path) -> None:
    """Write a shard of the records above, among members that are no files."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, image, text, _ in RECORDS:
            add(tar, f"{name}.png", image)
            add(tar, f"{name}.json", text)
        outside = str(folder.parent / "outside")
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.json", type=tarfile.LNKTYPE, linkname="good.json")
        add(tar, outside, type=tarfile.DIRTYPE)
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "device.png", type=tarfile.CHRTYPE)
    write_index(folder, len(RECORDS))


def source(folder: Path, **settings: object) -> StreamSource:
    return StreamSource("hostile", Index.load(folder).shards, allowed_rejects=1.0, **settings)  # type: ignore[arg-type]


def loader(folder: Path, workers: int = 0) -> EvaluationLoader:
    reader = ConversationReader(WordProcessor(), max_pixels=1_000_000)
    return EvaluationLoader((source(folder),), reader, 4, workers=workers)


def test_every_record_is_used_or_counted_and_nothing_is_written(tmp_path: Path) -> None:
    write_hostile(tmp_path / "hostile")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    used, rejected = [], Counter[str]()
    for batch in loader(tmp_path / "hostile"):
        used += batch.keys
        rejected.update(batch.rejected)
    assert used == ["good", "up", "absolute", "n\\udcffame", "id"]
    assert rejected == Counter(f"hostile/{reason}" for *_, reason in RECORDS if reason)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


HUGE = 10 << 30


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.REGTYPE, "has 10737418240 bytes, the limit is"),
        (tarfile.XHDTYPE, "a header of 10737418240 bytes"),
        (tarfile.XGLTYPE, "a header of 10737418240 bytes"),
        (tarfile.GNUTYPE_LONGNAME, "a header of 10737418240 bytes"),
        (tarfile.GNUTYPE_LONGLINK, "a header of 10737418240 bytes"),
    ],
)
def test_a_member_that_declares_ten_gigabytes(tmp_path: Path, kind: bytes, words: str) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    header = tarfile.TarInfo("a.png")
    header.size, header.type = HUGE, kind
    with (folder / "a.tar").open("wb") as file:  # a hole: it takes no room on the disk
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + HUGE + 1024)
    shard = {"file": "a.tar", "samples": 1, "bytes": 512 + HUGE + 1024, "sha256": "0" * 64}
    content = {"version": 1, "source": "hostile", "samples": 1, "shards": [shard], "builder": {}}
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        list(loader(folder))


PEAK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_hostile import loader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batches = list(loader(Path(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    write_hostile(tmp_path / "hostile")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "hostile"), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) / 1024 < 100, "MiB above what importing takes"  # 'wide' alone would take 200
