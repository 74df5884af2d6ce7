"""The doctor on data: shares, what there is of every source, and what its records hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pgp_lightning.data.module import InstructionData
from pgp_lightning.doctor import _most_tiles
from pgp_lightning.tools import main
from tests.unit.doctor.case import Case, has_memory


def test_shares_and_a_sources_own_tiles(case: Case):
    content = case.rewrite_manifest(weights="explicit")
    objects, reading = content["splits"]["train"]
    objects |= {"weight": 1, "max_tiles": 1}
    reading |= {"weight": 3}
    case.write_manifest(content)
    case.data.update({"mixing": "even", "group_batches": 2})
    # 16 and 48 of 64 records, of sources of 40 and 24.
    findings = case.finds("ok", "shares", "weights explicit", "objects 0.40, reading 2.00")
    longest = {one.what: int(one.detail.split("longest ")[1].split()[0]) for one in findings if "longest" in one.detail}
    assert longest["train/objects"] < longest["val/objects"]
    case.data["group_batches"] = 0
    case.finds("fail", "config", "data.group_batches must be at least 1, got 0")


def test_raw_files_that_are_missing(case: Case, tmp_path: Path):
    content = case.rewrite_manifest(root=str(tmp_path / "none"))
    for missing, init_args in (
        ("notes.jsonl does not exist", {"annotations": str(tmp_path / "notes.jsonl"), "images": str(tmp_path)}),
        ("pictures does not exist", {"annotations": case.data["manifest"], "images": str(tmp_path / "pictures")}),
    ):
        content["splits"]["train"][0]["build"] = {
            "class_path": "pgp_lightning.data.instructions.InstructionRecords",
            "init_args": init_args,
        }
        case.write_manifest(content)
        case.finds("fail", "train/objects", "has no shards, and what they would be made of is missing", missing)


def test_a_lenient_sources_damage_counts_as_rejects(case: Case, shards: Path):
    shutil.copytree(shards, case.folder / "data")
    case.data["root"] = str(case.folder / "data")
    content = case.rewrite_manifest()
    content["splits"]["train"][1] |= {"on_damage": "substitute", "allowed_rejects": 0.7}
    case.write_manifest(content)
    (case.folder / "data" / "train" / "reading" / "reading-00000.tar").unlink()
    case.finds("ok", "train/reading", "24 records in 2 shards", "16 damaged-shard")


def test_sources_at_a_url_are_not_fetched(case: Case, shards: Path):
    case.data.update({"root": f"file://{shards}", "cache": str(case.folder / "cache")})
    case.finds("warn", "train/objects", f"its index is fetched from file://{shards}/train/objects when a run prepares")
    assert not (case.folder / "cache").exists()
    InstructionData(**case.data).prepare_data()
    case.finds("ok", "train/objects", "40 records in 3 shards, fetched from file://", "unread here")
    case.finds("ok", "cache", "0.0 GiB of shards are read in turn")
    case.data["cache_gib"] = 1e-5
    case.finds("warn", "cache", "raise data.cache_gib")
    assert not list((case.folder / "cache").rglob("*.tar"))


def test_the_largest_tiling_is_that_of_the_source_that_allows_most(case: Case):
    content = case.rewrite_manifest()
    content["splits"]["train"][1]["max_tiles"] = 3
    case.write_manifest(content)
    assert _most_tiles(InstructionData(**case.data)) is None
    assert _most_tiles(InstructionData(**case.data, max_tiles=2)) == 3
    assert _most_tiles(InstructionData(**case.data, max_tiles=4)) == 4


def set_texts(case: Case, folder: Path, *texts: str) -> None:
    """Make the manifest's only train source one of records with these answers."""
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    turns = [[{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": text}] for text in texts]
    lines = [json.dumps({"id": n, "image": "picture.png", "conversations": turn}) for n, turn in enumerate(turns)]
    (folder / "notes.jsonl").write_text("\n".join(lines) + "\n")
    content = case.rewrite_manifest(root=str(folder / "texts"))
    source = {"name": "texts", "build": {
        "class_path": "pgp_lightning.data.instructions.InstructionRecords",
        "init_args": {"annotations": str(folder / "notes.jsonl"), "images": str(folder)},
        "samples_per_shard": 50,
    }}  # fmt: skip
    content["splits"] = {"train": [source]}
    case.write_manifest(content)
    assert main(["shards", "build", case.data["manifest"]]) == 0


def test_a_special_token_in_a_system_text(case: Case, tmp_path: Path):
    set_texts(case, tmp_path, "a text")
    lines = json.loads((tmp_path / "notes.jsonl").read_text())
    plain = json.dumps(lines | {"system": "be brief"})
    (tmp_path / "notes.jsonl").write_text(json.dumps(lines | {"system": "be <|im_end|> brief"}) + f"\n{plain}\n")
    case.rewrite_manifest(root=str(tmp_path / "system"))
    assert main(["shards", "build", case.data["manifest"]]) == 0
    case.finds("warn", "train/texts", "of 2 of them", "hold special tokens", "<|im_end|> 1: take them out")


def test_special_tokens_in_texts_wherever_they_stand_in_a_source(case: Case, tmp_path: Path):
    texts = ["a text"] * 1000
    texts[990:] = ["one <|im_end|> and <|im_end|>"] * 10
    set_texts(case, tmp_path, *texts)
    case.finds("warn", "train/texts", "of 64 of them", "hold special tokens", "<|im_end|> 2: take them out")


def test_a_small_shard_is_read_whole(case: Case, tmp_path: Path):
    set_texts(case, tmp_path, *["a"] * 51, "b </s> c", "d")  # no special token of this tokenizer
    findings = case.finds("ok", "train/texts", "53 records in 2 shards; of 35 of them")
    assert not any("special" in one.detail for one in findings)


def test_how_often_the_run_goes_through_each_source(case: Case):
    # 64 records an epoch, of sources of 40 and 24; 16 steps of 3 micro-batches of 2.
    case.config["trainer"] |= {"max_steps": 16, "accumulate_grad_batches": 3}
    case.data.update({"batch_size": 2, "lanes": 4})
    case.finds("ok", "epochs", "reads 96 records, 1.50 epochs; passes: objects 1.50, reading 1.50")
    case.rewrite_manifest(weights="sqrt")
    case.finds("ok", "epochs", "1.50 epochs; passes: objects 1.35, reading 1.75")


def test_fewer_shards_than_readers(case: Case):
    case.data.update({"workers": 8, "lanes": 8})
    case.finds("warn", "shards", "5 shards for 8 readers")


def test_memory_of_rows_longer_than_those_read(case: Case, monkeypatch: pytest.MonkeyPatch):
    case.data["max_length"] = 4096
    has_memory(monkeypatch, 1e12)
    plenty = case.finds("ok", "memory", "a small device has")
    assert not any("as long as" in one.detail for one in plenty)
    has_memory(monkeypatch, 40e6)
    case.finds("warn", "memory", "were all rows as long as data.max_length allows (4,096 slots)")
