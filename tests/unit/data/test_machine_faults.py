"""Faults of the machine: never a property of a record, tried again, and then they stop what reads."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from data_world import PictureBuilder, picture, stream_source
from PIL import ImageFile
from raw_world import raw, write_raw
from topologies import READER

from pgp_lightning.data import machine_faults
from pgp_lightning.data.image_files import check_picture
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.loader import EvaluationLoader
from pgp_lightning.data.machine_faults import patiently
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError

PASSING = (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_faults, "_PAUSES", (0.0, 0.0, 0.0))


class Failing:
    """Fails so many times, then returns what it is called with."""

    def __init__(self, times: int, number: int) -> None:
        self.times, self.number, self.calls = times, number, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return "there"


@pytest.mark.parametrize("number", PASSING)
def test_what_fails_for_a_moment_is_read_and_what_fails_for_ever_is_named(number: int) -> None:
    assert patiently(Path("a.png"), Failing(3, number)) == "there"
    lasting = Failing(9, number)
    with pytest.raises(ConfigError, match=rf"^a\.png cannot be read, tried 4 times: {os.strerror(number)}"):
        patiently(Path("a.png"), lasting)
    assert lasting.calls == 4


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_is_missing_is_looked_for_once(number: int) -> None:
    gone = Failing(9, number)
    with pytest.raises(OSError) as caught:
        patiently(Path("a.png"), gone)
    assert caught.value.errno == number and gone.calls == 1


def test_a_disk_that_fails_stops_a_build_which_then_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = write_raw(tmp_path, [raw(), raw(), raw(), raw(image="two.png"), raw(image="gone.png")])
    failing = tmp_path / "images" / "two.png"
    failing.symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read: EIO
    builder = InstructionRecords(**options, linked=["/proc"])
    with pytest.raises(ConfigError, match=r"images/two\.png cannot be read, tried 4 times: Input/output error"):
        write_source(tmp_path / "a", builder, 2, progress=False)
    (part,) = tmp_path.glob(".a.*.part")
    before = (part / "files" / "a-00000.tar").stat()
    failing.unlink()
    failing.write_bytes(picture(2))
    index = write_source(tmp_path / "a", InstructionRecords(**options, linked=["/proc"]), 2, progress=False)
    assert (index.samples, index.rejected) == (4, {"missing-image": 1})
    assert (tmp_path / "a" / "a-00000.tar").stat().st_ino == before.st_ino


@dataclass(frozen=True)
class HungryBuilder(PictureBuilder):
    """Needs more memory than there is for its last record."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        if index == self.size - 1:
            raise MemoryError
        return super().__getitem__(index)


def test_a_lack_of_memory_stops_a_build(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory ran out at record 4"):
        write_source(tmp_path / "a", HungryBuilder("a", 5), 2, progress=False)
    assert not (tmp_path / "a").exists()
    assert write_source(tmp_path / "a", PictureBuilder("a", 5), 2, progress=False).samples == 5


def test_a_decoder_without_memory_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: ImageFile.ImageFile) -> None:
        raise OSError("out of memory when reading image file")  # as Pillow puts the status -9 of its decoders

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        check_picture(picture(), 1000)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("stays", [False, True])  # as the place of a mount does, empty
def test_a_folder_of_images_that_goes_away_stops_a_build_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool, stays: bool
) -> None:
    options: dict[str, Any] = write_raw(tmp_path, [raw(), raw(), raw(), raw(), raw(image="gone.png")])
    folder, away = tmp_path / ("linked" if linked else "images"), tmp_path / "away"
    if linked:
        folder.mkdir()
        (tmp_path / "images" / "one.png").rename(folder / "one.png")
        (tmp_path / "images" / "one.png").symlink_to(folder / "one.png")
        options["linked"] = [str(folder)]
    read, pauses = InstructionRecords.__getitem__, []

    def drop(builder: InstructionRecords, index: int) -> Any:
        if index == 3:
            folder.rename(away)
            if stays:
                folder.mkdir()
        return read(builder, index)

    def mount() -> None:
        if stays:
            folder.rmdir()
        away.rename(folder)

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            mount()

    monkeypatch.setattr(InstructionRecords, "__getitem__", drop)
    with pytest.raises(ConfigError, match=rf"one\.png cannot be read, tried 4 times: the folder {folder} is gone"):
        write_source(tmp_path / "a", InstructionRecords(**options), 2, progress=False)
    assert len(list(tmp_path.glob(".a.*.part/files/a-00000.tar"))) == 1
    mount()
    monkeypatch.setattr(machine_faults.time, "sleep", wait)
    index = write_source(tmp_path / "a", InstructionRecords(**options), 2, progress=False)  # it comes back meanwhile
    assert (index.samples, index.rejected) == (4, {"missing-image": 1}) and len(pauses) == 2


def test_a_folder_of_shards_that_goes_away_is_no_damage(tmp_path: Path) -> None:
    write_source(tmp_path / "d", PictureBuilder("d", 4), 2, progress=False)
    source = replace(stream_source(tmp_path / "d", allowed_rejects=1.0), on_damage="substitute")
    (reader := ShardReader(2)).read(source.shards[0], 0)
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"d-00000\.tar cannot be read, tried 4 times: the folder .*/d is gone"):
        list(EvaluationLoader((source,), READER, 4))
    with pytest.raises(ConfigError, match=r"d-00000\.tar cannot be read, tried 4 times: the folder .*/d is gone"):
        reader.read(source.shards[0], 0)


@pytest.mark.parametrize("method", ["_HeaderFile", "_pieces"])
def test_a_shard_that_cannot_be_read_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_source(tmp_path / "d", PictureBuilder("d", 4), 4, progress=False)
    source = replace(stream_source(tmp_path / "d", allowed_rejects=1.0), on_damage="substitute")
    failures = Failing(2, errno.EIO)
    opened = Path.open
    modes = {"_HeaderFile": {"buffering": 0}, "_pieces": {}}

    def open_(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.suffix == ".tar" and options == modes[method]:
            failures()
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_)
    assert ShardReader(1).read(source.shards[0], 0).key == "d-0000" and failures.calls > 2
    failures.calls, failures.times = 0, 99
    with pytest.raises(ConfigError, match=r"d-00000\.tar cannot be read, tried 4 times: Input/output error"):
        list(EvaluationLoader((source,), READER, 4))
    with pytest.raises(ConfigError, match=r"tried 4 times"):
        ShardReader(1).read(source.shards[0], 0)
