"""The doctor on whole configurations: what it passes, and what it says before a run would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pgp_lightning.doctor import examine
from pgp_lightning.tools import main
from tests.tiny import GOLDEN, save_tiny
from tests.tiny_llava import llava_tokenizer, save_llava
from tests.unit.doctor.case import Case, has_memory

HUB = "OpenGVLab/InternVL2_5-1B"


def test_a_configuration_that_is_well(case: Case, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the doctor loads no weights")

    monkeypatch.setattr("pgp_lightning.guides.posterior.load_vlm", refuse)
    findings = case.finds("ok", "weights", f"guide base and data base {case.base}", "internvl, transformers' layout")
    # The console script belongs to whoever installed it.
    assert all(one.state == "ok" for one in findings if one.what != "lightning"), "\n".join(map(str, findings))
    text = "\n".join(map(str, findings))
    for words in ("<IMG_CONTEXT> is ", "auto gives sdpa", "4 lanes for 1 ranks x 1 readers", "40 records in 3 shards",
                  "of at most 64 slots", "rows of ", "GiB free at"):  # fmt: skip
        assert words in text, text
    assert not (case.folder / "run").exists()


def test_records_to_be_built_and_a_model_of_the_package(tmp_path: Path, tiny_base: str):
    case = Case(tmp_path, tiny_base, tmp_path / "data")
    case.set_base("embedded:guide")
    case.finds("ok", "train/objects", "40 records, to be built on first use")
    assert not (tmp_path / "data").exists()


def test_the_exit_code(case: Case, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--config", str(case.write())]) == 0
    assert "checks passed" in capsys.readouterr().out
    case.set_base(case.folder / "nowhere")
    assert main(["doctor", "--config", str(case.write())]) == 1
    assert "fail  weights" in capsys.readouterr().out


def test_settings_that_are_refused(case: Case, capsys: pytest.CaptureFixture[str]):
    case.data["lanez"] = 4
    case.finds("fail", "config", "the configuration was refused, see above")
    assert "lanez" in capsys.readouterr().err
    del case.data["lanez"]
    case.data["lanes"] = 0
    case.finds("fail", "config", "data.lanes must be at least 1, got 0")
    case.data["lanes"] = 4
    case.model["learning_rate"] = 0
    case.finds("fail", "model", "model.learning_rate must be positive, got 0")
    case.model["learning_rate"] = 1e-3
    case.guide["log_variance_bias"] = -20
    case.finds("fail", "model", "log_variance_bias must lie between -12.0 and 6.0")
    assert examine([case.folder / "gone.yaml"])[-1].detail.startswith("there is no configuration")


def test_options_that_a_fit_refuses(case: Case):
    case.finds("ok", "training", "8 optimiser steps of 2 micro-batches a process, precision 32-true")
    case.config["trainer"] |= {"precision": "bf16-true", "limit_train_batches": 3}
    case.config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateFinder"})
    findings = case.finds("fail", "training", "trainer.precision bf16-true", "use bf16-mixed")
    for words in ("trainer.limit_train_batches 3", "the callback LearningRateFinder"):
        assert any(one.state == "fail" and words in one.detail for one in findings), words


def test_devices_that_are_not_there(case: Case):
    case.config["trainer"] |= {"accelerator": "cuda", "devices": 64}
    case.finds("fail", "config")


def test_weights_that_cannot_be_had(case: Case, offline: Path):
    case.set_base(HUB)
    findings = case.finds("fail", "weights", f"guide base and data base: no model at '{HUB}'", f"`hf download {HUB}`")
    states = {one.what: one.state for one in findings}
    # Everything else is examined as far as it goes.
    assert states["train/objects"] == "warn" and states["lanes"] == "ok" and states["memory"] == "warn"
    assert not offline.exists()


def test_weights_that_would_be_downloaded(case: Case, offline: Path, monkeypatch: pytest.MonkeyPatch):
    class File:
        rfilename, size = "model.safetensors", 3 * 2**30

    class Hub:
        def model_info(self, name: str, **options: object) -> Hub:
            assert name == HUB
            return self

        siblings = (File(),)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pgp_lightning.doctor.HfApi", Hub)
    monkeypatch.setattr("pgp_lightning.vlm.loading.snapshot_download", only_the_cache)
    case.set_base(HUB)
    case.finds("warn", "weights", "3.0 GiB to download on first use", f"`hf download {HUB}`", "GiB free at")
    File.size = 2**60
    case.finds("fail", "weights", "GiB to download on first use")


def only_the_cache(name: str, local_files_only: bool, **options: object) -> str:
    assert local_files_only, "the doctor downloads nothing"
    raise FileNotFoundError(name)


def test_a_folder_that_is_not_there(case: Case):
    case.set_base(case.folder / "nowhere")
    case.finds("fail", "weights", "guide base and data base: no model at", "give a local folder that holds config.json")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), "lacks *.safetensors: copy or download the whole folder"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "model.safetensors is damaged"),
    ],
)
def test_weights_that_are_not_whole(case: Case, spoil: Callable[[Path], None], words: str):
    spoil(case.base / "model.safetensors")
    case.finds("fail", "weights", words)


def test_a_shard_of_weights_that_is_missing(case: Case):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (case.base / "model.safetensors").rename(case.base / "model-1.safetensors")
    (case.base / "model.safetensors.index.json").write_text(json.dumps(index))
    case.finds("fail", "weights", "lacks model-2.safetensors")
    (case.base / "model.safetensors.index.json").write_text("{}")
    case.finds("fail", "weights", "model.safetensors.index.json is no index of weights")


def test_a_tokenizer_of_another_model(case: Case):
    llava_tokenizer().save_pretrained(case.base)
    case.finds("fail", "weights", "the tokenizer must know '<IMG_CONTEXT>' as one token", "it is of another model")


def test_a_missing_sentencepiece(case: Case, monkeypatch: pytest.MonkeyPatch):
    (case.base / "tokenizer.json").unlink()
    shutil.copy(GOLDEN / "internvl_tokenizers" / "internlm2_spm" / "tokenizer.model", case.base)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    case.finds("fail", "weights", "sentencepiece: pip install 'pgp-lightning[sentencepiece]'")


def original(case: Case) -> Path:
    """Put a golden checkpoint in the original layout and its tokenizer together."""
    folder = case.folder / "original"
    shutil.copytree(GOLDEN / "internvl_qwen2", folder)
    for file in (GOLDEN / "internvl_tokenizers" / "qwen").iterdir():
        shutil.copy(file, folder)
    return folder


def test_the_original_layout(case: Case):
    folder = original(case)
    case.set_base(folder)
    case.finds("ok", "weights", "original layout, converted while loading")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ps_version": "v1"}))
    case.finds("fail", "weights", "ps_version must be 'v2', got 'v1'")
    config["llm_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    case.finds("fail", "weights", "should be in", "download the checkpoint again")


def test_bases_of_two_models(case: Case):
    case.data["base"] = save_llava(case.folder / "llava")
    findings = case.finds("fail", "bases", "they must tile alike", "set both to the same model")
    assert [one.what for one in findings if one.state == "ok"].count("weights") == 2


def test_a_length_above_the_models(case: Case):
    case.data["max_length"] = 65
    case.finds("warn", "max_length", "data.max_length is 65, the guide's base was made for 64 slots")


def test_flash_attention_that_cannot_run(case: Case):
    case.guide["attention"] = "flash_attention_2"
    if not torch.cuda.is_available():
        case.finds("fail", "attention", "flash_attention_2 cannot run here", "there is no CUDA device")


def test_a_damaged_shard(case: Case, shards: Path):
    data = case.folder / "data"
    shutil.copytree(shards, data)
    case.data["root"] = str(data)
    whole = data / "val" / "reading" / "reading-00000.tar"
    whole.write_bytes(whole.read_bytes()[:-10])
    (data / "train" / "objects" / "objects-00001.tar").unlink()
    findings = case.finds("fail", "val/reading", "reading-00000.tar has ", "bytes, index.json promises")
    assert any(one.state == "fail" and "objects-00001.tar is missing" in one.detail for one in findings)
    assert any(one.what == "val/objects" and one.state == "ok" for one in findings)


def test_lanes_that_do_not_suit(case: Case):
    case.data["workers"] = 3
    case.finds("fail", "lanes", "4 lanes cannot be dealt to 1 ranks x 3 workers")
    case.data.update(workers=0, lanes=16)
    case.finds("warn", "lanes", "an epoch has fewer records of reading than lanes x batch_size = 16 x 2")
    case.data["lanes"] = 64
    case.finds("fail", "lanes", "an epoch of 64 records is less than one round of lanes")


@pytest.mark.parametrize(("share", "state"), [(0.5, "fail"), (1.05, "warn"), (1.2, "ok")])
def test_memory(case: Case, monkeypatch: pytest.MonkeyPatch, share: float, state: str):
    from pgp_lightning.vlm import memory

    totals: list[int] = []
    slots: list[int] = []

    def estimate(*arguments: Any, **options: Any) -> memory.FitMemory:
        assert options["dtype"] == torch.float32 and options["lora_rank"] == 32 and options["images"] == 2
        assert options["rows"] % 2 == 0 and options["visual_share"] == 0.4 and options["attention"] == "sdpa"
        totals.append((found := memory.fit_memory(*arguments, **options)).total)
        slots.append(options["text_slots"])
        return found

    monkeypatch.setattr("pgp_lightning.doctor.fit_memory", estimate)
    case.examine()
    has_memory(monkeypatch, share * totals[0])
    words = ("a small device has",) if state == "ok" else ("a small device has", "lower data.batch_size")
    findings = case.finds(state, "memory", *words)
    assert totals[:2] == totals[2:] and slots[0] < slots[1]
    assert slots[1] == 64 - 5 * 4  # a row of five tiles that fills max_length
    told = [one.detail for one in findings if "only some records were read" in one.detail]
    assert len(told) == (state == "ok" and totals[1] * 0.9 > totals[0]), told


def test_an_answer_model(case: Case, offline: Path):
    answer = save_tiny(case.folder / "answer", seed=3)
    case.finds("ok", "answer model", "has the guide's tokens", "full cache", answer_model=answer)
    other = save_llava(case.folder / "llava")
    words = ("do not share their visual tokens", "pair models of one family")
    case.finds("fail", "answer model", *words, answer_model=other)
    case.finds(
        "fail", "weights", "answer model: no model at 'OpenGVLab/InternVL2-8B'", answer_model="OpenGVLab/InternVL2-8B"
    )


def test_a_model_without_guide(case: Case):
    case.config["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    findings = case.finds("warn", "model", "BoringModel has no guide with a base")
    assert not [one for one in findings if one.state == "fail"]
    assert any(one.what == "weights" and "data base" in one.detail for one in findings)


def test_data_of_another_class(case: Case):
    case.config["data"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
    findings = case.finds("warn", "data", "BoringDataModule is not known here")
    assert not [one for one in findings if one.state == "fail"]
