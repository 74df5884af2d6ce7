"""From the name of a base to a model and its processor: folders, the hub's cache, tokenizers of each generation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.family import VLM, check_pair, choose_attention
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.llava import Llava
from pgp_lightning.vlm.loading import load_processor, load_tokenizer, load_vlm, resolve_base
from pgp_lightning.vlm.processor import ChatTemplate, Processor
from pgp_lightning.vlm.tiles import TileRule
from tests.originals import NAMES, download
from tests.tiny import GOLDEN, RULE, WIDTH, golden, golden_object, tiny_processor, tiny_request

TOKENIZERS = GOLDEN / "internvl_tokenizers"


@pytest.mark.parametrize("name", ["qwen2_bpe", "internlm2_spm"])
def test_tokenizers_of_released_checkpoints_give_the_original_ids(name: str):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    processor = Processor(tokenizer, TileRule(), ChatTemplate(), 999)
    for case in golden(f"internvl_tokenizers/{name}/expected.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert processor.encode(case["text"]) == case.get("ids_nobos", case["ids"]), case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded"]


def test_an_internlm2_tokenizer_opens_a_conversation_with_its_first_token():
    facts = golden_object("internvl_internlm2/config.json")
    facts["llm_config"]["vocab_size"] = 431  # this tokenizer's
    tokenizer = load_tokenizer(TOKENIZERS / "internlm2_spm")
    _, template, _ = InternVL.facts(GOLDEN / "internvl_internlm2", facts, tokenizer)
    assert template.begin == "<s>"
    assert Processor(tokenizer, TileRule(), template, 999).prompt("Hi", None, "image_first").before[0] == 1
    # Without a tokenizer the language model says it.
    assert InternVL.facts(GOLDEN / "internvl_internlm2", facts, None)[1].begin == "<s>"
    assert InternVL.facts(GOLDEN / "internvl_qwen2", CHAT, None)[1].begin == ""


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_sentencepiece_is_asked_for_when_it_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch):
    def without(name: str) -> object:
        if name == missing:
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr("pgp_lightning.vlm.loading.find_spec", without)
    with pytest.raises(ConfigError, match=rf"needs {missing}: pip install 'pgp-lightning\[sentencepiece"):
        load_tokenizer(TOKENIZERS / "internlm2_spm")


def test_a_folder_without_tokenizer():
    with pytest.raises(ConfigError, match=r"internvl_qwen2 holds no tokenizer: expected tokenizer\.json"):
        load_tokenizer(GOLDEN / "internvl_qwen2")


@pytest.mark.parametrize("name", NAMES)
def test_an_original_checkpoint_loads_like_any_other(name: str, tmp_path: Path):
    base = str(download(tmp_path / name, name))
    vlm = load_vlm(base)
    assert isinstance(vlm, InternVL) and vlm.processor.rule == TileRule(56, 2, 1, 12)
    assert vlm.processor.template.system.startswith("你是书生·万象") and vlm.processor.max_length == 256
    assert vlm.model.generation_config.eos_token_id == vlm.processor.stop_id
    assert len(vlm.vision_layers) == 3 and len(vlm.decoder_layers) == 3
    tokens = vlm.visual_tokens(torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
    assert tokens.shape == (2, 4, vlm.width)


def test_a_checkpoint_in_the_layout_of_transformers_loads_without_side_car(tiny_base: str, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(tiny_base, folder)
    (folder / "vlm.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_patches": 12, "min_patches": 1}))
    processor = load_processor(str(folder))
    assert processor.rule == TileRule(32, 2, 1, 12) and processor.max_length == 256
    assert processor.template.system and processor.template.between == "\n"
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_patches": 6, "min_patches": 2}))
    assert load_processor(str(folder)).rule == TileRule(32, 2, 2, 6)


def test_a_model_of_the_internvl_family(tiny_base: str):
    vlm = load_vlm(tiny_base)
    assert vlm.width == WIDTH and vlm.base == tiny_base and vlm.processor.rule == RULE
    assert vlm.decoder is vlm.model.model.language_model and vlm.head is vlm.model.lm_head
    assert len(vlm.decoder_layers) == len(vlm.vision_layers) == 2
    request = tiny_request()
    tokens = vlm.visual_tokens(request.tiles)
    assert tokens.shape == (len(request.tiles), 4, WIDTH) and tokens.dtype == torch.float32
    half = load_vlm(tiny_base, torch.bfloat16)
    assert half.visual_tokens(request.tiles).dtype == torch.bfloat16


def test_a_model_of_the_llava_family(llava_base: str):
    vlm = load_vlm(llava_base)
    assert isinstance(vlm, Llava) and vlm.processor.rule == TileRule(32, 4, 1, 1, False, "pad")
    assert vlm.processor.template.begin == "<s>" and vlm.processor.stop_id == 2
    assert (len(vlm.decoder_layers), len(vlm.vision_layers), vlm.width) == (2, 3, 48)
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = vlm.visual_tokens(tiles)
    assert tokens.shape == (2, 16, 48)
    # The same as in the model's own forward pass, slot by slot.
    prompt = vlm.processor.prompt("what color is the square", None, "image_first")
    ids = torch.tensor([[*prompt.before, *[vlm.processor.context_id] * 16, *prompt.after]])
    slots = vlm.visual_slots(ids)
    embeddings = vlm.model.get_input_embeddings()(ids)
    embeddings[slots] = tokens[0]
    with torch.no_grad():
        ours = vlm.head(vlm.decoder(inputs_embeds=embeddings).last_hidden_state)
        theirs = vlm.model(input_ids=ids, pixel_values=vlm.normalise(tiles[:1])).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("fixture", ["tiny_base", "llava_base"])
@pytest.mark.parametrize("said", [None, 7, [7, 9]])
def test_an_answer_ends_at_the_chat_formats_stop_whatever_a_file_says(
    fixture: str, said: object, tmp_path: Path, request: pytest.FixtureRequest
):
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    (folder / "generation_config.json").write_text(json.dumps({} if said is None else {"eos_token_id": said}))
    vlm = load_vlm(str(folder))
    stop = vlm.processor.stop_id

    def says(token: int) -> LogitsProcessor:
        return lambda ids, scores: torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    ids, counts = torch.tensor([[1, 8, 9]]), {}
    for token in (stop, 7):
        out = vlm.model.generate(input_ids=ids, max_new_tokens=3, logits_processor=[says(token)], pad_token_id=0)
        counts[token] = out.shape[1] - ids.shape[1]
    assert counts == {stop: 1, 7: 3}


def test_the_adapter_matches_the_language_model_only(tiny_base: str, llava_base: str, tmp_path: Path):
    bases = (tiny_base, llava_base, str(download(tmp_path / "o", "internvl_internlm2")))
    for vlm in map(load_vlm, bases):
        matched = [name for name, _ in vlm.model.named_modules() if re.fullmatch(vlm.adapter_targets, name)]
        parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        count = len(vlm.decoder_layers)
        expected = [f"model.language_model.layers.{i}.{part}" for i in range(count) for part in parts]
        assert sorted(matched) == sorted(expected)
        assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in vlm.model.named_modules())


def test_a_model_from_the_hubs_cache(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "a" * 40
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = resolve_base("someone/tiny")
    assert folder == cached / "snapshots" / commit == resolve_base(f"someone/tiny@{commit}")
    assert load_processor("someone/tiny").rule == RULE


def test_a_download_that_was_interrupted_is_gone_on_with(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "b" * 40
    folder = tmp_path / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(tiny_base, folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    weights = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="a whole copy is not in the hub's cache and cannot be downloaded"):
        resolve_base("someone/tiny")
    (folder / "model-00002-of-00002.safetensors").touch()
    assert resolve_base("someone/tiny") == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"`hf download someone/tiny --revision main`"):
        resolve_base("someone/tiny@main")


@pytest.mark.parametrize("fixture", ["tiny_base", "llava_base"])
@pytest.mark.parametrize(("change", "message"), [
    ("missing", "has missing keys: .*layers.1.self_attn.q_proj.weight; copy or download"),
    ("unknown", "has unexpected keys: .*stranger"),
    ("shape", "does not load as|has mismatched keys"),
    ("none", "does not load as"),
])  # fmt: skip
def test_weights_that_are_not_all_there(
    fixture: str, change: str, message: str, tmp_path: Path, request: pytest.FixtureRequest
):
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "language_model" in key and key.endswith("layers.1.self_attn.q_proj.weight"))
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["stranger"] = torch.zeros(3)
    elif change == "shape":
        weights[name] = weights[name][:-1].clone()
    if change == "none":
        (folder / "model.safetensors").unlink()
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        load_vlm(str(folder))


def test_a_model_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no model at 'OpenGVLab/InternVL2_5-1B': .* run `hf download OpenGVLab/Int"):
        load_processor("OpenGVLab/InternVL2_5-1B")


@pytest.mark.parametrize("base", ["gone", "/nowhere/gone", "./gone", "a/b/c"])
def test_a_folder_that_is_not_there(base: str):
    with pytest.raises(ConfigError, match=rf"no model at '{base}': give a local folder that holds config.json"):
        resolve_base(base)


def test_a_model_that_the_package_does_not_hold():
    for name in ("gone", "../models/guide", ""):
        with pytest.raises(ConfigError, match=r"no model at 'embedded:.*': the package holds embedded:"):
            resolve_base(f"embedded:{name}")


CLIP = {"model_type": "clip_vision_model"}
LLAVA = {"model_type": "llava", "text_config": {}}
CHAT = golden_object("internvl_qwen2/config.json")
PHI3 = {**CHAT["llm_config"], "architectures": ["Phi3ForCausalLM"]}
STRANGE = [
    ({"model_type": "qwen2_vl"}, "of model_type 'qwen2_vl'; supported are InternVL and Llava"),
    ({}, "of model_type None"),
    ([], "must hold an object, got list"),
    ({"model_type": "llava_llama"}, "LLaVA checkpoint in the original layout, which holds no vision tower"),
    ({**LLAVA, "vision_config": {"model_type": "siglip_vision_model"}}, "must be CLIP"),
    ({**LLAVA, "vision_config": CLIP, "vision_feature_select_strategy": "full"}, "must be 'default' as in LLaVA-1.5"),
    ({**LLAVA, "vision_config": CLIP, "vision_feature_layer": -1}, "vision_feature_layer must be -2 .* got -1"),
    (LLAVA, "LLaVA checkpoint in the original layout"),
    ({**CHAT, "llm_config": PHI3, "template": "phi3-chat"}, "text model must be one of .* got 'Phi3ForCausalLM'"),
    ({**CHAT, "template": "vicuna"}, "chat format 'vicuna'; known are"),
    ({**CHAT, "ps_version": "v1"}, "ps_version must be 'v2', got 'v1'"),
]


@pytest.mark.parametrize(("config", "message"), STRANGE)
def test_a_checkpoint_of_another_kind(config: object, message: str, tmp_path: Path):
    shutil.copytree(TOKENIZERS / "qwen", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_processor(str(tmp_path))


def test_a_side_car_of_another_family(tiny_base: str, tmp_path: Path):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_base, folder)
    facts = json.loads((folder / "vlm.json").read_text())
    (folder / "vlm.json").write_text(json.dumps({**facts, "family": "llava"}))
    with pytest.raises(ConfigError, match=r"vlm\.json must say family 'internvl', got 'llava'"):
        load_processor(str(folder))


@pytest.mark.parametrize("family", [InternVL, Llava])
def test_pixels_are_normalised_by_channel(family: type[VLM]):
    tiles = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 2, 2)
    pixels = family.normalise(tiles)
    for channel, (mean, deviation) in enumerate(zip(family.mean, family.std, strict=True)):
        assert pixels[0, channel, 0, 0].item() == pytest.approx(-mean / deviation)
        assert pixels[1, channel, 1, 1].item() == pytest.approx((1 - mean) / deviation)
    assert family.normalise(tiles, torch.bfloat16).dtype == torch.bfloat16


def test_attention_is_chosen_by_what_can_run(monkeypatch: pytest.MonkeyPatch):
    assert choose_attention("sdpa", torch.float32) == "sdpa" and choose_attention("eager", torch.float32) == "eager"
    monkeypatch.setattr("pgp_lightning.vlm.family.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_attention("auto", torch.bfloat16) == "sdpa"
    with pytest.raises(ConfigError, match=r"flash-attn is not installed .*; there is no CUDA device; dtype is float32"):
        choose_attention("flash_attention_2", torch.float32)
    monkeypatch.setattr("pgp_lightning.vlm.family.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert choose_attention("auto", torch.bfloat16) == "sdpa"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("pgp_lightning.vlm.family.is_flash_attn_2_available", lambda: False)
    assert choose_attention("auto", torch.bfloat16) == "sdpa"
    with pytest.raises(ConfigError, match="too old or broken"):
        choose_attention("flash_attention_2", torch.bfloat16)
    monkeypatch.setattr("pgp_lightning.vlm.family.is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert choose_attention("auto", torch.float32) == "sdpa"


def paired(rule: TileRule) -> Processor:
    return Processor(tiny_processor().tokenizer, rule, ChatTemplate(), 999)


def test_guides_and_answer_models_that_share_their_tokens():
    internvl, llava = TileRule(), TileRule(336, 24, 1, 1, False, "pad")
    for rule in (internvl, llava):
        check_pair(paired(rule), paired(rule))
    # The colour of a padding that is not used does not matter.
    check_pair(paired(internvl), paired(TileRule(padding=(0, 0, 0))))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TileRule(336, 24, 1, 1, False, "pad"), "tile_size is 448 for the guide and 336 for the answer model"),
        (TileRule(tokens_per_side=8), "tokens_per_side is 16 for the guide and 8"),
        (TileRule(max_tiles=6), "max_tiles is 12 for the guide and 6 for the answer model; pair models"),
        (TileRule(thumbnail=False), "thumbnail is True for the guide and False"),
    ],
)
def test_a_pair_that_tiles_differently(rule: TileRule, message: str):
    with pytest.raises(ConfigError, match=message):
        check_pair(paired(TileRule()), paired(rule))


def released(tower: str, text: str, template: str, **sizes: int) -> dict[str, Any]:
    """Return what the config.json of a released checkpoint says, as far as it matters here."""
    towers = {
        "300M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
                 "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
        "6B": {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800},
    }  # fmt: skip
    return {
        "model_type": "internvl_chat",
        "template": template,
        "ps_version": "v2",
        "force_image_size": 448,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "vision_config": {**towers[tower], "image_size": 448, "patch_size": 14},
        "llm_config": {"architectures": [text], "model_type": text, "max_position_embeddings": 32768, **sizes},
    }


def test_what_a_configuration_leaves_out_is_what_the_original_takes_it_for(tmp_path: Path):
    def rule(**changes: object) -> TileRule:
        return InternVL.facts(tmp_path, {**CHAT, **changes}, None).rule

    assert rule() == TileRule(56, 2, 1, 12)
    assert rule(max_dynamic_patch=None, use_thumbnail=False) == TileRule(56, 2, 1, 6, False)
    assert rule(dynamic_image_size=False) == TileRule(56, 2, 1, 1)


def test_the_papers_guide_fits_the_papers_answer_models(tmp_path: Path):
    heads = {"num_attention_heads": 16, "num_hidden_layers": 2, "intermediate_size": 8}
    guide = released("300M", "Qwen2ForCausalLM", "internvl2_5", vocab_size=151674, hidden_size=896, **heads)
    answer_models = [
        released("300M", "InternLM2ForCausalLM", "internlm2-chat", vocab_size=92553, hidden_size=2048, **heads),
        released("300M", "InternLM2ForCausalLM", "internlm2-chat", vocab_size=92553, hidden_size=4096, **heads),
        released("6B", "InternLM2ForCausalLM", "internlm2-chat", vocab_size=92553, hidden_size=6144, **heads),
    ]
    rules = [InternVL.facts(tmp_path, config, None).rule for config in (guide, *answer_models)]
    assert rules[0] == TileRule(448, 16, 1, 12) and rules[0].grid(640, 480).tokens == 13 * 256
    for rule in rules[1:]:
        check_pair(paired(rules[0]), paired(rule))
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    llava = Llava.facts(tmp_path, {"model_type": "llava", "vision_config": vision, "text_config": {}}, None).rule
    assert llava.grid(640, 480).tokens == 576
    with pytest.raises(ConfigError, match="pair models of one family"):
        check_pair(paired(rules[0]), paired(llava))
