"""`pgp convert` from a download to a folder that guides and transformers load by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from pgp_lightning.tools import main as pgp
from pgp_lightning.vlm.loading import load_processor, load_vlm
from tests.originals import GOLDEN, NAMES, download


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_is_the_one_converted_while_loading(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = download(tmp_path / "source", name), tmp_path / "models" / "converted"
    assert pgp(["convert", str(source), str(target)]) == 0
    assert "every tensor read back and compared" in capsys.readouterr().out
    one, other = load_vlm(str(source)), load_vlm(str(target))
    for key in ("rule", "template", "max_length", "family", "context_id", "stop_id"):
        assert getattr(one.processor, key) == getattr(other.processor, key), key
    assert one.model.generation_config.eos_token_id == other.model.generation_config.eos_token_id
    prompt = one.processor.prompt("What is it?", None, "question_first")
    assert other.processor.prompt("What is it?", None, "question_first") == prompt
    ids = torch.tensor([[*prompt.before, *[one.processor.context_id] * 4, *prompt.after]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [vlm.model(input_ids=ids, pixel_values=pixels).logits for vlm in (one, other)]
    assert torch.equal(*logits)
    assert [path.name for path in target.parent.iterdir()] == ["converted"]


def test_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "converted"
    assert pgp(["convert", str(GOLDEN / "internvl_internlm2"), str(target)]) == 0
    model = InternVLForConditionalGeneration.from_pretrained(target)
    # Where the released ones have it: the seventh from the vocabulary's end.
    assert model.config.image_token_id == 263
    template = json.loads((target / "vlm.json").read_text())["template"]
    assert template["begin"] == "<s>"
    # The end of a turn, not the </s> of its config.json.
    assert model.generation_config.eos_token_id == 259
    # A tokenizer put there later is all that was missing.
    shutil.copytree(GOLDEN / "internvl_tokenizers" / "internlm2", target, dirs_exist_ok=True)
    assert load_processor(str(target)).context_id == 263
    assert pgp(["convert", str(GOLDEN / "internvl_internlm2"), str(tmp_path / "b"), "--image-token-id", "999"]) == 2
    assert "must be from 0 to vocab_size 270 - 1, got 999" in capsys.readouterr().err


def test_what_is_not_converted(tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = download(tmp_path / "source", "internvl_qwen2")
    (tmp_path / "there").mkdir()
    for given, target, words in (
        (str(source), tmp_path / "there", "exists already"),
        (tiny_base, tmp_path / "new", "in transformers' layout already"),
        (str(tmp_path / "gone"), tmp_path / "new", "no model at"),
    ):
        assert pgp(["convert", given, str(target)]) == 2
        assert words in capsys.readouterr().err
    assert pgp(["convert", str(source), str(tmp_path / "new"), "--image-token-id", "5"]) == 2
    assert "gives <IMG_CONTEXT> the id 261, not 5" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
