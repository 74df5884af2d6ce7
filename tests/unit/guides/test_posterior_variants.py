"""The posterior guide: what runs how often, its variants and precisions, and its artefact on disk."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pgp_lightning.bottleneck import Posterior
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.objective import divergence_loss, reconstruction_loss
from pgp_lightning.vlm.request import Request
from tests.tiny import ANSWERS, GRIDS, QUESTIONS, WIDTH, save_tiny, tiny_request
from tests.unit.guides.made import CLOSE, both_passes, make, some, watched

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What runs how often


def test_the_tower_sees_each_image_once_and_the_head_only_supervised_rows(guide: PosteriorGuide, request_: Request):
    model = guide.vlm.model
    towers, heads = (
        watched(model.model.vision_tower, lambda x: len(x["pixel_values"] if isinstance(x, dict) else x)),
        watched(model.lm_head, lambda x: tuple(x.shape)),
    )
    with towers as tiles, heads as rows:
        visual = guide.visual_tokens(request_)
        found = guide.bottleneck_pass(request_, visual)
        assert rows == []
        guide(request_)
        assert rows == []
        predicted = guide.reconstruction_pass(request_, list(ANSWERS), found.posterior.mean)
    assert tiles == [9, 9]  # once for the training step, once for the guide's own forward; four questions, nine tiles
    supervised = sum(len(answer.split()) + 1 for answer in ANSWERS)
    assert rows == [(supervised, WIDTH)] and len(predicted.targets) == supervised
    assert torch.equal(visual[0], visual[3])
    assert not visual.requires_grad


def test_the_first_pass_ends_at_the_last_visual_slot(guide: PosteriorGuide):
    request = tiny_request(QUESTIONS[:1], GRIDS[:1])
    before = guide.vlm.processor.prompt(QUESTIONS[0], None, "question_first").before
    with watched(guide.vlm.decoder, lambda k: (k["inputs_embeds"].shape, k["attention_mask"].shape)) as seen:
        guide(request)
    assert seen == [((1, len(before) + 12, WIDTH), (1, len(before) + 12))]


def test_the_adapter_touches_language_layers_only(tiny_base: str):
    guide = PosteriorGuide(tiny_base)
    adapted = {name for name, module in guide.vlm.model.named_modules() if hasattr(module, "lora_A")}
    blocks = {p: "self_attn" if p in PROJECTIONS[:4] else "mlp" for p in PROJECTIONS}
    expected = {f"model.language_model.layers.{i}.{block}.{p}" for i in range(2) for p, block in blocks.items()}
    assert adapted == expected
    # The tower has projections of the same names.
    assert any(
        name.endswith("vision_tower.encoder.layer.0.attention.q_proj") for name, _ in guide.vlm.model.named_modules()
    )
    ranks = {p.shape[0] for name, p in guide.named_parameters() if "lora_A" in name}
    assert ranks == {32}


def test_training_mode_leaves_the_tower_alone(tiny_base: str):
    guide = PosteriorGuide(tiny_base)
    assert guide.training and not guide.vlm.model.model.vision_tower.training
    assert guide.vlm.decoder.layers[0].training, "a fresh guide must train as Lightning finds it"
    dropouts = [m for name, m in guide.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)]
    assert dropouts and all(m.training and m.p == 0.05 for m in dropouts)
    guide.eval()
    assert not any(module.training for module in guide.modules())


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_base: str, request_: Request):
    gradients, calls = [], []
    for checkpointing in (False, True):
        guide = make(tiny_base, gradient_checkpointing=checkpointing, lora_dropout=0.3).train()
        torch.manual_seed(3)
        with watched(guide.vlm.decoder.layers[1].mlp, lambda _: None) as seen:
            found, predicted = both_passes(guide, request_)
            loss = reconstruction_loss(*predicted, "token") + divergence_loss(found.divergence, found.mask)
            loss.backward()
        calls.append(len(seen))
        gradients.append({name: p.grad for name, p in guide.named_parameters() if p.requires_grad})
    assert calls == [2, 4]  # two passes, and each once more in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# Variants and precision


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "exp", "gate_bias": -0.7},
        {"learned_prior": False},
        {"head_layers": 1},
        {"lora_rank": 0},
        {"reconstruction_order": "image_first"},
        {"attention": "eager"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_variant_trains(tiny_base: str, request_: Request, options: dict[str, Any]):
    torch.manual_seed(0)
    guide = PosteriorGuide(tiny_base, **options)
    names = [name for name, p in guide.named_parameters() if p.requires_grad]
    assert any("lora_" in name for name in names) == (options.get("lora_rank") != 0)
    assert any("prior" in name for name in names) == options.get("learned_prior", True)
    assert ("bottleneck.gate_head.2.weight" in names) == (options.get("head_layers") != 1)
    found, predicted = both_passes(guide, request_)
    (reconstruction_loss(*predicted, "token") + divergence_loss(found.divergence, found.mask)).backward()
    gate = found.posterior.gate[found.mask].mean().item()
    assert 0.3 < gate < 0.7
    assert all(p.grad is not None for p in guide.parameters() if p.requires_grad)


def test_eager_and_sdpa_attention_agree(tiny_base: str, guide: PosteriorGuide, request_: Request):
    subset = some(request_)
    eager = make(tiny_base, attention="eager")
    for share in (None, subset):
        ours, theirs = both_passes(guide, request_, share), both_passes(eager, request_, share)
        torch.testing.assert_close(ours[0].divergence, theirs[0].divergence, **CLOSE)
        torch.testing.assert_close(ours[1].logits, theirs[1].logits, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_base_keeps_the_bottleneck_in_float32(tiny_base: str, guide: PosteriorGuide, request_: Request):
    half = make(tiny_base, dtype="bfloat16")
    assert {p.dtype for p in half.vlm.model.model.vision_tower.parameters()} == {torch.bfloat16}
    found, predicted = both_passes(half, request_)
    assert found.states.dtype == torch.bfloat16
    kept: Posterior = found.posterior
    assert {t.dtype for t in (*kept, found.divergence, predicted.logits)} == {torch.float32}
    (reconstruction_loss(*predicted, "token") + divergence_loss(found.divergence, found.mask)).backward()
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)
    scores, exact = half(request_), guide(request_)
    real = exact.isfinite()
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores[real], exact[real]]))[0, 1] > 0.99
    assert half.base_fingerprint == guide.base_fingerprint, "a model is the same one in either precision"


def test_a_float32_guide_under_autocast(guide: PosteriorGuide, request_: Request):
    with torch.autocast("cpu", torch.bfloat16):
        found, predicted = both_passes(guide, request_)
    assert found.divergence.dtype == predicted.logits.dtype == torch.float32
    torch.testing.assert_close(found.divergence, both_passes(guide, request_)[0].divergence, rtol=0.2, atol=0.1)


# On disk


@pytest.mark.parametrize("rank", [4, 0])
def test_a_saved_guide_scores_bitwise_alike(tiny_base: str, request_: Request, tmp_path: Path, rank: int):
    guide = make(tiny_base, lora_rank=rank, gate="exp", gate_bias=-0.5, head_layers=1)
    guide.save_pretrained(tmp_path / "new" / "guide", {"optimiser_steps": 3})
    facts = json.loads((tmp_path / "new" / "guide" / "guide.json").read_text())
    assert facts["training"] == {"optimiser_steps": 3}
    assert (facts["tokens_per_tile"], facts["tile_size"], facts["family"]) == (4, 32, "internvl")
    assert set(facts["arguments"]) == set(inspect.signature(PosteriorGuide).parameters)
    again = PosteriorGuide.from_pretrained(tmp_path / "new" / "guide")
    assert not any(module.training for module in again.modules())
    assert torch.equal(again(request_), guide(request_))
    for name, value in guide.trainable().items():
        assert torch.equal(again.trainable()[name], value), name
    # What was trained can be trained on.
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(guide.trainable())
    files = {path.name for path in (tmp_path / "new" / "guide").iterdir()}
    assert "bottleneck.safetensors" in files and ("adapter_model.safetensors" in files) == bool(rank)
    assert not any(name.endswith((".bin", ".pt", ".ckpt")) for name in files)
    size = sum(path.stat().st_size for path in (tmp_path / "new" / "guide").glob("*.safetensors"))
    assert size < 8 * sum(v.numel() for v in guide.trainable().values()) + 20_000, "the base must not be in it"


def test_a_guide_moves_with_its_base(tiny_base: str, request_: Request, tmp_path: Path):
    base = save_tiny(tmp_path / "first")
    guide = make(base)
    guide.save_pretrained(tmp_path / "guide")
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(ConfigError, match="no model at "):
        PosteriorGuide.from_pretrained(tmp_path / "guide")
    again = PosteriorGuide.from_pretrained(tmp_path / "guide", base=str(tmp_path / "second"))
    assert torch.equal(again(request_), guide(request_))
    half = PosteriorGuide.from_pretrained(tmp_path / "guide", base=str(tmp_path / "second"), dtype="bfloat16")
    assert half(request_).isfinite().any()


def test_another_base_is_refused(tiny_base: str, guide: PosteriorGuide, tmp_path: Path):
    guide.save_pretrained(tmp_path / "guide")
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"guide was trained on another base: '.*other' has fingerprint .*pass base="):
        PosteriorGuide.from_pretrained(tmp_path / "guide", base=other)


def test_what_is_no_guide_is_refused(guide: PosteriorGuide, tmp_path: Path):
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(ConfigError, match=r"holds no guide: expected guide\.json"):
            PosteriorGuide.from_pretrained(folder)
    guide.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "guide.json").read_text())
    (tmp_path / "guide.json").write_text(json.dumps({**facts, "method_version": 99}))
    with pytest.raises(ConfigError, match=r"'posterior', version 99; this package reads 'posterior', version 1"):
        PosteriorGuide.from_pretrained(tmp_path)


def test_a_base_without_the_layers_of_the_adapter(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pgp_lightning.vlm.family.VLM.adapter_targets", r".*no_such_layer")
    with pytest.raises(ConfigError, match="the adapter matches no layer of "):
        PosteriorGuide(tiny_base)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be at least 1, got 0: lora_rank 0 leaves the adapter out"),
        ({"lora_dropout": float("nan")}, r"lora_dropout must be in \[0, 1\), got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1\.0"),
        ({"log_variance_bias": -20.0}, "log_variance_bias must lie between"),
    ],
)
def test_numbers_with_which_nothing_is_learned_are_refused_before_the_base_is_loaded(
    options: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        PosteriorGuide("nowhere", **options)


def test_the_posterior_network_is_refused_nonsense(tiny_base: str):
    with pytest.raises(ConfigError, match="gate must be one of sigmoid, exp"):
        PosteriorGuide(tiny_base, gate="relu")  # type: ignore[arg-type]
