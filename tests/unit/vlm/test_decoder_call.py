"""The one file that knows how transformers calls decoder layers: it works under every known name, or refuses."""

from __future__ import annotations

import ast
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticCache

from pgp_lightning.attention import watch_attention
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.attention import AttentionGuide
from pgp_lightning.guides.simple import RandomGuide
from pgp_lightning.prefill import pruned
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.decoder_call import (
    KNOWN_VERSIONS,
    Call,
    cache_keyword,
    cache_of_output,
    held_keys,
    recompute_layers,
    without_cache,
)
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.prompt_cache import plain_cache, take_slots
from pgp_lightning.vlm.request import Request
from tests.unit.prefill.made import ask, build, shared

ROOT = Path(__file__).parents[3]
HIDDEN, OTHER = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
ROPE = (torch.zeros(1, 2, 4), torch.ones(1, 2, 4))


def tiny() -> tuple[VLM, dict[str, Any], Request]:
    """A model of five layers, inputs of three prompts, and the request that they were made of."""
    vlm = shared("internvl")
    request = ask(vlm)
    return vlm, prompt_inputs(vlm, request), request


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(nn.Identity(), args, kwargs)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_the_names_of_every_known_version(name: str):
    held = DynamicCache()
    assert call(HIDDEN, **{name: held}).cache is held
    assert call(HIDDEN, **{name: None}).cache is None


@pytest.mark.parametrize("what", ["cache", "mask", "positions", "rope"])
def test_a_missing_keyword_is_no_value(what: str):
    with pytest.raises(ConfigError) as refusal:
        getattr(call(HIDDEN, kv_store=None, use_cache=True), what)
    text = str(refusal.value)
    assert f"transformers {transformers.__version__} calls Identity with kv_store, use_cache" in text
    assert f"this release knows transformers {KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[1]}" in text
    with pytest.raises(ConfigError, match="calls Identity with no keywords, and none of them is hidden_states"):
        _ = call().hidden
    with pytest.raises(ConfigError, match="was called without positions: give the model position_ids"):
        _ = call(HIDDEN, position_ids=None).positions


def test_what_is_rewritten_goes_where_the_call_had_it_and_the_rest_passes_through():
    args, kwargs = call(HIDDEN, "more", attention_mask=None, novelty=3).rewritten(hidden=OTHER, mask=ROPE[0])
    assert args == (OTHER, "more") and kwargs == {"attention_mask": ROPE[0], "novelty": 3}
    args, kwargs = call(hidden_states=HIDDEN, position_embeddings=None).rewritten(hidden=OTHER, rope=ROPE)
    assert args == () and kwargs == {"hidden_states": OTHER, "position_embeddings": ROPE}
    # A layer would swallow a keyword it does not know, and mask as if nothing had been cut.
    with pytest.raises(ConfigError, match="none of them is attention_mask"):
        call(HIDDEN, mask=None).rewritten(mask=ROPE[0])


def renamed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As a later transformers might call it."""
    old = "cache" if "cache" in kwargs else "past_key_values"
    return args, {("kv_store" if name == old else name): value for name, value in kwargs.items()}


@pytest.mark.parametrize("hook", ["pruning", "attention"])
def test_a_cache_under_an_unknown_name_is_refused_by_version_and_keyword(hook: str):
    vlm, inputs, request = tiny()
    layer = vlm.decoder_layers[0]
    module = layer if hook == "pruning" else layer.get_submodule("self_attn")
    handle = module.register_forward_pre_hook(renamed, with_kwargs=True)
    expected = rf"transformers {transformers.__version__} calls \w+ with .*kv_store.* none of them is cache or past_key"
    try:
        with pytest.raises(ConfigError, match=expected):
            if hook == "pruning":
                with pruned(vlm.model, Guided(RandomGuide(), keep_ratio=0.5), inputs, request):
                    vlm.model.generate(**inputs, max_new_tokens=2)
            else:
                with watch_attention(module, lambda weights: None):
                    vlm.model(**inputs)
    finally:
        handle.remove()


def test_own_calls_use_no_name_that_is_deprecated():
    vlm, inputs, request = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        recompute_layers(build("internvl").decoder)
        AttentionGuide(vlm, max_new_tokens=2)(request)
        for pruner in (FastV(layer=0, keep_ratio=0.5), FastV(layer=2, keep_ratio=0.5)):
            with pruned(vlm.model, pruner, inputs):
                out = vlm.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
                cache = cache_of_output(out)
                assert len(cache.layers) == len(vlm.decoder_layers)
                # One token more, behind what the cache holds.
                step = torch.full((len(inputs["input_ids"]), 1), 5)
                vlm.model(input_ids=step, **{cache_keyword(vlm.model): cache})
    with pytest.raises(ConfigError, match="no cache in the output, which has logits: call with use_cache=True"):
        cache_of_output({"logits": HIDDEN})
    with pytest.raises(ConfigError, match=r"Identity of transformers .* takes no cache under the names cache or past"):
        cache_keyword(nn.Identity())


def test_caches_are_plain_and_keep_the_slots_they_are_told_to():
    assert plain_cache(None) is None
    cache = DynamicCache()
    states = [torch.randn(2, 3, 5, 4) for _ in range(6)]
    for layer in range(3):
        cache.update(states[2 * layer], states[2 * layer + 1], layer)
    assert plain_cache(cache) is cache
    slots = torch.tensor([[0, 4], [2, 3]])
    take_slots(cache, 2, slots)
    for layer, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
        for held, whole in ((cache.layers[layer].keys, keys), (cache.layers[layer].values, values)):
            kept = torch.stack([whole[row][:, slots[row]] for row in range(2)]) if layer < 2 else whole
            assert torch.equal(held, kept)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8)]
    static = StaticCache(config=tiny()[0].decoder.config, max_cache_len=8)
    for other, named in ((sliding, "DynamicSlidingWindowLayer"), (static, "StaticLayer")):
        with pytest.raises(ConfigError, match=f"takes a DynamicCache of plain layers; got .*{named}"):
            plain_cache(other)


def test_a_pass_that_starts_anew_has_no_cache_and_counts_positions_from_the_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for name in ("cache", "past_key_values"):
        anew = without_cache({"attention_mask": mask, name: DynamicCache(), "use_cache": True})
        assert set(anew) == {"attention_mask", "use_cache", "position_ids"} and anew["use_cache"] is False
        assert anew["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": mask}
    assert without_cache(given)["position_ids"] is mask and "position_ids" not in without_cache({})


def test_keys_are_those_of_the_module_s_own_layer():
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, 1, 2, 4), float(layer)), OTHER[None], layer)
    module: Any = nn.Identity()
    module.layer_idx = 1
    held = held_keys(Call(module, (), {"cache": cache}))
    assert isinstance(held, Tensor) and held.eq(1).all() and held_keys(call(cache=None)) is None


def test_transformers_is_capped_at_the_newest_minor_that_is_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [Requirement(text) for text in project["dependencies"] if text.startswith("transformers")]
    lowest, newest = (Version(text) for text in KNOWN_VERSIONS)
    assert lowest in wanted.specifier and f"{newest}.9" in wanted.specifier
    assert f"{lowest.major}.{lowest.minor - 1}.9" not in wanted.specifier
    assert f"{newest.major}.{newest.minor + 1}.0" not in wanted.specifier


def test_no_other_file_spells_out_keywords_of_decoder_layers():
    names = {"past_key_values", "cache", "position_embeddings"}
    package = ROOT / "pgp_lightning"
    files = [package / f"{name}.py" for name in ("attention", "pruner")]
    files += sorted(package.glob("prefill*.py"))
    files += [file for room in ("pruners", "guides") for file in sorted((package / room).rglob("*.py"))]
    assert len(files) > 10
    for file in files:
        tree = ast.parse(file.read_text())
        spelled = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names}
        spelled |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in names}
        assert not spelled, f"{file.name} names {spelled}: vlm/decoder_call.py owns them"
