"""Shards: read by position, and refused when damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from data_world import PictureBuilder

from pgp_lightning.data import shards
from pgp_lightning.data.index import Shard
from pgp_lightning.data.shards import ShardReader, verify_source
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import DataError


def test_records_come_back_in_any_order(tmp_path: Path) -> None:
    builder = PictureBuilder("a", 10)
    index = write_source(tmp_path / "a", builder, 4, progress=False)
    assert index.samples == 10 and verify_source(tmp_path / "a") == index
    reader = ShardReader(capacity=1)
    for number in (9, 0, 5, 3, 8):
        raw = reader.read(index.shards[number // 4], number % 4)
        key, image, _, record = builder[number]
        assert (raw.key, raw.image, json.loads(raw.text or b"")) == (key, image, record)
        assert len(reader._tables) == 1


def test_damage_is_found(tmp_path: Path) -> None:
    index = write_source(tmp_path / "a", PictureBuilder("a", 4), 4, progress=False)
    shard = index.shards[0]
    good = shard.path.read_bytes()
    shard.path.write_bytes(good[:-1000])
    for check in (index.check_files, lambda: ShardReader(1).read(shard, 0)):
        with pytest.raises(DataError, match=r"a-00000.tar has \d+ bytes, index.json promises \d+: delete .* again"):
            check()
    shard.path.write_bytes(good.replace(b"not", b"NOT").replace(b"q0", b"q9"))
    index.check_files()
    with pytest.raises(DataError, match=r"a-00000.tar has another SHA-256"):
        verify_source(tmp_path / "a")
    shard.path.unlink()
    for check in (index.check_files, lambda: ShardReader(1).read(shard, 0)):
        with pytest.raises(DataError, match=r"a-00000.tar is missing"):
            check()
    with pytest.raises(DataError, match=r"index.json does not exist"):
        verify_source(tmp_path / "none")


def tar_of(path: Path, members: list[tuple[str, bytes]], samples: int, mode: str = "w") -> Shard:
    """Write a tar by hand."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return Shard(path, samples, path.stat().st_size, "")


def test_shards_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [("../up/a.PNG", b"i"), ("../up/a.json", b"{}"), ("noextension", b"x"), ("b.json", b"{}"), ("c.txt", b"t")]
    shard = tar_of(tmp_path / "odd.tar", pair, 3)
    found = [ShardReader(1).read(shard, number) for number in range(3)]
    assert [(raw.key, raw.image, raw.text) for raw in found] == [
        ("a", b"i", b"{}"),
        ("b", None, b"{}"),
        ("c", None, None),
    ]

    with pytest.raises(DataError, match="promises 5 records, the shard has 3: noextension: a name without"):
        ShardReader(1).read(Shard(shard.path, 5, shard.bytes, ""), 0)
    with pytest.raises(DataError, match="two members have one name"):
        ShardReader(1).read(tar_of(tmp_path / "twice.tar", [("a.json", b""), ("a.json", b"")], 1), 0)
    with pytest.raises(DataError, match="cannot be read as a plain tar"):
        ShardReader(1).read(tar_of(tmp_path / "packed.tar", pair, 3, mode="w:gz"), 0)
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(DataError, match=r"a\.png has 11 bytes, the limit is 10"):
        ShardReader(1).read(tar_of(tmp_path / "big.tar", [("a.png", b"12345678901")], 1), 0)


def test_a_shard_cut_inside_its_last_member_with_a_matching_index(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "cut.tar", [("a.png", b"i" * 2000), ("a.json", b"x" * 2000)], 1)
    data = shard.path.read_bytes()[:4000]
    shard.path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as a plain tar"):
        ShardReader(1).read(Shard(shard.path, 1, len(data), ""), 0)
