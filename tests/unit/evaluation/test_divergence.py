"""A guide's figures, counted again token by token, and beside what validation logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.data.collate import Batch
from pgp_lightning.evaluation.divergence import guide_figures
from pgp_lightning.guides.posterior import Reconstruction
from pgp_lightning.training.pgp import PGP
from pgp_lightning.vlm.request import Request
from tests.unit.training.made import four, make

COUNTS = (12, 4, 20, 12)
RELEVANT = ([0, 5, 11], [], [3, 17, 18, 19], [8])
OBJECTS = ([0, 1, 5, 10, 11], [2, 3], [3, 6, 7, 17, 18, 19], [7, 8, 9])
Figures = dict[str, float]


def mask_of(rows: tuple[list[int], ...]) -> Tensor:
    mask = torch.zeros(4, 20, dtype=torch.bool)
    for row, places in zip(mask, rows, strict=True):
        row[places] = True
    return mask


def known(batch: Batch | None = None) -> Batch:
    """Say which tokens are relevant; the second question is about none."""
    batch = batch or four()
    return replace(batch, request=replace(batch.request, relevant=mask_of(RELEVANT)))


def objects(request: Request) -> Tensor:
    """Objects of the four questions; padding is called an object to see that it counts for nothing."""
    padding = torch.arange(20) >= torch.tensor(request.counts)[:, None]
    return mask_of(OBJECTS) | padding


def by_hand(module: PGP, batch: Batch) -> Figures:
    """Sum and count token by token, from what the module kept of its passes."""
    with torch.no_grad():
        module.passes(batch, None, False)
    assert module.last is not None
    sums, of = dict[str, float](), dict[str, float]()
    kl, gate = list[float](), list[float]()
    for row, tokens in enumerate(COUNTS):
        grid = batch.request.grids[batch.request.images[row]]
        own = [float(module.last.divergence[row, token]) for token in range(tokens)]
        kl.append(sum(own) / tokens)
        gate.append(float(module.last.posterior.gate[row, :tokens].mean()))
        for token, value in enumerate(own):
            tile = token // 4
            parts = ["thumbnail" if grid.thumbnail and tile == grid.tiles - 1 else f"tile_{tile}"]
            parts += ["last_tenth"] if token >= tokens - math.ceil(tokens / 10) else []
            if RELEVANT[row]:
                other = "other_objects" if token in OBJECTS[row] else "neither"
                parts += ["asked", "relevant" if token in RELEVANT[row] else other]
            for part in [*parts, "all"]:
                sums[part] = sums.get(part, 0.0) + value
                of[part] = of.get(part, 0) + 1
    found = {"kl": sum(kl) / len(kl), "gate": sum(gate) / len(gate)}
    for part in set(sums) - {"asked", "all"}:
        among = "asked" if part in ("relevant", "other_objects", "neither") else "all"
        found[f"mass/{part}"], found[f"tokens/{part}"] = sums[part] / sums[among], of[part] / of[among]
    return found


def test_shares_and_means_equal_a_slow_twin(tiny_base: str):
    module, batch = make(tiny_base), known()
    found, expected = guide_figures(module.guide, [batch], objects), by_hand(module, batch)
    others = {"accuracy", "accuracy_blind", "recall@5", "recall@11", "recall@20"}
    assert found.keys() - expected.keys() == others and expected.keys() <= found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert {"tile_3", "thumbnail", "last_tenth"} <= {name.partition("/")[2] for name in found}
    for title in ("mass", "tokens"):
        for parts in (("relevant", "other_objects", "neither"), (*(f"tile_{k}" for k in range(4)), "thumbnail")):
            assert sum(found[f"{title}/{part}"] for part in parts) == pytest.approx(1)


def test_figures_equal_those_that_validation_logs(tiny_base: str):
    module, batch = make(tiny_base, seed=3), known()
    with torch.no_grad():
        module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    found = guide_figures(module.guide, [batch], seed=3)
    logged = {"accuracy": "reconstruction_accuracy"}
    for name in ("kl", "accuracy", "recall@5", "recall@11", "recall@20"):
        assert found[name] == pytest.approx(module.logged[f"val/{logged.get(name, name)}"]), name


def test_without_objects_and_without_truth(tiny_base: str):
    module = make(tiny_base)
    full = guide_figures(module.guide, [known()], objects)
    plain, unknown = guide_figures(module.guide, [known()]), guide_figures(module.guide, [four()], objects)
    assert plain["mass/relevant"] == full["mass/relevant"]
    assert plain["mass/rest"] == pytest.approx(full["mass/other_objects"] + full["mass/neither"])
    assert plain["tokens/rest"] == pytest.approx(36 / 44)
    assert not {name for name in plain if name.endswith(("objects", "neither"))}
    assert unknown == {k: v for k, v in full.items() if k in unknown}
    assert not {k for k in unknown if k.startswith("recall") or k.endswith(("relevant", "rest", "objects", "neither"))}
    # Nothing is relevant to any question: the truth is known, and there is nothing to recall.
    blank = known()
    blank.request.relevant = torch.zeros(4, 20, dtype=torch.bool)
    assert guide_figures(module.guide, [blank], objects).keys() == unknown.keys()


def test_batches_add_up(tiny_base: str):
    module, batch = make(tiny_base), known()
    together = guide_figures(module.guide, [batch])
    apart = guide_figures(module.guide, [batch.select([2]), batch.select([3, 1]), batch.select([0])])
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=1e-4), name


def test_accuracy_counts_whole_answers_of_one_z(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    module = make(tiny_base)
    real, seen = module.guide.reconstruction_pass, []

    def made(request: Request, answers: list[str], latents: Tensor, subset: Any = None, blind: bool = False) -> Any:
        """Be right about every token, except one of the third answer's and, blind, those of two answers more."""
        found: Reconstruction = real(request, answers, latents, subset, blind)
        seen.append((latents, blind))
        logits = torch.nn.functional.one_hot(found.targets, found.logits.shape[1]).float() * 9
        wrong = (found.rows == 2).nonzero()[1:2].flatten()
        if blind:
            wrong = torch.cat([wrong, (found.rows < 2).nonzero().flatten()])
        logits[wrong] = logits[wrong].roll(1, dims=1)
        return found._replace(logits=logits)

    monkeypatch.setattr(module.guide, "reconstruction_pass", made)
    found = guide_figures(module.guide, [four()])
    assert (found["accuracy"], found["accuracy_blind"]) == (0.75, 0.25)
    (first, with_question), (second, without) = seen
    assert torch.equal(first, second) and (with_question, without) == (False, True)


def everything(guide: torch.nn.Module) -> tuple[dict[str, bool], dict[str, Tensor], Tensor]:
    weights = {name: value.clone() for name, value in guide.state_dict().items()}
    return {name: one.training for name, one in guide.named_modules()}, weights, torch.random.get_rng_state()


@pytest.mark.parametrize("fails", [False, True])
def test_the_guide_is_left_as_found(tiny_base: str, fails: bool):
    guide = make(tiny_base, guide={"lora_dropout": 0.5}).guide
    quiet = guide_figures(guide, [known()])
    guide.train()
    guide.bottleneck.eval()

    def broken(request: Request) -> Tensor:
        raise RuntimeError("power cut")

    before = everything(guide)
    look: Callable[[Request], Tensor] | None = broken if fails else None
    if fails:
        with pytest.raises(RuntimeError, match="power cut"):
            guide_figures(guide, [known()], look)
    else:
        assert guide_figures(guide, [known()], look) == quiet  # dropout was off
    after = everything(guide)
    assert before[0] == after[0] and any(before[0].values()) and not all(before[0].values())
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert torch.equal(before[2], after[2]) and all(p.grad is None for p in guide.parameters())


def test_a_guide_without_divergence_has_no_mass_to_share(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    guide = make(tiny_base).guide
    monkeypatch.setattr(guide.bottleneck, "divergence", lambda posterior: torch.zeros(posterior.mean.shape[:2]))
    found = guide_figures(guide, [known()], objects)
    assert found["kl"] == 0 and found["tokens/relevant"] == pytest.approx(8 / 44)
    assert not [name for name in found if name.startswith("mass/")]


def test_no_question_is_no_measurement(tiny_base: str):
    with pytest.raises(ValueError, match="at least one question, got none"):
        guide_figures(make(tiny_base).guide, [])
