"""Shards of one's own: what WebDataset reads is read, any other is named by rule, and nothing is to be deleted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from data_world import PictureBuilder, picture
from test_hostile import write_index
from test_shards import tar_of

from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.shards import ShardReader, verify_source
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import DataError
from pgp_lightning.tools import main

TEXT = json.dumps({"turns": [{"question": "q", "answer": "a"}]}).encode()


def own(folder: Path, names: list[str], samples: int) -> Path:
    """Write a source by hand, of members with these names."""
    folder.mkdir(parents=True)
    tar_of(folder / "a.tar", [(name, TEXT if name.endswith("json") else picture()) for name in names], samples)
    write_index(folder, samples)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["a.json", "a.png", "b.png", "b.json"],
        ["./a.png", "./a.json", "./b.json", "./b.png"],
        ["./a.png", "a.json", "././b.json", "b.png"],
        ["v1.0/a.png", "v1.0/a.json", "v1.1/b.png", "v1.1/b.json"],
        ["a.png", "a.json", "a.txt", ".hidden", "b.txt", "b.png", "b.json"],
        ["a.png", "a.seg.png", "a.json", "b.png", "b.json"],
    ],
)
def test_what_webdataset_reads_is_read(tmp_path: Path, names: list[str]) -> None:
    index = verify_source(own(tmp_path / "s", names, 2))
    found = [ShardReader(1).read(index.shards[0], number) for number in (0, 1)]
    assert [(raw.key, raw.image, raw.text) for raw in found] == [("a", picture(), TEXT), ("b", picture(), TEXT)]


BROKEN = {
    "dots": (
        [f"page.v2.{n}.{kind}" for n in range(3) for kind in ("jpg", "json")],
        "page.v2.0.jpg: the key ends at the first dot, so 3 images share the key 'page': rename",
    ),
    "apart": (
        ["a.png", "b.png", "c.png", "a.json", "b.json", "c.json"],
        "the members of the key 'a' do not stand together (they are number 1, 4 of the tar)",
    ),
    "twice": (["a.png", "a.png", "a.json", "b.json", "c.json"], "two members have one name, a.png"),
    "no extension": (["a.png", "a.json", "b.png", "b.json", "c"], "c: a name without an extension"),
    "fewer": (["a.png", "a.json"], "copy it again from where it came from, or correct index.json"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_the_broken_rule_is_said_and_no_data_is_to_be_deleted(
    tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names, told = BROKEN[rule]
    own(tmp_path / "out/train/s", names, 3)
    content = {"name": "m", "licence": "none", "root": str(tmp_path / "out"), "splits": {"train": [{"name": "s"}]}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert main(["shards", "verify", str(tmp_path / "m.yaml")]) == 1
    error = capsys.readouterr().err
    assert told in error and "a.tar" in error and not re.search("delete|remove|build", error), error


def spoil(shard: Shard, how: str) -> None:
    if how == "missing":
        shard.path.unlink()
    elif how == "cut":
        shard.path.write_bytes(shard.path.read_bytes()[:3000])
    elif how == "changed":
        shard.path.write_bytes(shard.path.read_bytes().replace(b"q0", b"q9"))
    elif how == "no tar":
        shard.path.write_bytes(b"x" * shard.bytes)
    elif how == "report":
        (shard.path.parent / "rejected.jsonl").write_text("[]\n")
    else:
        (shard.path.parent / "index.json").write_text({"no json": "{", "version": '{"version": 0}'}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "changed", "no tar", "no json", "version", "report"])
@pytest.mark.parametrize("rebuildable", [False, True])
def test_only_what_can_be_built_again_is_to_be_deleted(tmp_path: Path, how: str, rebuildable: bool) -> None:
    index = write_source(tmp_path / "a", PictureBuilder("a", 4), 4, progress=False)
    if how == "report":
        value = json.loads((tmp_path / "a/index.json").read_text())
        value["rejected"], value["shards"][0]["rejected"] = {"bad-image": 1}, 1
        (tmp_path / "a/index.json").write_text(json.dumps(value))
    spoil(index.shards[0], how)
    with pytest.raises(DataError) as caught:
        verify_source(tmp_path / "a", rebuildable=rebuildable)
    advice = f"delete {tmp_path / 'a'}, and build or fetch it again"
    assert (advice in str(caught.value)) == rebuildable and ("delete" in str(caught.value)) == rebuildable
    if how in ("missing", "cut", "no tar"):
        with pytest.raises(DataError) as caught:
            ShardReader(1).read(Index.load(tmp_path / "a", rebuildable=rebuildable).shards[0], 0)
        assert (advice in str(caught.value)) == rebuildable
