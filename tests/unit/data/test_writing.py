"""Writing shards: the same bytes every time, whole or not at all, and never twice what is finished."""

from __future__ import annotations

import json
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_world import FailingBuilder, PictureBuilder
from raw_world import InterruptedBuilder, PickyBuilder, raw, turns, write_raw

from pgp_lightning.data import records, shard_writing, writing
from pgp_lightning.data.build_lock import build_lock
from pgp_lightning.data.index import Index
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.manifest import Build, Source, Upstream
from pgp_lightning.data.shards import ShardReader, verify_source
from pgp_lightning.data.writing import (
    build_source,
    build_summary,
    excess_rejects,
    listed_rejects,
    make_source,
    write_source,
)
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.tools import main


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@dataclass(frozen=True)
class AbsentBuilder(PictureBuilder):
    """Is made of files that are not on this machine."""

    def identity(self) -> dict[str, Any]:
        raise FileNotFoundError("raw.jsonl does not exist")


class OddBuilder(PictureBuilder):
    """Makes one record again and again."""

    key, image, extension, record = "same", b"", "png", {}

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        return self.key, self.image, self.extension, self.record


def odd(size: int, **attributes: Any) -> OddBuilder:
    builder = OddBuilder("a", size)
    for name, value in attributes.items():
        object.__setattr__(builder, name, value)
    return builder


def test_the_same_builder_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, workers in (("one", 0), ("two", 0), ("three", 2)):
        write_source(tmp_path / folder / "a", PickyBuilder("a", 10, (1, 6)), 4, progress=False, workers=workers)
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["a"]
    assert contents(tmp_path / "one/a") == contents(tmp_path / "two/a") == contents(tmp_path / "three/a")
    with tarfile.open(tmp_path / "one/a/a-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_index_lists_what_was_written(tmp_path: Path) -> None:
    index = write_source(tmp_path / "a", PictureBuilder("a", 5), 2, progress=False)
    assert Index.load(tmp_path / "a") == index
    assert [(shard.path.name, shard.samples) for shard in index.shards] == [
        ("a-00000.tar", 2),
        ("a-00001.tar", 2),
        ("a-00002.tar", 1),
    ]
    assert index.builder == {"name": "a", "size": 5, "broken": []}
    assert set(contents(tmp_path / "a")) == {"a-00000.tar", "a-00001.tar", "a-00002.tar", "index.json"}


def test_every_record_is_written_or_reported(tmp_path: Path) -> None:
    broken = (0, 1, 2, 5, 8, 9, 10, 12)  # of shards of three: all of 0 and nearly all of 3, the last record
    builder = PickyBuilder("a", 13, broken)
    index = write_source(tmp_path / "a", builder, 3, progress=False)
    assert verify_source(tmp_path / "a") == index
    good = [number for number in range(13) if number not in broken]
    assert index.samples == len(good) and index.rejected == {"even": 5, "odd": 3}
    # The shards' own parts of the raw records: 3 + 1 (none is left of the first three), 1, 2 + 1.
    assert [(s.path.name, s.samples, s.rejected) for s in index.shards] == [
        ("a-00001.tar", 2, 4),
        ("a-00002.tar", 2, 1),
        ("a-00003.tar", 1, 3),
    ]
    reader = ShardReader(capacity=9)
    found = [reader.read(shard, n) for shard in index.shards for n in range(shard.samples)]
    assert [raw.key for raw in found] == [f"a-{number:04d}" for number in good]
    report = [json.loads(line) for line in (tmp_path / "a/rejected.jsonl").read_text().splitlines()]
    assert report == [
        {"record": n, "key": f"a-{n:04d}", "reason": "odd" if n % 2 else "even", "detail": f"number {n}"}
        for n in broken
    ]
    turns = [turn for number in good for turn in builder[number][3]["turns"]]
    assert index.totals == {
        "records": len(good),
        "turns": len(turns),
        "question_characters": sum(len(turn["question"]) for turn in turns),
        "answer_characters": sum(len(turn["answer"]) for turn in turns),
        "image_bytes": sum(len(raw.image or b"") for raw in found),
        "reencoded": 0,
    }


def test_a_report_that_does_not_fit_the_index_is_found(tmp_path: Path) -> None:
    write_source(tmp_path / "a", PickyBuilder("a", 5, (1, 2)), 3, progress=False)
    report = tmp_path / "a/rejected.jsonl"
    lines = report.read_text().splitlines(keepends=True)
    for text, message in ((lines[0], "lists {'odd': 1}"), ("[]\n", "no report of rejected records")):
        report.write_text(text)
        with pytest.raises(DataError, match=message):
            verify_source(tmp_path / "a")
    index = Index.load(tmp_path / "a")
    for damage in ("{", "[]", '{"reason": "odd"}', "\0", "[" * 100_000, '{"reason": "odd", "record": 1, "file": "f"}'):
        report.write_text(lines[0] + damage + "\n")
        for read in (listed_rejects, lambda _: verify_source(tmp_path / "a")):
            with pytest.raises(DataError, match=r"/rejected\.jsonl is no report of rejected records, line 2: "):
                read(index)
    report.unlink()
    with pytest.raises(DataError, match=r"lists {}, index.json promises {'even': 1, 'odd': 1}"):
        verify_source(tmp_path / "a")


def test_nothing_usable_is_an_error_with_a_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 3 records is usable: even 2, odd 1\. (\S+) names them") as caught:
        write_source(tmp_path / "a", PickyBuilder("a", 3, (0, 1, 2)), 2, progress=False)
    found = re.search(r"(\S+rejected\.jsonl)", str(caught.value))
    assert found and len(Path(found[1]).read_text().splitlines()) == 3 and not (tmp_path / "a").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_keeps_what_is_finished(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="lights out"):
        write_source(tmp_path / "a", FailingBuilder("a", 10), 2, progress=False, workers=workers)
    (part,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.part", part.name) and not list(part.glob("*.tmp"))
    finished = {file.name: file.stat().st_ino for file in (part / "files").iterdir()}
    assert {"a-00000.tar", "a-00001.tar"} <= set(finished) and "a-00002.tar" not in finished
    (part / "left.tmp").write_bytes(b"half a shard")
    (part / "entries/a-00000.json").write_text('{"samples": 2, "rejected": {}, "bytes": 1}')  # not this shard's size
    (part / "entries/a-00004.json").write_text("[")
    index = write_source(tmp_path / "a", PictureBuilder("a", 10), 2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and verify_source(tmp_path / "a") == index
    now = {shard.path.name: shard.path.stat().st_ino for shard in index.shards}
    assert now["a-00001.tar"] == finished["a-00001.tar"] and now["a-00000.tar"] != finished["a-00000.tar"]
    assert "of 5 shards are finished from before" in capsys.readouterr().err
    write_source(tmp_path / "other/a", PictureBuilder("a", 10), 2, progress=False)
    assert contents(tmp_path / "other/a") == contents(tmp_path / "a")


def test_ctrl_c_is_the_business_of_the_process_that_started_the_workers(tmp_path: Path) -> None:
    index = write_source(tmp_path / "a", InterruptedBuilder("a", 6), 6, progress=False, workers=1)
    assert index.samples == 6


def test_a_failure_before_the_first_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lights out"):
        write_source(tmp_path / "a", FailingBuilder("a", 10), 10, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_settings_are_named_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        write_source(tmp_path / "a", FailingBuilder("a", 10), 2, progress=False)
    (stale,) = tmp_path.iterdir()
    (tmp_path / ".a.b.0123456789abcdef.part").mkdir()  # of a source called a.b
    before = {path: path.stat().st_mtime_ns for path in stale.rglob("*")}
    write_source(tmp_path / "a", PictureBuilder("a", 10), 3, progress=False)
    assert {path: path.stat().st_mtime_ns for path in stale.rglob("*")} == before
    error = capsys.readouterr().err
    assert f"{stale} is left from a build with other settings" in error and ".a.b." not in error


def test_of_two_builders_the_second_waits_and_uses_what_the_first_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, waiting = threading.Event(), threading.Event()
    written: list[str] = []
    original = writing.write_shard

    def slow(builder: PictureBuilder, task: shard_writing.ShardTask, *rest: Any) -> dict[str, Any]:
        written.append(task.file)
        inside.set()
        assert waiting.wait(timeout=300)
        return original(builder, task, *rest)

    def watched(file: Path, on_wait: Any) -> Any:
        return build_lock(file, lambda: (on_wait(), waiting.set()))

    monkeypatch.setattr(writing, "write_shard", slow)
    monkeypatch.setattr(writing, "build_lock", watched)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_source, tmp_path / "a", PictureBuilder("a", 5), 2, False)
        assert inside.wait(timeout=300)
        second = pool.submit(write_source, tmp_path / "a", PictureBuilder("a", 5), 2, False)
        assert first.result() == second.result() == verify_source(tmp_path / "a")
    assert sorted(written) == ["a-00000.tar", "a-00001.tar", "a-00002.tar"]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_part_whose_files_were_renamed_is_cleared_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_source(tmp_path / "a", FailingBuilder("a", 10), 2, progress=False)
    (part,) = tmp_path.iterdir()
    index = write_source(tmp_path / "a", PictureBuilder("a", 10), 2, progress=False)
    (part / "entries").mkdir(parents=True)  # as if the process had died after the rename
    assert write_source(tmp_path / "a", PictureBuilder("a", 10), 2, progress=False) == index
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists but has no index\.json"):
        write_source(tmp_path / "a", PictureBuilder("a", 5), progress=False)
    assert contents(tmp_path / "a") == {"thesis.tex": b"precious"}
    (tmp_path / "b").mkdir()
    assert write_source(tmp_path / "b", PictureBuilder("b", 5), progress=False).samples == 5


def test_finished_shards_do_without_their_raw_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no shards, and .* is missing: raw.jsonl does not exist"):
        write_source(tmp_path / "a", AbsentBuilder("a", 5), progress=False)
    index = write_source(tmp_path / "a", PictureBuilder("a", 5), progress=False)
    assert write_source(tmp_path / "a", AbsentBuilder("a", 5), progress=False) == index


@pytest.mark.parametrize(
    ("key", "extension"), [("same", "png"), ("a.b", "png"), ("../a", "png"), ("", "png"), ("a", "gif")]
)
def test_keys_and_extensions_that_cannot_be_read_back(tmp_path: Path, key: str, extension: str) -> None:
    with pytest.raises(ConfigError, match=r"record [01]: expected"):
        write_source(tmp_path / "a", odd(2, key=key, extension=extension), progress=False)
    with pytest.raises(ConfigError, match="cannot write 0 records"):
        write_source(tmp_path / "b", PictureBuilder("b", 0), progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"image": bytes(101)}, "image-too-large"),
        ({"record": {"x": "y" * 101}}, "record-too-large"),
        ({"record": {"x": "\ud800"}}, "bad-encoding"),
    ],
)
def test_what_a_reader_would_refuse_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(shard_writing, "MAX_MEMBER_BYTES", 100)
    monkeypatch.setattr(shard_writing, "MAX_TEXT_BYTES", 100)
    with pytest.raises(DataError, match=f"none of 1 records is usable: {reason} 1"):
        write_source(tmp_path / "a", odd(1, **attributes), progress=False)
    assert records.MAX_MEMBER_BYTES == 64 << 20


def test_a_source_with_too_many_rejects_is_refused(tmp_path: Path) -> None:
    build = Build("raw_world.PickyBuilder", {"name": "a", "size": 10, "broken": [1, 2, 3]})
    source = Source("a", "train", tmp_path / "a", tmp_path / "m.yaml", allowed_rejects=0.3, build=build)
    index = make_source(source, progress=False)
    assert excess_rejects(source, index) is None and build_source(source, progress=False) == index
    with pytest.raises(DataError, match=r"3 of 10 records \(30.0%\) were rejected .* 29.0%: even 1, odd 2") as caught:
        build_source(replace(source, allowed_rejects=0.29), progress=False)
    assert str(tmp_path / "a" / "rejected.jsonl") in str(caught.value)
    assert build_summary(source, index) == "10 records in, 7 used, 3 rejected (even 1, odd 2)"
    for number, said in ((10, "upstream says 10"), (12, "upstream says 12, a difference of -2")):
        assert build_summary(replace(source, upstream=Upstream(records=number)), index).endswith(f"; {said}")


def test_system_texts_are_counted(tmp_path: Path) -> None:
    lines = [raw(), raw(system="In French."), raw(conversations=[{"from": "system", "value": ""}, *turns()])]
    source = Source("s", "train", tmp_path / "s", tmp_path / "m.yaml")
    index = write_source(tmp_path / "s", InstructionRecords(**write_raw(tmp_path, lines)), progress=False)
    assert index.totals["system_texts"] == 2
    assert build_summary(source, index).endswith("; 2 with a system text of their own, in place of the chat format's")
    index = write_source(tmp_path / "t", InstructionRecords(**write_raw(tmp_path, [raw()])), progress=False)
    assert "system_texts" not in index.totals and build_summary(source, index) == "1 records in, 1 used, 0 rejected"


def test_expected_rejects_are_counted_apart(tmp_path: Path) -> None:
    build = Build("raw_world.PickyBuilder", {"name": "a", "size": 10, "broken": [1, 2, 3]})
    source = Source("a", "train", tmp_path / "a", tmp_path / "m.yaml", allowed_rejects=0.1, build=build)
    index = make_source(source, progress=False)
    assert excess_rejects(replace(source, expected_rejects={"odd": 0.2}), index) is None
    assert (
        excess_rejects(replace(source, expected_rejects={"odd": 0.2, "even": 0.1}, allowed_rejects=0.0), index) is None
    )
    for expected, told in (
        ({}, r"3 of 10 records \(30.0%\) .* allowed are 10.0%: even 1, odd 2.* raise the source's allowed_rejects"),
        ({"odd": 0.1}, r"2 of 10 records \(20.0%\) .* allowed are 10.0%: odd 2\. .* the source's expected_rejects"),
        ({"even": 0.1}, r"2 of 10 records \(20.0%\) .* allowed are 10.0%: odd 2\. .* the source's allowed_rejects"),
        ({"old": 0.9}, r"3 of 10 records"),
    ):
        assert re.search(told, excess_rejects(replace(source, expected_rejects=expected), index) or "")


def test_expected_rejects_of_no_reason_are_refused(tmp_path: Path) -> None:
    options = write_raw(tmp_path, [raw(), raw(image="", conversations=turns("What?"))])
    build = Build("pgp_lightning.data.instructions.InstructionRecords", options)
    source = Source("s", "train", tmp_path / "s", tmp_path / "m.yaml", build=build)
    for built in (False, True):  # also of shards that are there already
        with pytest.raises(ConfigError, match=r"m\.yaml: source 's' .* no reason 'text_only', .*, text-only, "):
            build_source(replace(source, expected_rejects={"text_only": 0.5, "video": 0.1}), progress=False)
        assert (tmp_path / "s").exists() == built
        build_source(replace(source, expected_rejects={"text-only": 0.5}), progress=False)
    picky = Build("raw_world.PickyBuilder", {"name": "a", "size": 4, "broken": [1]})  # does not say which it has
    source = replace(source, folder=tmp_path / "a", build=picky, expected_rejects={"odd": 0.5})
    assert build_source(source, progress=False).rejected == {"odd": 1}


def test_the_first_ten_rejects_of_a_reason_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [raw(), *(raw(id=f"\x1b[2J{n}", image=f"{n}.png") for n in range(12)), b"{", raw()]
    build = {
        "class_path": "pgp_lightning.data.instructions.InstructionRecords",
        "init_args": write_raw(tmp_path, lines),
    }
    sources = [{"name": "s", "allowed_rejects": 1.0, "build": build}]
    content = {"name": "m", "licence": "none", "root": str(tmp_path / "out"), "splits": {"train": sources}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    for _ in range(2):  # also of shards that are there already
        assert main(["shards", "build", str(tmp_path / "m.yaml")]) == 0
        out = capsys.readouterr().out
        told = [line.strip() for line in out.splitlines()]
        assert f"all of them: {tmp_path / 'out/train/s/rejected.jsonl'}" in told and "\x1b" not in out
        start = told.index("missing-image 12, the first 10 of them:")
        assert [f"image {n}.png: {tmp_path}/images/{n}.png: No such file" in told[start + 1 + n] for n in range(10)]
        assert told[start + 1].startswith(f"{tmp_path / 'notes.jsonl'}:2, id ") and told[start + 11].startswith(
            "all of"
        )
        assert told[told.index("bad-json 1:") + 1].startswith(f"{tmp_path / 'notes.jsonl'}:14: Expecting")
