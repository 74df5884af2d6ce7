"""Manifests and indices: what is read, and how mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_world import PictureBuilder

from pgp_lightning.data.index import Index
from pgp_lightning.data.manifest import Manifest, Upstream
from pgp_lightning.data.writing import build_source, make_builder, write_source
from pgp_lightning.errors import ConfigError, DataError

GOOD = """
name: tiny
licence: Apache-2.0
description: three pictures
root: somewhere
splits:
  train:
    - {name: a, repeat: 0.5, allowed_rejects: 0}
    - name: b
      build: {class_path: data_world.PictureBuilder, init_args: {name: b, size: 7}, samples_per_shard: 3}
  val:
    - name: a
"""


def write(folder: Path, text: str) -> Path:
    """Write a manifest."""
    file = folder / "tiny.yaml"
    file.write_text(text)
    return file


def test_reads_a_manifest(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, GOOD))
    a, b = manifest.sources("train")
    assert (manifest.name, manifest.licence, manifest.root) == ("tiny", "Apache-2.0", Path("somewhere"))
    assert (a.folder, a.repeat, a.allowed_rejects, a.build) == (Path("somewhere/train/a"), 0.5, 0.0, None)
    assert (b.repeat, b.allowed_rejects) == (1.0, 0.01)
    assert b.build is not None and b.build.samples_per_shard == 3
    assert manifest.sources("val")[0].folder == Path("somewhere/val/a")
    assert Manifest.load(manifest.file, root=tmp_path).sources("val")[0].folder == tmp_path / "val" / "a"
    with pytest.raises(ConfigError, match=r"splits\.test is missing: the manifest has train, val"):
        manifest.sources("test")


FULL = """
name: tiny
licence: Apache-2.0
root: somewhere
weights: explicit
splits:
  train:
    - name: a
      weight: 0.25
      max_tiles: 6
      on_damage: substitute
      upstream:
        annotations: a.jsonl
        images: a/images
        records: 1_000
        from: OWNER/NAME
        licence: MIT
        verified: true
        note: for people
    - {name: b, weight: 3, upstream: {note: nothing is known}}
  val:
    - name: a
"""


def test_reads_all_keys_of_a_source(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, FULL))
    a, b = manifest.sources("train")
    assert (manifest.weights, a.weight, b.weight) == ("explicit", 0.25, 3.0)
    assert (a.max_tiles, a.on_damage, b.max_tiles, b.on_damage) == (6, "substitute", None, "fail")
    assert a.upstream == Upstream("a.jsonl", "a/images", 1000, "OWNER/NAME", "MIT", True, "for people")
    assert b.upstream == Upstream(note="nothing is known") and b.upstream.verified is False
    (val,) = manifest.sources("val")
    assert (a.expected_records, b.expected_records, val.expected_records) == (1000, None, None)
    assert (val.weight, val.upstream, val.url, manifest.url) == (None, None, None, None)
    assert Manifest.load(write(tmp_path, GOOD)).weights == "count"


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("licence:", "license:", 3, "license: unknown key: did you mean 'licence'"),
        (
            "allowed_rejects",
            "allowed_reject",
            8,
            r"splits.train\[0\].allowed_reject: .* did you mean 'allowed_rejects'",
        ),
        ("class_path", "class", 10, r"splits.train\[1\].build.class: unknown key"),
        ("name: tiny", "name: ''", 2, "name: expected a non-empty string"),
        ("name: tiny\n", "", 2, "name: this key is required"),
        ("root: somewhere\n", "", 2, "root: this key is required"),
        ("splits:\n", "weights: []\nsplits:\n", 6, r"weights: expected one of count, sqrt, explicit, got \[\]"),
        ("repeat: 0.5", "repeat: -1", 8, r"splits.train\[0\].repeat: expected a number from 0"),
        ("repeat: 0.5", "repeat: yes", 8, r"splits.train\[0\].repeat: expected a number from 0"),
        ("repeat: 0.5", "repeat: 0", 8, r"splits.train\[0\].repeat: .* leave the source out"),
        ("allowed_rejects: 0}", "allowed_rejects: 2}", 8, "expected a number from 0 to 1, got 2"),
        ("repeat: 0.5", "expected_rejects: 1", 8, r"splits.train\[0\].expected_rejects: expected a mapping, got 1"),
        (
            "repeat: 0.5",
            "expected_rejects: {text-only: 8}",
            8,
            r"expected_rejects.text-only: expected a number",
        ),
        ("repeat: 0.5", "max_tiles: 0", 8, r"splits.train\[0\].max_tiles: expected an integer of at least 1, got 0"),
        ("repeat: 0.5", "max_tiles: null", 8, r"splits.train\[0\].max_tiles: expected an integer .* got None"),
        ("repeat: 0.5", "on_damage: skip", 8, r"splits.train\[0\].on_damage: expected one of fail, substitute"),
        (
            "repeat: 0.5",
            "weight: 1",
            8,
            r"splits.train\[0\].weight: the manifest has `weights: count`, a weight would do",
        ),
        ("- name: a", "- {name: a, weight: 1}", 12, r"splits.val\[0\].weight: only train is mixed"),
        ("repeat: 0.5", "upstream: x", 8, r"splits.train\[0\].upstream: expected a mapping with the keys annotations"),
        ("repeat: 0.5", "upstream: {records: 0}", 8, r"splits.train\[0\].upstream.records: expected an integer"),
        ("repeat: 0.5", "upstream: {verified: 1}", 8, r"splits.train\[0\].upstream.verified: expected true or false"),
        ("repeat: 0.5", "upstream: {from: }", 8, r"splits.train\[0\].upstream.from: expected a non-empty string"),
        ("repeat: 0.5", "upstream: {license: x}", 8, r"splits.train\[0\].upstream.license: .* mean 'licence'"),
        ("samples_per_shard: 3", "samples_per_shard: 0", 10, "samples_per_shard: expected an integer of at least 1"),
        ("init_args: {name: b, size: 7}", "init_args: [1]", 10, "init_args: expected a mapping"),
        ("data_world.PictureBuilder", "PictureBuilder", 10, "expected `package.module.Class`"),
        ("- name: b", "- name: a", 9, "'a' appears twice"),
        ("- name: b", "- name: ../b", 9, "expected a plain name without slashes"),
        ("    - name: a", "", 11, r"splits.val: expected a non-empty list"),
        ("  val:", "  vol:", 11, "splits.vol: unknown key: did you mean 'val'"),
        ("name: tiny", "name: [", 4, "cannot be read as YAML"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, before: str, after: str, line: int, message: str) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError, match=rf"tiny\.yaml:{line}: .*{message}"):
        Manifest.load(write(tmp_path, GOOD.replace(before, after)))


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("      weight: 0.25\n", "", 8, "weight: this key is required, as the manifest has `weights: explicit`"),
        ("weight: 0.25", "weight: 0", 9, "weight: expected a number above 0: leave the source out"),
        ("weight: 0.25", "weight: -1", 9, "weight: expected a number from 0 to inf, got -1"),
        ("weight: 0.25", "weight: .inf", 9, "weight: expected a number from 0 to inf, got inf"),
        ("weights: explicit", "weights: sqrt", 9, "weight: the manifest has `weights: sqrt`"),
        ("weights: explicit\n", "", 8, "weight: the manifest has `weights: count`"),
    ],
)
def test_weights_go_with_explicit_only(tmp_path: Path, before: str, after: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiny\.yaml:{line}: splits.train\[0\].{message}"):
        Manifest.load(write(tmp_path, FULL.replace(before, after)))


def test_a_missing_manifest_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist in /"):
        Manifest.load(tmp_path / "none.yaml")


def test_missing_shards_are_built_or_named(tmp_path: Path) -> None:
    a, b = Manifest.load(write(tmp_path, GOOD), root=tmp_path / "data").sources("train")
    with pytest.raises(
        ConfigError, match=r"source 'a' of split 'train': .*a/index.json does not exist: write its shards"
    ):
        build_source(a, progress=False)
    with pytest.raises(ConfigError, match="built when a run prepares its data"):
        b.index()
    assert build_source(b, progress=False) == b.index() == build_source(b, progress=False)
    assert [shard.samples for shard in b.index().shards] == [3, 3, 1]
    changed = Manifest.load(write(tmp_path, GOOD.replace("size: 7", "size: 8")), root=tmp_path / "data")
    with pytest.raises(ConfigError, match=r"built with other settings: size \(there 7, now 8\)"):
        build_source(changed.sources("train")[1], progress=False)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("data_world.PictureBuilder", "data_world.Missing", "cannot be imported"),
        ("data_world.PictureBuilder", "no_such_module.Missing", "cannot be imported"),
        ("size: 7", "sizes: 7", "refuses its init_args"),
        ("data_world.PictureBuilder, init_args: {name: b, size: 7}", "collections.Counter", "must have __len__"),
    ],
)
def test_builders_that_cannot_be_made(tmp_path: Path, before: str, after: str, message: str) -> None:
    manifest = Manifest.load(write(tmp_path, GOOD.replace(before, after)), root=tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_builder(manifest.sources("train")[1])


def test_an_index_that_is_wrong_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "a", PictureBuilder("a", 3), progress=False)
    file = tmp_path / "a" / "index.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"version": 2}, "version: expected 1, got 2"),
        ({"samples": 4}, "samples: expected the shards' sum 3, got 4"),
        ({"shards": [{**good["shards"][0], "file": "../x.tar"}]}, r"shards\[0\].file: expected a plain name"),
        ({"shard": []}, "shard: unknown key: did you mean 'shards'"),
        (
            {"shards": [{**good["shards"][0], "rejected": -1}]},
            r"shards\[0\].rejected: expected an integer of at least 0",
        ),
        ({"shards": [{**good["shards"][0], "samples": 0}]}, r"shards\[0\].samples: expected an integer of at least 1"),
        ({"rejected": {"bad-image": 2}}, "rejected: expected the shards' sum 0, got 2"),
        ({"rejected": {"bad-image": "2"}}, "rejected: expected integers of at least 0, got '2' for 'bad-image'"),
        ({"totals": [3]}, r"totals: expected a mapping, got \[3\]"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=message):
            Index.load(tmp_path / "a")
    file.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        Index.load(tmp_path / "a")
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        Index.load(tmp_path / "a")


def test_an_index_counts_what_was_left_out(tmp_path: Path) -> None:
    write_source(tmp_path / "a", PictureBuilder("a", 3), progress=False)
    file = tmp_path / "a" / "index.json"
    value = json.loads(file.read_text())
    value |= {"rejected": {"text-only": 2}, "totals": {"turns": 6}}
    value["shards"][0]["rejected"] = 2
    file.write_text(json.dumps(value))
    index = Index.load(tmp_path / "a")
    assert (index.rejected, index.totals, index.shards[0].rejected) == ({"text-only": 2}, {"turns": 6}, 2)
    for key in ("rejected", "totals"):
        del value[key]
    del value["shards"][0]["rejected"]
    file.write_text(json.dumps(value))
    old = Index.load(tmp_path / "a")
    assert (old.rejected, old.totals, old.shards[0].rejected, old.shards[0].url) == ({}, {}, 0, None)
