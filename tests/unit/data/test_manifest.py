"""Manifests and indices: what is read, and how mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_world import PictureBuilder

from pgp_lightning.data.manifest import Index, Manifest
from pgp_lightning.data.shards import build_source, make_builder, write_source
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


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("licence:", "license:", "license: unknown key: did you mean 'licence'"),
        ("allowed_rejects", "allowed_reject", r"splits.train\[0\].allowed_reject: .* did you mean 'allowed_rejects'"),
        ("class_path", "class", r"splits.train\[1\].build.class: unknown key"),
        ("name: tiny", "name: ''", "name: expected a non-empty string"),
        ("name: tiny", "", "name: this key is required"),
        ("repeat: 0.5", "repeat: -1", r"splits.train\[0\].repeat: expected a number from 0"),
        ("repeat: 0.5", "repeat: yes", r"splits.train\[0\].repeat: expected a number from 0"),
        ("repeat: 0.5", "repeat: 0", r"splits.train\[0\].repeat: .* leave the source out"),
        ("allowed_rejects: 0}", "allowed_rejects: 2}", "expected a number from 0 to 1, got 2"),
        ("samples_per_shard: 3", "samples_per_shard: 0", "samples_per_shard: expected an integer of at least 1"),
        ("init_args: {name: b, size: 7}", "init_args: [1]", "init_args: expected a mapping"),
        ("data_world.PictureBuilder", "PictureBuilder", "expected `package.module.Class`"),
        ("- name: b", "- name: a", "'a' appears twice"),
        ("- name: b", "- name: ../b", "expected a plain name without slashes"),
        ("    - name: a", "", r"splits.val: expected a non-empty list"),
        ("name: tiny", "name: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError, match=message) as caught:
        Manifest.load(write(tmp_path, GOOD.replace(before, after)))
    assert "tiny.yaml" in str(caught.value)


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
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=message):
            Index.load(tmp_path / "a")
    file.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        Index.load(tmp_path / "a")
