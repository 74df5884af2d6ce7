"""Shards: written the same every time, all or nothing, and refused when damaged."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from data_world import FailingBuilder, PictureBuilder

from pgp_lightning.data import shards
from pgp_lightning.data.manifest import Index, Shard
from pgp_lightning.data.shards import ShardReader, verify_source, write_source
from pgp_lightning.errors import ConfigError, DataError


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_builder_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, workers in (("one", 0), ("two", 0), ("three", 2)):
        write_source(tmp_path / folder / "a", PictureBuilder("a", 10), 4, progress=False, workers=workers)
    assert contents(tmp_path / "one/a") == contents(tmp_path / "two/a") == contents(tmp_path / "three/a")
    with tarfile.open(tmp_path / "one/a/a-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


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


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lights out"):
        write_source(tmp_path / "a", FailingBuilder("a", 10), 2, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_uses_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Barrier(2)  # both have written everything before either renames
    original = shards._write_shards

    def together(*args: Any) -> list[dict[str, Any]]:
        entries = original(*args)
        start.wait(timeout=30)
        return entries

    monkeypatch.setattr(shards, "_write_shards", together)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write_source, tmp_path / "a", PictureBuilder("a", 5), 2, False) for _ in range(2)]
        first, second = (job.result() for job in jobs)
    assert first == second == verify_source(tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists but has no index\.json"):
        write_source(tmp_path / "a", PictureBuilder("a", 5), progress=False)
    assert contents(tmp_path / "a") == {"thesis.tex": b"precious"}
    (tmp_path / "b").mkdir()
    assert write_source(tmp_path / "b", PictureBuilder("b", 5), progress=False).samples == 5


class OddBuilder(PictureBuilder):
    """Makes the same key and extension for every record."""

    key, extension = "same", "png"

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        return self.key, b"", self.extension, {}


@pytest.mark.parametrize(
    ("key", "extension"), [("same", "png"), ("a.b", "png"), ("../a", "png"), ("", "png"), ("a", "gif")]
)
def test_keys_and_extensions_that_cannot_be_read_back(tmp_path: Path, key: str, extension: str) -> None:
    builder = OddBuilder("a", 2)
    object.__setattr__(builder, "key", key)
    object.__setattr__(builder, "extension", extension)
    with pytest.raises(ConfigError, match=r"record [01]: expected"):
        write_source(tmp_path / "a", builder, progress=False)
    with pytest.raises(ConfigError, match="cannot write 0 records"):
        write_source(tmp_path / "b", PictureBuilder("b", 0), progress=False)


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

    with pytest.raises(DataError, match="promises 5 records, the shard ends after 3"):
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


def test_index_lists_what_was_written(tmp_path: Path) -> None:
    index = write_source(tmp_path / "a", PictureBuilder("a", 5), 2, progress=False)
    assert Index.load(tmp_path / "a") == index
    assert [(shard.path.name, shard.samples) for shard in index.shards] == [
        ("a-00000.tar", 2),
        ("a-00001.tar", 2),
        ("a-00002.tar", 1),
    ]
    assert index.builder == {"name": "a", "size": 5, "broken": []}
