"""The files of a conversion: every tensor accounted for, a folder as transformers writes it, whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm import conversion, shard_files
from pgp_lightning.vlm.conversion import convert_checkpoint, converted_tensors, load_original
from pgp_lightning.vlm.shard_files import Piece
from tests.originals import (
    GOLDEN,
    NAMES,
    load,
    logits,
    read_config,
    read_tensors,
    read_values,
    six_billion_style,
    translated,
    write_original,
)

QWEN2, INTERNLM2 = NAMES
CONFIG = translated(read_config(GOLDEN / INTERNLM2))
INDEX = "model.safetensors.index.json"


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_folder_is_what_transformers_would_have_written(tmp_path: Path, name: str):
    source = GOLDEN / name
    config, values = translated(read_config(source)), read_values(name)
    model = load_original(source, config, torch.float32, "sdpa", stop_id=9)
    convert_checkpoint(source, tmp_path / "ours", config, stop_id=9)
    model.save_pretrained(tmp_path / "theirs")
    for file in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / side / file).read_text()) for side in ("ours", "theirs"))
        assert ours == theirs, file
    assert ours["eos_token_id"] == 9
    assert same(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}
    again, told = InternVLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()) and again.dtype == torch.float32
    assert torch.equal(logits(again, values), logits(model, values))


def test_shards_in_and_out(tmp_path: Path):
    tensors = {key: one.bfloat16() for key, one in read_tensors(GOLDEN / INTERNLM2).items()}
    one = write_original(tmp_path / "one", read_config(GOLDEN / INTERNLM2), tensors)
    three = write_original(tmp_path / "three", read_config(GOLDEN / INTERNLM2), tensors, shards=3)
    expected = dict(converted_tensors(one, CONFIG))
    assert same(dict(converted_tensors(three, CONFIG)), expected)
    convert_checkpoint(three, tmp_path / "new", CONFIG, shard_bytes=50_000)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3 and all((tmp_path / "new" / file).stat().st_size < 60_000 for file in files)
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * index["metadata"]["total_parameters"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert read_config(tmp_path / "new")["dtype"] == "bfloat16" and model.dtype == torch.bfloat16
    assert same(model.state_dict(), expected) and same(load(one, dtype=torch.bfloat16).state_dict(), expected)
    assert CONFIG.dtype is None


def test_tensors_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_files, "CHUNK", 4096)
    counts: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda bar, task, count: counts.append(count))
    convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "new", CONFIG)
    expected = dict(converted_tensors(GOLDEN / INTERNLM2, CONFIG))
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert same(model.state_dict(), expected)
    assert max(counts) == 4096 and sum(counts) == 2 * sum(tensor.nbytes for tensor in expected.values())


def test_dtypes_may_be_mixed(tmp_path: Path):
    config, tensors = six_billion_style()
    # Its 81 narrow numbers would leave what is wide at an odd place behind them.
    narrow = "vision_model.encoder.layers.0.mlp.fc1.bias"
    tensors[narrow] = tensors[narrow].bfloat16()
    source = write_original(tmp_path / "mixed", config, tensors)
    convert_checkpoint(source, tmp_path / "new", translated(config))
    held = shard_files.read_header(tmp_path / "new" / "model.safetensors")
    assert {one.dtype for one in held.values()} == {"F32", "BF16"}
    assert all(one.start % (4 if one.dtype == "F32" else 2) == 0 for one in held.values())
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert same(model.state_dict(), {key: one.float() for key, one in converted_tensors(source, translated(config))})


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("mlp1.1.bias"), r"'mlp1\.1\.bias' should be in .*damaged and are not"),
        (
            lambda tensors: [tensors.pop(key) for key in [*tensors] if ".ls" in key],
            r"layers\.0\.ls1'.* and 3 more should",
        ),
        (put("mlp1.2.weight", torch.ones(2)), r"'mlp1\.2\.weight' of .*model\.safetensors is none that config\.json"),
        (put("language_model.lm_head.weight", torch.ones(2)), r"'language_model\.lm_head\.weight' of .* is none that"),
        (put("mlp1.1.bias", torch.ones(47)), r"'mlp1\.1\.bias' of .* must have shape \(48,\) .*got \(47,\)"),
        (
            put("language_model.model.layers.1.attention.wqkv.weight", torch.ones(88, 48)),
            r"wqkv\.weight' of .* must have shape \(80, 48\) .*got \(88, 48\)",
        ),
        (put("vision_model.encoder.layers.1.ls2", torch.ones(2, 16)), r"ls2' of .* shape \(32,\) .*got \(2, 16\)"),
        (rename("mlp1.1.bias", "base_model.model.mlp1.1.bias"), r"'base_model\.model\.mlp1.*LoRA adapter: merge"),
        (put("language_model.model.norm.lora_A.weight", torch.ones(2)), r"lora_A\.weight' of .*LoRA adapter: merge"),
        (put("mlp1.1.bias", torch.ones(48, dtype=torch.int8)), r"'mlp1\.1\.bias' .* one of F32, F16, BF16, got I8"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str):
    tensors = read_tensors(GOLDEN / INTERNLM2)
    change(tensors)
    source = write_original(tmp_path / "damaged", read_config(GOLDEN / INTERNLM2), tensors)
    with pytest.raises(ConfigError, match=message):
        converted_tensors(source, CONFIG)
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(source, tmp_path / "target", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_checkpoint_of_another_model():
    with pytest.raises(ConfigError, match=r"is none that config\.json describes"):
        converted_tensors(GOLDEN / QWEN2, CONFIG)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def header(file: Path, text: str, data: int) -> None:
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(data))


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / SECOND).unlink(), rf"index\.json names '{SECOND}', and .* no such file"),
        (lambda folder: edit_index(folder, lambda map: map.update({"mlp1.1.bias": "../x"})), r"names '\.\./x', and"),
        (
            lambda folder: edit_index(folder, lambda map: map.update({"mlp1.9.bias": SECOND})),
            rf"'mlp1\.9\.bias' of .*{SECOND}: the index holds it, the file does not",
        ),
        (
            lambda folder: edit_index(folder, lambda map: map.pop("mlp1.1.bias")),
            r"'mlp1\.1\.bias' of .*: the index does not list it there, the file holds it",
        ),
        (lambda folder: (folder / INDEX).write_text("{}"), r"index\.json is no index of shards \(KeyError"),
        (lambda folder: cut(folder / SECOND), rf"{SECOND} is not an intact safetensors file"),
        (
            lambda folder: header(folder / SECOND, f'{{"a":{ENTRY},"a":{ENTRY}}}', 4),
            rf"{SECOND} names tensor 'a' twice",
        ),
        (lambda folder: save_file({}, folder / "model.safetensors"), "holds both model.safetensors and model.safet"),
        (lambda folder: (folder / INDEX).unlink(), "expected model.safetensors or model.safetensors.index.json in"),
        (
            lambda folder: [(folder / INDEX).unlink(), (folder / "pytorch_model.bin").touch()],
            r"holds pickled weights \(pytorch_model\.bin\), and a pickle can run code",
        ),
    ],
)
def test_every_file_is_as_it_should_be(tmp_path: Path, change: Callable[[Path], object], message: str):
    source = write_original(tmp_path / "s", read_config(GOLDEN / INTERNLM2), read_tensors(GOLDEN / INTERNLM2), shards=3)
    change(source)
    with pytest.raises(ConfigError, match=message):
        converted_tensors(source, CONFIG)


def test_a_target_that_exists_and_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError, match="target exists already: remove it"):
        convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "target", CONFIG)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="other takes 560,832 bytes, and its disk has 1,000 left: make room"):
        convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "other", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_extras_are_written_with_the_folder_or_stop_it(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "half.json").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "deep" / "target", CONFIG, write_extras=fail)
    assert not list((tmp_path / "deep").iterdir())

    def write(folder: Path) -> None:
        (folder / "vlm.json").write_text("{}")

    convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "deep" / "target", CONFIG, write_extras=write)
    assert (tmp_path / "deep" / "target" / "vlm.json").read_text() == "{}"
    assert (tmp_path / "deep" / "target").stat().st_mode == (tmp_path / "deep").stat().st_mode


@pytest.mark.parametrize("place", [100, -200_000, -1], ids=["header", "middle", "end"])
def test_a_disk_that_does_not_give_back_what_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int):
    write_file = conversion.write_file

    def flip(file: Path, pieces: Iterable[Piece], advance: Callable[[int], object]) -> None:
        write_file(file, pieces, advance)
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(conversion, "write_file", flip)
    with pytest.raises((DataError, ConfigError), match="look after the disk" if place < 0 else "model.safetensors"):
        convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "target", CONFIG)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from pgp_lightning.vlm import conversion, shard_files
from tests.originals import read_config, translated

verify, files = conversion.verify_file, []

def kill(file, pieces, advance):
    files.append(file)
    verify(file, pieces, advance)
    if len(files) == 3:
        print(file.parent.name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

conversion.verify_file = kill
source, target = map(Path, sys.argv[1:])
conversion.convert_checkpoint(source, target, translated(read_config(source)), shard_bytes=50_000)
"""


@pytest.mark.full
def test_a_killed_conversion_leaves_no_model(tmp_path: Path):
    arguments = [sys.executable, "-c", KILLED, str(GOLDEN / INTERNLM2), str(tmp_path / "target")]
    done = subprocess.run(arguments, cwd=GOLDEN.parents[1], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [done.stdout.strip()]
    assert done.stdout.startswith(".target.") and not (tmp_path / done.stdout.strip() / "config.json").exists()
    convert_checkpoint(GOLDEN / INTERNLM2, tmp_path / "target", CONFIG)  # what is left is in nobody's way
