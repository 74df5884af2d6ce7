"""Roots that are URLs: which are taken, what lies inside them, and what is kept out of messages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.roots import file_inside, folder_inside, public, root_url
from pgp_lightning.errors import ConfigError, DataError

TEXT = """\
name: far
licence: MIT
root: ROOT
splits:
  train:
    - name: geoqa+
      build: {class_path: no.such.Builder}
"""


def write(folder: Path, root: str, text: str = TEXT) -> Path:
    """Write a manifest with a root."""
    file = folder / "far.yaml"
    file.write_text(text.replace("ROOT", json.dumps(root)))
    return file


@pytest.mark.parametrize("root", ["data/mine", "/data/mine", "./a:b", "../x", "C:\\data", "~/data", "a/b:c"])
def test_folders_are_folders(root: str) -> None:
    assert root_url(root) is None


@pytest.mark.parametrize(
    ("root", "url"),
    [
        ("s3://bucket/some/folder/", "s3://bucket/some/folder"),
        ("gs://bucket", "gs://bucket"),
        ("https://host.example:8443/a/b", "https://host.example:8443/a/b"),
        ("https://user:secret@host/a", "https://user:secret@host/a"),
        ("HTTPS://host/a", "https://host/a"),
        ("hf://datasets/OWNER/NAME@main/shards", "hf://datasets/OWNER/NAME@main/shards"),
        ("file:///data/x", "file:///data/x"),
        ("http://localhost:8000/x", "http://localhost:8000/x"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
    ],
)
def test_allowed_urls(root: str, url: str) -> None:
    assert root_url(root) == url


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("ftp://host/x", "one of the schemes s3, gs, https, hf, file, got 'ftp://host/x'"),
        ("data:v2/x", r"a folder with a colon in its name is written \./data:"),
        ("memory://x", "one of the schemes"),
        ("github://org:repo@main/x", "one of the schemes"),
        ("simplecache::s3://bucket/x", "one of the schemes"),
        ("https://host/a::file:///etc", "'::'"),
        ("http://example.org/x", "http is for this machine only .localhost., got the host 'example.org'"),
        ("http://localhost.example.org/x", "this machine only"),
        ("http://localhost@example.org/x", "got the host 'example.org'"),
        ("http://127.1/x", "this machine only"),
        ("http://0.0.0.0/x", "this machine only"),
        ("http:///x", "this machine only"),
        ("https:///x", "expected https://HOST/FOLDER"),
        ("https:host/x", "expected https://HOST/FOLDER"),
        ("s3:bucket/x", "expected s3://BUCKET/FOLDER"),
        ("s3:///x", "expected s3://BUCKET/FOLDER"),
        ("file://host/x", "expected file:///FOLDER"),
        ("file:x", "expected file:///FOLDER"),
        ("https://host:port/x", "is not a URL"),
        ("https://[host/x", "is not a URL"),
        ("https://host/x?sig=secret", "one with .* 'https://host/x'$"),
        ("https://host/x#part", "the URL of a folder"),
        ("https://host/a b", "without spaces"),
        ("https://host/a\nb", "without spaces"),
        ("s3://bucket/*/x", "without spaces"),
        ("https://user:secret@host/x y", "got 'https://host/x y'$"),
        ("https://user:sec/secret@host/x", "a port is a number; in a password, '/' is written %2F"),
        ("https://user:12/secret@host/x", "got 'https://.../host/x': write '/' in a password as %2F"),
        ("http://user:12/secret@localhost/x", "write '/' in a password as %2F"),
        ("https://user:secret@host/x@y", "got 'https://.../y': .* and '@' as %40 in a password and in a path"),
        ("pipe:cat /data/{file}", "set data.allow_pipe=true on the command line"),
        ("PIPE:cat /data/{file}", "set data.allow_pipe=true"),
    ],
)
def test_refused_urls_name_file_line_and_key(tmp_path: Path, root: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        root_url(root)
    assert "secret" not in str(told.value)
    with pytest.raises(ConfigError, match=rf"far\.yaml:3: root: (?s:.*){message}"):
        Manifest.load(write(tmp_path, root))
    with pytest.raises(ConfigError, match=r"far\.yaml:3: root: (?s:.*)this root was given in place of the manifest"):
        Manifest.load(write(tmp_path, "somewhere"), root=root)


def test_a_pipe_needs_the_callers_word(tmp_path: Path) -> None:
    root = "pipe:ssh host cat '/data/{file}'"
    assert root_url(root, allow_pipe=True) == root
    (source,) = Manifest.load(write(tmp_path, root), allow_pipe=True).sources("train")
    assert source.url == "pipe:ssh host cat '/data/train/geoqa+/{file}'"
    assert file_inside(source.url, "geoqa+-00000.tar") == "pipe:ssh host cat '/data/train/geoqa+/geoqa+-00000.tar'"
    for bad in ("pipe:cat /data", "pipe:cat {file}\nrm x", "pipe:"):
        with pytest.raises(ConfigError, match=r"far\.yaml:3: root: expected `pipe:COMMAND` in one line"):
            Manifest.load(write(tmp_path, bad), allow_pipe=True)
    with pytest.raises(ConfigError, match=r"far\.yaml:4: allow_pipe: unknown key"):
        Manifest.load(write(tmp_path, root, TEXT.replace("splits:", "allow_pipe: true\nsplits:")))


@pytest.mark.parametrize("name", ["a b", "a;b", "$(a)", "a'b", "a?b", "a#b", "a%2e", "..", ".a", "-a", "a/b", "", "é"])
def test_names_that_a_url_or_a_shell_would_understand(tmp_path: Path, name: str) -> None:
    for inside in (file_inside, folder_inside):
        with pytest.raises(ValueError, match="expected letters, digits"):
            inside("s3://bucket/x", name)
    text = TEXT.replace("geoqa+", json.dumps(name))
    with pytest.raises(ConfigError, match=r"far\.yaml:6: splits\.train\[0\]\.name: expected "):
        Manifest.load(write(tmp_path, "s3://bucket/x", text))


def test_sources_and_shards_of_a_url(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, "https://user:secret@host/a/"), cache=tmp_path / "cache")
    (source,) = manifest.sources("train")
    assert (manifest.url, source.url) == ("https://user:secret@host/a", "https://user:secret@host/a/train/geoqa+")
    assert manifest.root.parent == tmp_path / "cache" and source.folder == manifest.root / "train" / "geoqa+"
    other = Manifest.load(manifest.file, root="s3://bucket/a", cache=tmp_path / "cache")
    assert other.root != manifest.root and other.root.parent == manifest.root.parent
    assert not source.built and not (tmp_path / "cache").exists()
    with pytest.raises(
        ConfigError, match=r"does not exist: it is fetched from https://host/a/train/geoqa\+ when"
    ) as told:
        source.index()
    assert "secret" not in str(told.value)
    source.folder.mkdir(parents=True)
    shard = {"file": "geoqa+-00000.tar", "samples": 2, "bytes": 10240, "sha256": "0"}
    value = {"version": 1, "source": "geoqa+", "samples": 2, "builder": {}, "shards": [shard]}
    (source.folder / "index.json").write_text(json.dumps(value))
    (found,) = source.index().shards  # though the shard itself is not there
    assert found.url == "https://user:secret@host/a/train/geoqa+/geoqa+-00000.tar"
    assert found.path == source.folder / "geoqa+-00000.tar"
    assert Index.load(source.folder).shards[0].url is None
    shard["file"] = "$(touch x).tar"
    (source.folder / "index.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"index\.json: shards\[0\]\.file: expected letters, digits"):
        source.index()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:p@ss@host/x?sig=1#z", "https://host/x"),
        ("https://user:p@ss@host/x@y?sig=1#z", "https://.../y"),
        ("https://user:pa/ss@host/x", "https://.../host/x"),
        ("https://us/er:pass@host/x", "https://.../host/x"),
        ("https://user:12/34@host/x", "https://.../host/x"),
        ("https://user:pa?ss@host/x", "https://..."),
        ("https://host:1/x?sig=a@b", "https://..."),
        ("https:user:pass@host/x", "https:host/x"),
        ("https://token@host/x@y", "https://host/x@y"),
        ("hf://datasets/OWNER/NAME@main/x", "hf://datasets/OWNER/NAME@main/x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("file:///x", "file:///x"),
        ("pipe:curl -H 'Authorization: me' https://host/{file}", "pipe:curl ..."),
        ("pipe:", "pipe: ..."),
        ("mailto:someone", "mailto:someone"),
    ],
)
def test_public_urls_hold_no_secrets(url: str, shown: str) -> None:
    assert public(url) == shown


def test_what_is_printed_of_sources_and_shards_holds_no_secrets(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, "https://user:secret@host/a"), cache=tmp_path / "cache")
    (source,) = manifest.sources("train")
    shard = Shard(tmp_path / "kept.tar", 1, 5, "0" * 64, f"{source.url}/a.tar")
    assert "secret" not in f"{manifest!r} {source!r} {shard!r}" and shard.shown == "https://host/a/train/geoqa+/a.tar"
    assert replace(shard, url=None).shown == str(tmp_path / "kept.tar")
    piped = replace(shard, url="pipe:curl -u user:secret https://host/train/a.tar")
    assert piped.shown == "pipe:curl ... a.tar"
