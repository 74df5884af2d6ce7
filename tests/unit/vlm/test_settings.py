"""Settings are read wherever they may stand; files that contradict each other, or say nothing, are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.prune import prune_picture
from pgp_lightning.guides.base import Guide
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import pruned
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.loading import load_processor, load_vlm
from pgp_lightning.vlm.processor import Message
from pgp_lightning.vlm.request import Request
from tests.tiny import GRIDS, tiny_request
from tests.tiny_llava import llava_model, llava_tokenizer
from tests.unit.prefill.made import ask, build, without_stop

OLD, NEW = "preprocessor_config.json", "processor_config.json"
IMAGE: dict[str, Any] = {"min_patches": 1, "max_patches": 6, "size": {"height": 32, "width": 32}}


@pytest.fixture
def folder(tiny_base: str, tmp_path: Path) -> Path:
    """A checkpoint in transformers' layout, without our side-car and without a word about images."""
    there = tmp_path / "hf"
    shutil.copytree(tiny_base, there)
    (there / "vlm.json").unlink()
    return there


def write(folder: Path, name: str, **changes: Any) -> None:
    values = IMAGE | changes
    (folder / name).write_text(json.dumps(values if name == OLD else {"image_processor": values}))


@pytest.mark.parametrize("names", [(OLD,), (NEW,), (OLD, NEW)])
def test_limits_of_tiles_are_found_in_the_file_of_either_version(names: tuple[str, ...], folder: Path):
    for name in names:
        write(folder, name)
    rule = load_processor(str(folder)).rule
    assert (rule.min_tiles, rule.max_tiles, rule.tile_size) == (1, 6, 32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "limits": ({"max_patches": 12}, f"max_patches is 12 in {OLD} and 6 in {NEW}: make the files agree"),
    "side": ({"size": {"height": 448, "width": 448}}, f"side of a tile is 32 in config.json and 448 in {OLD}"),
    "pixels": ({"image_mean": [0.5, 0.5, 0.5]}, f"image_mean is .* in {OLD}, and pixels of this family are normalised"),
    "spread": ({"image_std": [0.5, 0.5, 0.5]}, "image_std is "),
}


@pytest.mark.parametrize("what", BAD)
def test_files_that_contradict_each_other_are_refused(what: str, folder: Path):
    changes, message = BAD[what]
    write(folder, OLD, **changes)
    write(folder, NEW)
    with pytest.raises(ConfigError, match=message):
        load_processor(str(folder))
    write(folder, OLD, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    load_processor(str(folder))


def test_limits_that_nobody_says_are_not_made_up(folder: Path):
    message = f"min_patches stands in {OLD} or {NEW}, and none of them says it: copy the file"
    with pytest.raises(ConfigError, match=message):
        load_processor(str(folder))
    (folder / NEW).write_text(json.dumps({"image_seq_length": 4}))
    with pytest.raises(ConfigError, match=message):
        load_processor(str(folder))
    for damaged, words in (("{", "must be JSON"), ("[]", "must hold an object, got list")):
        (folder / NEW).write_text(damaged)
        with pytest.raises(ConfigError, match=words):
            load_processor(str(folder))


def test_files_of_transformers_beside_ours_have_to_say_the_same(tiny_base: str, tmp_path: Path):
    folder = tmp_path / "both"
    shutil.copytree(tiny_base, folder)
    write(folder, NEW, max_patches=4)
    assert load_processor(str(folder)).rule.max_tiles == 4
    write(folder, NEW)
    with pytest.raises(ConfigError, match=r"the tile rule is .*'max_tiles': 4.* in vlm.json and .*'max_tiles': 6"):
        load_processor(str(folder))


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text }}"
INTERNVL = CHAT + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
VICUNA = "{% for m in messages %}USER: {{ m.content[0].text }} {% endfor %}ASSISTANT:"


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", NEW])
def test_a_chat_template_that_asks_otherwise_is_refused_wherever_it_stands(place: str, folder: Path):
    write(folder, OLD)

    def put(template: str) -> None:
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        (folder / place).write_text(text)

    put(INTERNVL)
    assert load_processor(str(folder)).template.user == "<|im_start|>user\n"
    put(VICUNA)
    with pytest.raises(ConfigError, match=r"asks a question as 'USER: \? ASSISTANT:', the family as '<\|im_start"):
        load_processor(str(folder))
    put("{{ raise_exception('only for pictures') }}")  # what cannot be asked contradicts nothing
    load_processor(str(folder))


def test_llava_reads_the_same_places(tmp_path: Path):
    llava_model().save_pretrained(tmp_path)
    llava_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(VICUNA)
    write(tmp_path, NEW, crop_size={"height": 32, "width": 32})
    assert load_processor(str(tmp_path)).rule.tile_size == 32
    write(tmp_path, OLD, crop_size={"height": 336, "width": 336})
    with pytest.raises(ConfigError, match=f"side of the image is 32 in config.json and 336 in {OLD}"):
        load_processor(str(tmp_path))
    (tmp_path / OLD).unlink()
    (tmp_path / "chat_template.jinja").write_text(INTERNVL)
    with pytest.raises(ConfigError, match="asks a question as"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize(("kind", "length"), [("qwen2", 32768), ("llama", 2048)])
def test_a_length_that_a_configuration_leaves_out_is_transformers_own(kind: str, length: int, folder: Path):
    write(folder, OLD)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": kind}
    found = InternVL.settings(folder, config, None)["length"]
    assert found == (length, f"transformers' default for {kind}")


class Quantised(nn.Module):
    """A linear layer as AWQ and GPTQ make it: all of it in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (linear.weight.data * 256).round().to(torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.data.clone())

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.get_buffer("qweight").to(states.dtype) / 256, self.bias)


@torch.no_grad()
def test_layers_of_buffers_alone_are_pruned_as_layers_of_parameters():
    outcomes = []
    for quantised in (False, True):
        vlm = build("internvl")
        for parent in [m for m in vlm.decoder_layers.modules() if any(isinstance(c, nn.Linear) for c in m.children())]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    if quantised:
                        setattr(parent, name, Quantised(child))
                    else:
                        child.weight.copy_((child.weight * 256).round() / 256)
        request = ask(vlm)
        inputs = prompt_inputs(vlm, request)
        for pruner in (FastV(0, 0.3), FastV(2, 0.3)):
            with pruned(vlm, pruner, inputs, request):
                outcomes.append(without_stop(vlm, inputs).sequences)
    assert torch.equal(outcomes[0], outcomes[2]) and torch.equal(outcomes[1], outcomes[3])


def test_prompts_beyond_the_models_length_are_refused_by_whoever_builds_them(tiny_base: str):
    vlm = load_vlm(tiny_base)  # made for 64 slots, says its processor
    long = tiny_request(("red " * 500,), (GRIDS[0],))
    message = r"takes 5\d\d slots and the model was made for 64, .*shorten the question, or tile the image into fewer"
    with pytest.raises(ConfigError, match=message):
        prompt_inputs(vlm, long)
    guide: Guide = PosteriorGuide(tiny_base, lora_rank=0)
    with pytest.raises(ConfigError, match=message):
        guide(long)
    with pytest.raises(ConfigError, match=r"slots and the model was made for 448"):
        prune_picture(Image.new("RGB", (64, 64)), "red " * 4000, "embedded:pgp_seed0", "embedded:answer_model")


@pytest.mark.parametrize("text", ["<image>\nwhat is it", "what is <IMG_CONTEXT>"])
def test_placeholders_in_questions_and_answers_are_refused_with_the_right_advice(text: str, tiny_base: str):
    vlm = load_vlm(tiny_base)
    message = (
        "a question, an answer or a system text holds <.*>, which stands for an image's visual tokens: leave it out"
    )
    request: Request = tiny_request((text,), (GRIDS[0],))
    with pytest.raises(ConfigError, match=message):
        prompt_inputs(vlm, request)
    with pytest.raises(ConfigError, match=message):
        PosteriorGuide(tiny_base, lora_rank=0)(request)
    with pytest.raises(ConfigError, match=message):
        vlm.processor.prompt("what is it", text, "image_first")
    with pytest.raises(ConfigError, match=message):
        vlm.processor.next_turn(text)
    with pytest.raises(ValueError, match=r"may not hold <IMG_CONTEXT>|may stand in the user's turns only"):
        vlm.processor.conversation([Message("user", "why"), Message("assistant", text)], [])
