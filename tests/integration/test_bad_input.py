"""What users get wrong: one line that names the thing and the remedy, an exit code, and nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pgp_lightning.cli import main
from pgp_lightning.data.shards import verify_source
from pgp_lightning.tools import main as pgp
from tests.integration.small_run import small_config, write_config, write_manifest
from tests.tiny import save_tiny
from tests.trace import read_trace


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    error: str
    """Its error, which has to be the only one; empty if there was none."""
    out: str
    warned: str


class Case:
    """A run on data and configuration of its own, which a test may spoil.

    A tiny random model on pictures of the embedded world: the world's relevant tokens are of another tiling and left
    out, everything else is as ever.
    """

    def __init__(self, folder: Path, data: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.root, self.data, self._capsys = folder, folder / "run", folder / "data", capsys
        shutil.copytree(data, self.data)
        self.manifest = write_manifest(folder, self.data)
        self.config = small_config(self.manifest, steps=4)
        self.config["model"]["init_args"]["guide"]["init_args"]["base"] = base
        self.config["data"]["init_args"]["base"] = base

    def shard(self, source: str = "train/objects", number: int = 0) -> Path:
        return self.data / source / f"{Path(source).name}-{number:05d}.tar"

    def call(self, program: Callable[[list[str]], int], arguments: list[str]) -> Outcome:
        self._capsys.readouterr()
        try:
            code = program(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, lines = self._capsys.readouterr()
        errors = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in lines and len(errors) == (code != 0), lines
        return Outcome(code, "".join(errors), out, lines)

    def fit(self, *extra: str) -> Outcome:
        path = write_config(self.folder, self.config)
        root = f"--trainer.default_root_dir={self.root}"
        return self.call(main, ["fit", "--config", str(path), root, *extra])

    def fails(self, code: int, *words: str, extra: tuple[str, ...] = ()) -> None:
        """Fit, and expect an error with these words and nothing that could pass for a result."""
        outcome = self.fit(*extra)
        assert outcome.code == code, outcome
        for word in words:
            assert word in outcome.error, outcome.error
        assert not list(self.root.glob("**/*.ckpt"))
        assert not [path for path in self.folder.rglob("*") if path.name.endswith((".part", ".tmp"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert pgp(["shards", "build", str(write_manifest(folder, folder / "data"))]) == 0
    return folder / "data"


@pytest.fixture
def case(tmp_path: Path, shards: Path, base: str, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, shards, base, capsys)


def rewrite(shard: Path, number: int, change: Callable[[dict[str, bytes]], None]) -> str:
    """Change the members of one record of a shard, keep its index right, and return the record's key."""
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(Path(name).stem for name, _ in members))
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            record = {Path(name).suffix: data for name, data in members if Path(name).stem == key}
            if key == keys[number]:
                change(record)
            for suffix, data in record.items():
                header = tarfile.TarInfo(key + suffix)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    index = json.loads((shard.parent / "index.json").read_text())
    for entry in index["shards"]:
        if entry["file"] == shard.name:
            entry |= {"bytes": shard.stat().st_size, "sha256": sha256(shard.read_bytes()).hexdigest()}
    (shard.parent / "index.json").write_text(json.dumps(index))
    verify_source(shard.parent)
    return keys[number]


def first_turn(**texts: str) -> Callable[[dict[str, bytes]], None]:
    """Return a change of a record's first turn."""

    def change(record: dict[str, bytes]) -> None:
        content = json.loads(record[".json"])
        content["turns"][0] |= texts
        record[".json"] = json.dumps(content).encode()

    return change


def no_image(record: dict[str, bytes]) -> None:
    del record[".png"]


def half_an_image(record: dict[str, bytes]) -> None:
    record[".png"] = record[".png"][:200]


SPOILED: dict[str, Callable[[dict[str, bytes]], None]] = {
    "no-image": no_image,
    "bad-image": half_an_image,
    "too-long": first_turn(question="how many red shapes " * 20),
    "empty-answer": first_turn(answer="  "),
}


def test_good_input_works(case: Case):
    # The proof that what follows fails for its own reason.
    outcome = case.fit()
    assert outcome.code == 0 and "stopped after 4 optimiser steps" in outcome.out
    assert (case.root / "checkpoints" / "last.ckpt").is_file()


# Configuration


def test_a_mistyped_key_of_the_trainer(case: Case):
    case.config["trainer"]["max_stepz"] = case.config["trainer"].pop("max_steps")
    case.fails(2, "trainer", "max_stepz")


def test_a_mistyped_key_of_the_guide(case: Case):
    case.config["model"]["init_args"]["guide"]["init_args"]["lora_rnk"] = 8
    case.fails(2, "lora_rnk")


def test_a_mistyped_key_of_the_data(case: Case):
    case.config["data"]["init_args"]["lane"] = 8
    case.fails(2, "lane")


def test_a_value_of_the_wrong_kind(case: Case):
    case.config["model"]["init_args"]["guide"]["init_args"]["gate"] = "relu"
    case.fails(2, "gate", "relu", "sigmoid")


def test_a_mistyped_key_of_the_manifest(case: Case):
    manifest = yaml.safe_load(case.manifest.read_text())
    manifest["splits"]["train"][1]["allowed_reject"] = 0.5
    case.manifest.write_text(yaml.safe_dump(manifest))
    case.fails(2, "small.yaml", "splits.train[1]", "allowed_reject", "did you mean 'allowed_rejects'?")


def test_a_base_that_is_not_there(case: Case):
    case.config["model"]["init_args"]["guide"]["init_args"]["base"] = "models/gone"
    case.fails(2, "no model at 'models/gone'", "hf download models/gone")


def test_two_bases_that_tile_differently(case: Case):
    case.config["data"]["init_args"]["base"] = "embedded:guide"
    case.fails(2, "data.base and the guide's base must tile alike", "set both to the same model")


def test_no_schedule_of_beta(case: Case):
    callbacks = case.config["trainer"]["callbacks"]
    case.config["trainer"]["callbacks"] = [one for one in callbacks if one["class_path"] != "BetaAnnealing"]
    case.fails(2, "nothing sets beta: add BetaAnnealing to trainer.callbacks")


# Shards


def test_a_missing_shard(case: Case):
    case.shard(number=1).unlink()
    case.fails(1, "train/objects/objects-00001.tar is missing", "build or fetch it again")


def test_a_truncated_shard(case: Case):
    data = case.shard().read_bytes()
    case.shard().write_bytes(data[: len(data) // 2])
    case.fails(1, "objects-00000.tar has", f"index.json promises {len(data)}", "build or fetch it again")


def test_a_shard_that_is_no_tar(case: Case):
    size = case.shard().stat().st_size
    case.shard().write_bytes(b"x" * size)
    case.fails(1, "objects-00000.tar cannot be read as a plain tar", "build or fetch it again")


def test_shards_of_other_settings(case: Case):
    manifest = yaml.safe_load(case.manifest.read_text())
    manifest["splits"]["train"][0]["build"]["init_args"]["records"] = 41
    case.manifest.write_text(yaml.safe_dump(manifest))
    case.fails(2, "train/objects was built with other settings: records (there 40, now 41)", "Delete it")


def test_a_build_that_breaks_keeps_its_finished_shards_aside(case: Case, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(case.data)
    from pgp_lightning.embedded.records import EmbeddedRecords

    real = EmbeddedRecords.__getitem__

    def broken(self: EmbeddedRecords, index: int) -> Any:
        if self.family == "reading" and index == 20:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(EmbeddedRecords, "__getitem__", broken)
    with pytest.raises(KeyboardInterrupt):
        pgp(["shards", "build", str(case.manifest)])
    assert [path.name for path in (case.data / "train").glob("[!.]*")] == ["objects"]
    (part,) = case.data.glob("train/.reading.*.part")
    kept = part / "files" / "reading-00000.tar"  # records 0..15; the rest began with the 16th
    assert list(part.glob("files/*")) == [kept] and not list(part.glob("*.tmp"))
    inode = kept.stat().st_ino
    monkeypatch.undo()
    outcome = case.call(pgp, ["shards", "build", str(case.manifest)])
    assert outcome.code == 0 and "1 of 2 shards are finished from before" in outcome.warned
    assert case.shard("train/reading").stat().st_ino == inode and not part.exists()
    assert case.call(pgp, ["shards", "verify", str(case.manifest)]).code == 0


def test_verify_names_the_shard_with_another_content(case: Case):
    data = bytearray(case.shard("val/reading").read_bytes())
    data[700] ^= 1
    case.shard("val/reading").write_bytes(data)
    outcome = case.call(pgp, ["shards", "verify", str(case.manifest)])
    assert outcome.code == 1 and "reading-00000.tar has another SHA-256" in outcome.error


# Samples


@pytest.mark.parametrize("reason", SPOILED)
def test_a_sample_that_cannot_be_used_fails_a_run_that_allows_none(case: Case, reason: str):
    for number in range(16):
        rewrite(case.shard(), number, SPOILED[reason])
    case.fails(1, "source 'objects'", "train/objects", "cannot be used, allowed are 1.0%", reason, "allowed_rejects")


def test_below_the_limit_such_samples_are_replaced_and_counted(case: Case):
    write_manifest(case.folder, case.data, allowed_rejects=0.2)
    keys = {rewrite(case.shard(), number, change) for number, change in enumerate(SPOILED.values())}
    case.config["trainer"] |= {"max_steps": 16, "val_check_interval": 32}  # the whole epoch
    case.config["model"]["init_args"]["visual_token_share"] = 0.1
    with pytest.warns(UserWarning, match=r"a record of objects/[a-z-]+ cannot be used; another .* takes its place"):
        outcome = case.fit()
    assert outcome.code == 0, outcome
    assert "4 records could not be used and were replaced: " in outcome.out
    for reason in SPOILED:
        assert f"objects/{reason} 1" in outcome.out
    samples = [key for line in read_trace(case.root) for key, turn, _ in line["samples"] if turn == 0]
    assert len(samples) == 64 and not keys & set(samples)
    events = EventAccumulator(str(case.root)).Reload()
    for reason in SPOILED:
        assert events.Scalars(f"data/rejected/objects/{reason}")[-1].value == 1


def test_an_unusable_validation_sample_is_left_out_with_a_warning(case: Case, recwarn: pytest.WarningsRecorder):
    write_manifest(case.folder, case.data, allowed_rejects=0.5)
    rewrite(case.shard("val/objects"), 0, half_an_image)
    assert case.fit().code == 0
    assert any("validation leaves out 1 record(s) of objects/bad-image" in str(w.message) for w in recwarn)


# Models and numbers


def test_the_checkpoint_of_another_model(case: Case, tmp_path: Path):
    assert case.fit().code == 0
    checkpoint = case.root / "checkpoints" / "last.ckpt"
    case.root = tmp_path / "other"
    guide = case.config["model"]["init_args"]["guide"]["init_args"]
    start = (f"--ckpt_path={checkpoint}",)
    guide["base"] = save_tiny(tmp_path / "model", seed=5)
    with pytest.warns(UserWarning, match=r"made under another configuration: model\.guide\.base"):
        case.fails(2, "the checkpoint is of another base model", "set model.guide.base", extra=start)
    guide["base"] = case.config["data"]["init_args"]["base"]
    guide["lora_rank"] = 8
    with pytest.warns(UserWarning, match=r"made under another configuration: model\.guide\.lora_rank 32 -> 8"):
        case.fails(2, "weights are not this guide's: guide.", "adapter", extra=start)


def test_a_checkpoint_of_something_else_is_not_exported(case: Case, tmp_path: Path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    outcome = case.call(pgp, ["export", str(tmp_path / "foreign.ckpt"), str(tmp_path / "guide")])
    assert outcome.code == 2 and "foreign.ckpt is not a checkpoint of `lightning fit`" in outcome.error
    (tmp_path / "text.ckpt").write_text("hello")
    outcome = case.call(pgp, ["export", str(tmp_path / "text.ckpt"), str(tmp_path / "guide")])
    assert outcome.code == 2 and "text.ckpt" in outcome.error
    assert not (tmp_path / "guide").exists() and not list(tmp_path.glob(".guide*"))


def test_a_loss_that_is_not_finite(case: Case):
    case.config["model"]["init_args"]["learning_rate"] = 1e30
    case.config["trainer"]["callbacks"] = [
        one for one in case.config["trainer"]["callbacks"] if one["class_path"] not in {"StepCheckpoint", "Preemption"}
    ]
    case.config["trainer"]["enable_checkpointing"] = False
    words = ("the loss is ", "at optimiser step 1", "on rank 0", "on samples ", "lower model.learning_rate")
    case.fails(1, *words)


# The doctor says so before


def test_the_doctor_finds_what_a_fit_would_stumble_over(case: Case):
    for number in range(16):
        rewrite(case.shard(), number, SPOILED["bad-image"])
    case.shard("val/reading").unlink()
    case.config["trainer"]["default_root_dir"] = str(case.root)
    config = write_config(case.folder, case.config)
    case._capsys.readouterr()
    assert pgp(["doctor", "--config", str(config)]) == 1
    lines = case._capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("fail")]
    assert any("train/objects" in line and "16 bad-image" in line for line in failed)
    assert any("reading-00000.tar is missing" in line for line in failed)
