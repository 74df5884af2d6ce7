"""Rows of attention recomputed beside a model against the matrices it returns itself, and what masks mean."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pgp_lightning.attention import (
    attention_rows,
    coming_parts,
    coming_rows,
    project_keys,
    project_queries,
    watch_attention,
)
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from tests.pairwise import pairwise
from tests.tiny import enlarge
from tests.toy_decoder import read_golden, toy_vlm

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
DECODERS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama, grouped keys": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2)),  # biases
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),  # a norm for every head
}
PADDING = (0, 4, 1)
PROMPT = 11


def decoder(name: str, attention: str = "sdpa") -> Any:
    kind, config = DECODERS[name]
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = kind(config).eval()
    enlarge(model)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.uniform_(0.5, 1.5)
    return model


def prompts(padding: tuple[int, ...] = PADDING) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (len(padding), PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(PROMPT) >= torch.tensor(padding)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def watch_all(model: Any, last: int, run: Any, block: int | None = None) -> list[list[Tensor]]:
    """Run a model and return the rows of each layer, one tensor a call."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as stack:
        for layer, found in zip(model.model.layers, seen, strict=True):
            stack.enter_context(watch_attention(layer.self_attn, found.append, last, block))
        run(model)
    return seen


@pairwise(name=DECODERS, padding=[(0, 0), PADDING], attention=["sdpa", "eager"])
def test_rows_are_the_models_own(name: str, padding: tuple[int, ...], attention: str):
    inputs, options = prompts(padding), {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = decoder(name, "eager").generate(**inputs, **options, output_attentions=True)
        sequences = []
        seen = watch_all(
            decoder(name, attention), 5, lambda model: sequences.append(model.generate(**inputs, **options).sequences)
        )
    assert torch.equal(sequences[0], expected.sequences)
    assert [len(found) for found in seen] == [4] * 3  # the prompt and three of the four tokens
    for step, matrices in enumerate(expected.attentions):
        for found, matrix in zip(seen, matrices, strict=True):
            rows = found[step]
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows, matrix[:, :, -5:], **CLOSE)
            assert not any(row[..., :hidden].any() for row, hidden in zip(rows, padding, strict=True))


@pytest.mark.parametrize("cache", [True, False])
def test_more_rows_than_there_are_give_the_whole_matrix_and_blocks_give_it_in_parts(cache: bool):
    inputs = prompts((0, 0))

    def run(model: Any) -> None:
        with torch.no_grad():
            model(**inputs, use_cache=cache)

    with torch.no_grad():
        matrices = decoder("qwen2", "eager")(**inputs, output_attentions=True).attentions
    whole, parts = watch_all(decoder("qwen2"), 99, run), watch_all(decoder("qwen2"), 99, run, block=4)
    for found, blocks, matrix in zip(whole, parts, matrices, strict=True):
        torch.testing.assert_close(found[0], matrix, **CLOSE)
        assert [rows.shape[2] for rows in blocks] == [4, 4, 3]
        torch.testing.assert_close(torch.cat(blocks, dim=2), matrix, **CLOSE)


def test_rows_of_a_prompt_that_continues_a_cache_see_all_of_it():
    ids, mask = prompts().values()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = decoder("llama, grouped keys", "eager")(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True
        )
        model = decoder("llama, grouped keys")
        head = {"input_ids": ids[:, :6], "attention_mask": mask[:, :6], "position_ids": positions[:, :6]}
        tail = {"input_ids": ids[:, 6:], "attention_mask": mask, "position_ids": positions[:, 6:]}
        cache = cache_of_output(model(**head, use_cache=True))
        seen = watch_all(model, 3, lambda m: m(**tail, **{cache_keyword(m): cache}))
    for found, matrix in zip(seen, whole.attentions, strict=True):
        torch.testing.assert_close(found[0], matrix[:, :, -3:], **CLOSE)


def test_rows_are_those_of_the_original_sgp_code():
    values = read_golden("sgp_e2e_a.npz")
    vlm = toy_vlm(str(values["small_weights"]))
    start, count = values["image_start"].item(), values["num_image"].item()
    rows = values["attn_prefill_rows"].shape[2]
    inputs = {"inputs_embeds": torch.from_numpy(values["small_inputs_embeds"])}
    inputs["attention_mask"] = torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.int64)
    steps = len(values["small_tokens"])
    with torch.no_grad():
        seen = watch_all(
            vlm.model, rows, lambda m: m.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        )
    image = slice(start, start + count)
    prompt = torch.stack([found[0][0, :, :, image] for found in seen])
    torch.testing.assert_close(prompt, torch.from_numpy(values["attn_prefill_rows"]), rtol=1e-4, atol=1e-5)
    decoded = torch.stack([torch.stack([step[0, :, 0, image] for step in found[1:]], dim=1) for found in seen])
    torch.testing.assert_close(decoded, torch.from_numpy(values["attn_decode_rows"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_coming_rows_are_what_the_layer_then_pays(name: str):
    model, inputs = decoder(name), prompts()
    expected: list[Tensor] = []
    coming: list[Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        coming.append(
            coming_rows(layer, args[0], kwargs["position_embeddings"], inputs["attention_mask"].bool(), last=4)
        )

    with torch.no_grad(), ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.enter_context(watch_attention(layer.self_attn, expected.append, 4))
        model(**inputs, use_cache=False)
        matrices = decoder(name, "eager")(**inputs, output_attentions=True).attentions
    assert len(coming) == len(expected) == 3
    for found, rows, matrix in zip(coming, expected, matrices, strict=True):
        assert found.shape == (3, 4, 4, PROMPT)
        torch.testing.assert_close(found, rows, **CLOSE)
        torch.testing.assert_close(found, matrix[:, :, -4:], **CLOSE)


@pytest.mark.parametrize("at_once", [None, 1, 3 * 4 * PROMPT * 4])
def test_parts_are_the_rows_in_order(at_once: int | None):
    layer: Any = decoder("qwen2").model.layers[1]
    hidden, angle = torch.randn(3, PROMPT, 32), torch.rand(3, PROMPT, 8)
    given = layer, hidden, (angle.cos(), angle.sin()), torch.arange(PROMPT) >= torch.tensor(PADDING)[:, None], 7
    parts = list(coming_parts(*given, at_once))
    assert [part.shape[2] for part in parts] == {None: [7], 1: [1] * 7}.get(at_once, [4, 3])
    torch.testing.assert_close(torch.cat(parts, dim=2), coming_rows(*given))
    assert not any(part.requires_grad for part in parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_coming_rows_are_computed_where_the_layer_lies():
    layer: Any = decoder("qwen2").model.layers[1]
    hidden, angle = torch.randn(2, PROMPT, 32), torch.rand(2, PROMPT, 8)
    given = hidden, (angle.cos(), angle.sin()), torch.ones(2, PROMPT, dtype=torch.bool)
    here, there = coming_rows(layer, *given), coming_rows(layer.to("cuda"), *given)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-5)


def made(dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor]:
    """Queries and keys, the keys large and alike but for their last parts."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(1, 4, 2, 64, generator=generator) + 0.5
    keys = size * torch.ones(1, 2, 9, 64) + torch.randn(1, 2, 9, 64, generator=generator)
    return (size * queries).to(dtype), keys.to(dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 60.0), (torch.bfloat16, 12.0)])
def test_products_of_half_precision_are_neither_infinite_nor_rounded(dtype: torch.dtype, size: float):
    module: Any = Still()
    module.scaling = 64**-0.5
    queries, keys = made(dtype, size)
    expected = (queries.double() @ keys.double().repeat_interleave(2, dim=1).mT * module.scaling).softmax(dim=-1)
    found = attention_rows(module, queries, keys)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-4)
    rounded = (queries @ keys.repeat_interleave(2, dim=1).mT).float() * module.scaling
    assert not torch.allclose(rounded.softmax(dim=-1).double(), expected, atol=1e-1)  # NaN among it


def tower(name: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "patch_size": 4}
    vision: Any = {
        "internvit": lambda: InternVLVisionConfig(**sizes, num_attention_heads=4, image_size=(16, 16)),
        "internvit, normed": lambda: InternVLVisionConfig(
            **sizes, num_attention_heads=4, image_size=(16, 16), use_qk_norm=True, attention_bias=True
        ),
        "clip": lambda: CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=16),
    }[name]()
    vision._attn_implementation = "eager"
    torch.manual_seed(0)
    model = (CLIPVisionModel if name == "clip" else InternVLVisionModel)(vision).eval()
    enlarge(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_norm.weight" in key:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", ["internvit", "internvit, normed", "clip"])
def test_rows_of_a_vision_tower_are_its_own(name: str):
    model = tower(name)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    modules = [module for module in model.modules() if hasattr(module, "q_proj")]
    assert len(modules) == 2
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found.append(attention_rows(module, project_queries(module, hidden[:, :3]), project_keys(module, hidden)))

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    with torch.no_grad():
        matrices = model(pixel_values=pixels, output_attentions=True).attentions
    assert matrices is not None and hooks
    for rows, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(rows, matrix[:, :, :3], **CLOSE)


class Still(nn.Module):
    """Stands in for an attention module under an implementation that this machine lacks: it does not attend."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.layer_idx = 4, 0.5, 0
        self.q_proj, self.k_proj = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


def rows_under(mask: Tensor | None, last: int = 3) -> Tensor:
    torch.manual_seed(0)
    module, hidden, angle = Still(), torch.randn(2, 6, 8), torch.rand(2, 6, 4)
    seen: list[Tensor] = []
    with watch_attention(module, seen.append, last):
        module(hidden, position_embeddings=(angle.cos(), angle.sin()), attention_mask=mask, cache=None)
    return seen[0]


VALID = torch.arange(6) >= torch.tensor([0, 4])[:, None]
ALLOWED = (VALID[:, None] & torch.ones(6, 6, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize(
    "mask",
    [
        VALID.long(),
        VALID,
        torch.zeros(2, 1, 6, 6).masked_fill(~ALLOWED, torch.finfo(torch.float32).min),
        torch.zeros(2, 1, 6, 6, dtype=torch.bfloat16).masked_fill(~ALLOWED, torch.finfo(torch.bfloat16).min),
        torch.zeros(2, 1, 6, 6, dtype=torch.float16).masked_fill(~ALLOWED, torch.finfo(torch.float16).min),
        torch.zeros(2, 1, 6, 6).masked_fill(~ALLOWED, -torch.inf),
    ],
    ids=["flash", "flash, bool", "eager", "eager, bfloat16", "eager, float16", "minus infinity"],
)
def test_masks_of_all_implementations_mean_the_same(mask: Tensor):
    expected = rows_under(ALLOWED)
    assert torch.equal(rows_under(mask), expected)
    assert torch.equal(expected > 0, ALLOWED[:, :, -3:].expand(-1, 4, -1, -1))


def test_without_a_mask_only_the_future_is_hidden():
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert torch.equal(rows_under(None), rows_under(causal))
    assert torch.equal(rows_under(None)[0, 0] > 0, causal[0, 0, -3:])


def test_a_row_that_may_see_nothing_is_zero():
    rows = rows_under(VALID.long())
    assert not rows[1, :, 0].any()  # slot 3 of a row whose first four are padding
    torch.testing.assert_close(rows[1, :, 1:].sum(dim=-1), torch.ones(4, 2))
    assert rows.isfinite().all()


def test_rows_sum_to_one_and_carry_no_gradient():
    rows = rows_under(None, last=6)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(2, 4, 6))
    assert not rows.requires_grad


def test_the_hook_is_gone_afterwards_also_after_an_exception():
    module = Still()
    with watch_attention(module, lambda rows: None):
        assert len(module._forward_hooks) == 1
    assert not module._forward_hooks
    with pytest.raises(RuntimeError, match="out of the window"), watch_attention(module, lambda rows: None):
        raise RuntimeError("out of the window")
    assert not module._forward_hooks


def test_watching_changes_nothing():
    model, inputs = decoder("qwen2"), prompts()
    with torch.no_grad():
        expected = model(**inputs).logits
        found: list[Tensor] = []
        watch_all(model, 2, lambda m: found.append(m(**inputs).logits))
    assert torch.equal(found[0], expected)
