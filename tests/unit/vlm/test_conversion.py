"""Original InternVL checkpoints: the same numbers as the original code, and what a conversion refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.conversion import converted_tensors, load_original
from pgp_lightning.vlm.original_config import convert_config, image_token_id, is_original
from tests.originals import (
    GOLDEN,
    NAMES,
    TOLERANCE,
    difference,
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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_converted_model_computes_what_the_original_does(name: str, attention: str):
    values, model = read_values(name), load(GOLDEN / name, attention)
    pixels, real = values["pixel_values"], values["attention_mask"] == 1
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    output = model(
        **{key: values[key] for key in ("input_ids", "attention_mask", "position_ids", "pixel_values", "labels")},
        output_hidden_states=True,
        use_cache=False,
    )
    found = {
        "vit_hidden_states": torch.stack(tower.hidden_states),
        "vit_last_hidden_state": tower.last_hidden_state,
        "image_features": model.get_image_features(pixel_values=pixels).pooler_output,
        "llm_hidden_states": torch.stack(output.hidden_states)[:, real],
        "logits": output.logits[real],
        "loss": output.loss.double(),
        "single_logits": model(input_ids=values["single_input_ids"], pixel_values=pixels[:3]).logits,
        "text_logits": model(input_ids=values["text_input_ids"]).logits,
    }
    expected = values | {"llm_hidden_states": values["llm_hidden_states"][:, real], "logits": values["logits"][real]}
    for key, one in found.items():
        torch.testing.assert_close(
            one, expected[key], rtol=0, atol=TOLERANCE, msg=lambda text, key=key: f"{key}: {text}"
        )
    ids = values["single_input_ids"]
    for token in values["greedy_ids"].tolist():
        following = model(input_ids=ids, pixel_values=pixels[:3], use_cache=False).logits[0, -1].argmax()
        assert following == token
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    assert not model.training and model.config._attn_implementation == attention


@torch.no_grad()
def test_the_tolerance_sees_the_smallest_mistakes(tmp_path: Path):
    values, source = read_values(INTERNLM2), GOLDEN / INTERNLM2
    config = translated(read_config(source))
    config.text_config.rms_norm_eps = 1e-6
    assert difference(load_original(source, config, torch.float32, "sdpa"), values) > TOLERANCE
    exchange = {"ls1": "ls2", "ls2": "ls1"}
    tensors = {
        ".".join([*start, exchange.get(end, end)]): tensor
        for (*start, end), tensor in ((name.split("."), tensor) for name, tensor in read_tensors(source).items())
    }
    assert difference(load(write_original(tmp_path / "scales", read_config(source), tensors)), values) > TOLERANCE
    model = load(source)
    model.lm_head.weight = model.get_input_embeddings().weight
    assert difference(model, values) > TOLERANCE


def test_tied_matrices_are_refused():
    config = translated(read_config(GOLDEN / QWEN2))
    for one in (config, config.text_config):
        one.tie_word_embeddings = True
        with pytest.raises(ConfigError, match="tie_word_embeddings must be False"):
            converted_tensors(GOLDEN / QWEN2, config)
        one.tie_word_embeddings = False
    assert next(converted_tensors(GOLDEN / QWEN2, config))


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_against_a_loop(name: str):
    tensors, new = (
        read_tensors(GOLDEN / name),
        dict(converted_tensors(GOLDEN / name, translated(read_config(GOLDEN / name)))),
    )
    for layer in range(3):
        packed = tensors[f"vision_model.encoder.layers.{layer}.attn.qkv.bias"]
        for part, letter in enumerate("qkv"):
            rows = [packed[32 * part + row] for row in range(32)]
            own = new[f"model.vision_tower.encoder.layer.{layer}.attention.{letter}_proj.bias"]
            assert torch.equal(own, torch.stack(rows))
    if name == INTERNLM2:
        for layer in range(3):
            packed, dim = tensors[f"language_model.model.layers.{layer}.attention.wqkv.weight"], 8
            heads: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
            for slot in range(10):  # two groups of three queries, a key and a value
                heads["qqqkv"[slot % 5]].append(packed[slot * dim : (slot + 1) * dim])
            for letter, found in heads.items():
                own = new[f"model.language_model.layers.{layer}.self_attn.{letter}_proj.weight"]
                assert torch.equal(own, torch.cat(found))


@torch.no_grad()
def six_billion_tower(tensors: dict[str, Tensor], pixels: Tensor, heads: int) -> list[Tensor]:
    """Compute the states of one tile (3, S, S) as InternViT-6B does: tokens one by one, heads one by one."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    inside = "vision_model.embeddings."
    kernel, bias = (tensors[f"{inside}patch_embedding.{kind}"] for kind in ("weight", "bias"))
    tokens = [tensors[f"{inside}class_embedding"][0, 0]]
    for y in range(0, pixels.shape[1], 14):
        for x in range(0, pixels.shape[2], 14):
            tokens.append((kernel * pixels[:, y : y + 14, x : x + 14]).sum((1, 2, 3)) + bias)
    state = torch.stack(tokens) + tensors[f"{inside}position_embedding"][0]
    states, layer = [state], 0
    while f"vision_model.encoder.layers.{layer}.ls1" in tensors:
        own = {name: tensors[f"vision_model.encoder.layers.{layer}.{name}"] for name in (
            "attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight", "attn.proj.bias", "ls1",
            "norm1.weight", "norm2.weight", "ls2", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        )}  # fmt: skip
        q, k, v = (rms(state, own["norm1.weight"]) @ own["attn.qkv.weight"].T).chunk(3, dim=-1)
        q, k = rms(q, own["attn.q_norm.weight"]), rms(k, own["attn.k_norm.weight"])
        mixed, width = torch.empty_like(v), v.shape[1] // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / width**0.5
            mixed[:, part] = scores.softmax(-1) @ v[:, part]
        state = state + own["ls1"] * (mixed @ own["attn.proj.weight"].T + own["attn.proj.bias"])
        inner = functional.gelu(rms(state, own["norm2.weight"]) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
        state = state + own["ls2"] * (inner @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"])
        states.append(state)
        layer += 1
    return states


@torch.no_grad()
def test_a_tower_of_the_large_kind_and_a_native_llama(tmp_path: Path):
    config, tensors = six_billion_style()
    model = load(write_original(tmp_path / "original", config, tensors))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    for tile in range(2):
        expected = six_billion_tower(tensors, pixels[tile], heads=5)
        assert len(found) == len(expected) == 3
        for one, twin in zip(found, expected, strict=True):
            torch.testing.assert_close(one[tile], twin, rtol=0, atol=2e-5)

    text = {key: value for key, value in config["llm_config"].items() if key not in ("architectures", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": 5e6}
    llama = LlamaForCausalLM(LlamaConfig(**text, rope_parameters=rope, tie_word_embeddings=False)).eval()
    llama.load_state_dict(
        {key.removeprefix("language_model."): one for key, one in tensors.items() if key.startswith("language_model.")}
    )
    ids = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(tmp_path: Path, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(GOLDEN / INTERNLM2).items()}
    folder = write_original(tmp_path / "half", read_config(GOLDEN / INTERNLM2), tensors)
    assert {tensor.dtype for _, tensor in converted_tensors(folder, translated(read_config(folder)))} == {dtype}
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Rotations are computed in float32 from the frequencies, which are no weights and stay as they are.
    assert torch.equal(
        model.model.language_model.rotary_emb.inv_freq, load(folder).model.language_model.rotary_emb.inv_freq
    )


def test_a_translated_configuration():
    config = read_config(GOLDEN / INTERNLM2)
    found = convert_config(config, 263)
    assert is_original(config) and not is_original(found.to_dict())
    assert (found.image_token_id, found.image_seq_length, found.vision_feature_layer) == (263, 4, -1)
    assert (found.tie_word_embeddings, found.text_config.tie_word_embeddings) == (False, False)
    assert (found.text_config.model_type, found.text_config.attention_bias) == ("llama", False)
    assert (found.text_config.bos_token_id, found.text_config.eos_token_id, found.text_config.pad_token_id) == (1, 2, 2)
    assert found.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    config["llm_config"]["max_position_embeddings"] = 65536
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    assert convert_config(config, 263).text_config.rope_parameters == dynamic
    del config["llm_config"]["bias"]
    assert convert_config(config, 263).text_config.attention_bias
    silent = convert_config(config | {"vision_config": {"image_size": 448}, "force_image_size": 448}, 263).vision_config
    assert (silent.norm_type, silent.use_qk_norm, silent.attention_bias, silent.layer_norm_eps) == (
        "rms_norm",
        True,
        False,
        1e-6,
    )
    assert (silent.hidden_size, silent.num_attention_heads, silent.num_hidden_layers, silent.intermediate_size) == (
        3200,
        25,
        48,
        12800,
    )
    assert (list(silent.image_size), list(silent.patch_size), silent.layer_scale_init_value) == (
        [448, 448],
        [14, 14],
        0.1,
    )


def test_the_dynamic_rotation_is_the_default_one_to_the_bit():
    config, values = translated(read_config(GOLDEN / INTERNLM2)), read_values(INTERNLM2)
    plain = logits(load_original(GOLDEN / INTERNLM2, config, torch.float32, "sdpa"), values)
    config.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    assert torch.equal(logits(load_original(GOLDEN / INTERNLM2, config, torch.float32, "sdpa"), values), plain)


def changed(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config.update(changes)


def text(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["llm_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(model_type="internvl"), "expected model_type 'internvl_chat', got 'internvl'"),
        (changed(ps_version="v1"), "ps_version must be 'v2', got 'v1'"),
        (lambda config: config.pop("ps_version"), "ps_version must be 'v2', got 'v1'"),
        (changed(select_layer=-4), "select_layer must be -1, got -4"),
        (changed(use_llm_lora=16), "use_llm_lora must be 0, got 16: merge"),
        (changed(use_backbone_lora=8), "use_backbone_lora must be 0, got 8: merge"),
        (changed(pad2square=True), "pad2square must be False, got True"),
        (changed(downsample_ratio=0.25), r"downsample_ratio must be 0\.5, got 0\.25"),
        (changed(force_image_size=448), "force_image_size must be vision_config's image_size 56, got 448"),
        (
            lambda config: config["vision_config"].update(image_size=70) or config.update(force_image_size=70),
            r"image_size must be a multiple of twice the patch_size 14, got 70.*2\.5 visual tokens per side",
        ),
        (text(architectures=["Phi3ForCausalLM"]), "the text model must be one of Qwen2.*got 'Phi3ForCausalLM'"),
        (text(architectures=["InternLM3ForCausalLM"]), "the text model must be one of.*got 'InternLM3ForCausalLM'"),
        (text(architectures=None, model_type="qwen3"), "the text model must be one of.*got 'qwen3'"),
        (text(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling must be dynamic or none, got 'linear'"),
        (changed(vision_config=None), r"expected 'vision_config' in config\.json.*got None"),
        (lambda config: config["llm_config"].pop("hidden_size"), r"llm_config of config\.json must give hidden_size"),
        (text(num_key_value_heads=4), "num_attention_heads must be a multiple of num_key_value_heads 4, got 6"),
        (text(vocab_size=263), "must be from 0 to vocab_size 263 - 1, got 263"),
    ],
)
def test_a_configuration_that_would_be_computed_differently(change: Callable[[dict[str, Any]], object], message: str):
    config = read_config(GOLDEN / INTERNLM2)
    change(config)
    with pytest.raises(ConfigError, match=message):
        convert_config(config, 263)


def test_an_architecture_goes_before_a_model_type_which_may_stand_alone():
    config = read_config(GOLDEN / QWEN2)
    for change in (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "x"},
        {"architectures": [], "model_type": "qwen2"},
    ):
        config["llm_config"] |= change
        assert convert_config(config, 261).text_config.model_type == "qwen2"


@pytest.mark.parametrize(("vocabulary", "expected"), [(151655, 151648), (151674, 151667), (92553, 92546), (268, 261)])
def test_the_image_token_by_its_place(vocabulary: int, expected: int):
    config = read_config(GOLDEN / QWEN2)
    config["llm_config"]["vocab_size"] = vocabulary
    assert image_token_id(config, None) == expected


def test_the_image_token_by_a_tokenizer():
    def tokenizer(*words: str) -> PreTrainedTokenizerFast:
        model = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")

    config = read_config(GOLDEN / QWEN2)
    assert image_token_id(config, tokenizer("<unk>", "a", "<IMG_CONTEXT>")) == 2
    with pytest.raises(ConfigError, match=r"must know <IMG_CONTEXT> as one token, got ids \[0\]"):
        image_token_id(config, tokenizer("<unk>", "a"))
    config["llm_config"]["vocab_size"] = 2
    with pytest.raises(ConfigError, match="must be from 0 to vocab_size 2 - 1, got 2"):
        image_token_id(config, tokenizer("<unk>", "a", "<IMG_CONTEXT>"))
    with pytest.raises(ConfigError, match="must be from 0 to vocab_size 2 - 1, got -5"):
        image_token_id(config, None)
