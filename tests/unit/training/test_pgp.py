"""The training step: loss, random numbers, figures, optimiser and checkpoints."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.data.collate import Batch
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.training.pgp import PGP
from tests.tiny import QUESTIONS, WIDTH, row_of
from tests.unit.training.made import cut, four, make


def by_hand(module: PGP, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Per sample, alone and in plain arithmetic: mean divergence and summed cross-entropy, and answer tokens."""
    guide, bottleneck = module.guide, module.guide.bottleneck
    divergences, losses, counts = [], [], []
    for row in range(len(batch)):
        module.passes(cut(batch, row), None, False)
        latents = module.last.latents  # type: ignore[union-attr]
        request = row_of(batch.request, row)
        mean, log_variance, _ = bottleneck(guide.bottleneck_pass(request, guide.visual_tokens(request)).states)
        prior, spread = bottleneck.prior_mean, bottleneck.prior_log_variance.exp()
        terms = (spread / log_variance.exp()).log() + (log_variance.exp() + (mean - prior) ** 2) / spread - 1
        divergences.append((0.5 * terms).mean())
        # The second pass through transformers' own forward, with Z in place of the image's features.
        processor = guide.vlm.processor
        prompt = processor.prompt(request.questions[0], batch.answers[row], "question_first")
        ids = torch.tensor([[*prompt.before, *[0] * latents.shape[1], *prompt.after, *prompt.answer]])
        embeddings = guide.vlm.model.get_input_embeddings()(ids).clone()
        embeddings[0, len(prompt.before) :][: latents.shape[1]] = latents[0]
        logits = guide.vlm.model(inputs_embeds=embeddings).logits[0].log_softmax(-1)
        first = ids.shape[1] - len(prompt.answer)
        losses.append(-sum(logits[first + i - 1, token] for i, token in enumerate(prompt.answer)))
        counts.append(len(prompt.answer))
    return torch.stack(divergences), torch.stack(losses), counts  # type: ignore[arg-type]


@pytest.mark.parametrize("average", ["token", "sample", "square"])
def test_the_loss_equals_a_slow_twin(tiny_base: str, average: Any):
    module, batch = make(tiny_base, average=average), four()
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        divergences, losses, counts = by_hand(module, batch)
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[average]
    weights = [count**power for count in counts]
    reconstruction = sum(w * one for w, one in zip(weights, losses, strict=True))
    reconstruction /= sum(w * n for w, n in zip(weights, counts, strict=True))
    assert loss.item() == pytest.approx((reconstruction + 0.3 * divergences.mean()).item(), rel=1e-4)
    logged = module.logged
    assert logged["train/loss"] == pytest.approx(loss.item())
    assert logged["train/kl"] == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert logged["train/reconstruction"] == pytest.approx(reconstruction.item(), rel=1e-4)
    assert logged["train/beta"] == pytest.approx(0.3)


def test_figures_of_each_source(tiny_base: str):
    module, batch = make(tiny_base), four()
    with torch.no_grad():
        module.training_step(batch, 0)
        divergences, losses, counts = by_hand(module, batch)
    rows = {"a": [0, 2, 3], "b": [1]}
    for source, mine in rows.items():
        tokens = sum(counts[i] for i in mine)
        assert module.logged[f"train/kl/{source}"] == pytest.approx(divergences[mine].mean().item(), rel=1e-4)
        expected = losses[mine].sum().item() / tokens
        assert module.logged[f"train/reconstruction/{source}"] == pytest.approx(expected, rel=1e-4)
    # A source of which no sample came is left out rather than reported as zero.
    assert not [tag for tag in module.logged if "never" in tag]


def test_figures_are_means_over_the_micro_batches_of_an_optimiser_step(tiny_base: str):
    module = make(tiny_base)
    module.trainer.accumulate_grad_batches = 2
    first = module.training_step(four(), 0).item()
    assert module.logged == {}
    second = module.training_step(four(indices=(20, 21, 22, 20)), 1).item()
    assert first != second and module.logged["train/loss"] == pytest.approx((first + second) / 2)
    module.logged.clear()
    third = module.training_step(four(), 2).item()
    module.training_step(four(), 3)
    assert module.logged["train/loss"] == pytest.approx(third)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_reconstruction_alone_trains_all_but_the_priors_variance(tiny_base: str, share: float):
    module = make(tiny_base, visual_token_share=share)
    module.beta = 0.0
    module.training_step(four(), 0).backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    cut_off = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    assert cut_off == {"guide.bottleneck.prior_log_variance"}


# Random numbers


def noise(module: PGP, batch: Batch, row: int) -> Tensor:
    """Recover a row's epsilon from what the step left behind."""
    module.passes(batch, module._subset(batch), False)
    last = module.last
    assert last is not None
    mean, log_variance, _ = (part[row, last.mask[row]] for part in last.posterior)
    return (last.latents[row, last.mask[row]] - mean) / (0.5 * log_variance).exp()


def test_noise_and_subset_depend_on_seed_record_and_turn_alone(tiny_base: str):
    for share in (1.0, 0.5):
        module, batch = make(tiny_base, visual_token_share=share), four()
        together = [noise(module, batch, row) for row in range(4)]
        kept = [s.kept[r, s.mask[r]].tolist() for r in range(4) for s in [module._subset(batch)] if s is not None]
        for row in range(4):
            alone = cut(batch, row)
            torch.testing.assert_close(noise(module, alone, 0), together[row], rtol=1e-3, atol=1e-3)
            if kept:
                assert module._subset(alone).kept[0].tolist() == kept[row]  # type: ignore[union-attr]
        # Rows 0 and 3 are turns of one record; they share the image and nothing else.
        assert (together[0] - together[3]).abs().max() > 0.5
        other = make(tiny_base, visual_token_share=share, seed=1)
        assert (noise(other, batch, 0) - together[0]).abs().max() > 0.5
        later = four(indices=(90, 91, 92, 90))
        assert (noise(module, later, 0) - together[0]).abs().max() > 0.5
        if kept:
            assert kept[0] != kept[3]
            assert [module._subset(later).kept[r].tolist() for r in (0, 2)] != [kept[0], kept[2]]  # type: ignore[union-attr]


def test_no_two_draws_of_a_step_share_their_random_numbers(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    # A subset that is drawn from its noise's stream would choose tokens by their noise.
    module = make(tiny_base, visual_token_share=0.5)
    real, seeds = module._generator, []

    def noted(*key: Any) -> torch.Generator:
        generator = real(*key)
        seeds.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(module, "_generator", noted)
    module.training_step(four(), 0)
    assert len(seeds) == len(set(seeds)) == 2 * 4  # of noise and of subsets; neighbouring records, and turns of one


def test_noise_is_standard_normal_and_a_token_keeps_its_own_in_a_subset(tiny_base: str):
    module, share, batch = make(tiny_base), make(tiny_base, visual_token_share=0.5), four()
    everything = noise(module, batch, 2)
    assert everything.shape == (20, WIDTH)
    assert abs(everything.mean().item()) < 0.15 and abs(everything.std().item() - 1) < 0.1
    subset = share._subset(batch)
    assert subset is not None
    torch.testing.assert_close(noise(share, batch, 2), everything[subset.kept[2, subset.mask[2]]], rtol=1e-2, atol=1e-2)


def test_a_share_of_the_tokens_takes_part(tiny_base: str):
    module = make(tiny_base, visual_token_share=0.3)
    subset = module._subset(four())
    assert subset is not None
    assert subset.mask.sum(dim=1).tolist() == [4, 1, 6, 4]  # of 12, 4, 20 and 12
    for kept, mask, count in zip(*subset, [12, 4, 20, 12], strict=True):
        row = kept[mask].tolist()
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < count
    module.training_step(four(), 0)
    assert module.last is not None and module.last.visual.shape == module.last.states.shape == (4, 6, WIDTH)
    full = make(tiny_base)
    assert full._subset(four()) is None
    # Validation and the guide's own forward use all tokens whatever the share.
    module._evaluate("val", four())
    assert module.last.divergence.shape == (4, 20)


def test_question_blind_steps(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    blind: list[bool] = []
    for share in (0.0, 0.25, 1.0):
        module = make(tiny_base, question_blind=share)
        real = module.guide.reconstruction_pass
        monkeypatch.setattr(
            module.guide, "reconstruction_pass", lambda *a, real=real: blind.append(a[-1]) or real(*a)
        )  # fmt: skip
        blind.clear()
        with torch.no_grad():
            for step in range(40):
                module.trainer.global_step = step
                module.training_step(cut(four(), 1), step)
        assert abs(sum(blind) / 40 - share) < 0.2 and (share in (0, 1)) == (len(set(blind)) == 1)
        again = list(blind)
        for step in (0, 17, 39):  # depends on the step alone
            blind.clear()
            module.trainer.global_step = step
            module.training_step(four(), 0)
            assert blind == [again[step]]
        module._evaluate("val", four())
        assert blind[-1] is False


# Validation and test


def test_validation_figures(tiny_base: str):
    module, batch = make(tiny_base), four()
    with torch.no_grad():
        scores = module.guide(batch.request)
        relevant = torch.zeros(4, 20, dtype=torch.bool)
        relevant[0, scores[0].argsort(descending=True)[[0, 2, 11]]] = True
        relevant[2, scores[2].argsort(descending=True)[[1, 7]]] = True
        batch.request.relevant = relevant
        module.validation_step(batch, 0)
        module.on_validation_epoch_end()
        module.passes(batch, None, False)
        latents = module.last.latents  # type: ignore[union-attr]
        predicted = module.guide.reconstruction_pass(batch.request, batch.answers, latents)
    # Of 12 and 20 tokens 5 % are 1 and 1, 11 % 1 and 2, 20 % 2 and 4; rows without relevant tokens do not count.
    for percent, expected in ((5, (1 + 0) / 2), (11, (1 + 1 / 2) / 2), (20, (1 / 2 + 1 / 2) / 2)):
        assert module.logged[f"val/recall@{percent}"] == pytest.approx(expected)
    right = [
        all((predicted.logits[predicted.rows == row].argmax(-1) == predicted.targets[predicted.rows == row]).tolist())
        for row in range(4)
    ]
    assert module.logged["val/reconstruction_accuracy"] == sum(right) / 4
    tags = {"val/loss", "val/kl", "val/reconstruction", "val/kl/a", "val/kl/b", "val/reconstruction/a"}
    assert tags <= set(module.logged)


def test_reconstruction_accuracy_counts_whole_answers(tiny_base: str, monkeypatch: pytest.MonkeyPatch):
    module, batch = make(tiny_base), four()
    real = module.guide.reconstruction_pass

    def spoiled(*arguments: Any) -> Any:
        found = real(*arguments)
        logits = torch.nn.functional.one_hot(found.targets, found.logits.shape[1]).float() * 9
        wrong = int((found.rows == 2).nonzero()[1])  # the second token of one answer
        logits[wrong] = logits[wrong].roll(1)
        return found._replace(logits=logits)

    monkeypatch.setattr(module.guide, "reconstruction_pass", spoiled)
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    assert module.logged["val/reconstruction_accuracy"] == 0.75


def test_test_figures_have_controls(tiny_base: str):
    module, batch = make(tiny_base), four()
    batch.request.relevant = torch.zeros(4, 20, dtype=torch.bool)
    batch.request.relevant[:, :2] = True
    asked: list[list[str]] = []
    module.guide.register_forward_pre_hook(lambda _, args: asked.append(args[0].questions))
    with torch.no_grad():
        module.test_step(batch, 0)
        module.on_test_epoch_end()
    for percent in (5, 11, 20):
        for control in ("", "/another_question", "/random"):
            assert 0 <= module.logged[f"test/recall@{percent}{control}"] <= 1
    # The other question is one about another image: rows 0 and 3 share one.
    assert asked == [[QUESTIONS[1], QUESTIONS[2], QUESTIONS[3], QUESTIONS[1]]]
    found = module.predict_step(batch, 0)
    assert torch.equal(found["importance"], module.guide(batch.request)) and found["keys"] == batch.keys


def test_without_known_tokens_there_is_no_recall(tiny_base: str):
    module = make(tiny_base)
    with torch.no_grad():
        module.test_step(four(), 0)
        module.on_test_epoch_end()
    assert "test/kl" in module.logged and not [tag for tag in module.logged if "recall" in tag]


# What is refused


def test_a_loss_that_is_not_finite_names_the_samples(tiny_base: str):
    module = make(tiny_base)
    with torch.no_grad():
        module.guide.bottleneck.prior_mean[3] = math.nan
    words = r"the loss is nan at optimiser step 7 on rank 0 .*samples .*/key-10 \(.* tiles.*/key-11 .*/key-12 .*: "
    with pytest.raises(DataError, match=words):
        module.training_step(four(), 0)


def test_without_annealing_there_is_no_step(tiny_base: str):
    module = make(tiny_base)
    module.beta = None
    with pytest.raises(ConfigError, match=r"nothing sets beta: add BetaAnnealing to trainer\.callbacks"):
        module.training_step(four(), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"visual_token_share": 0.0}, r"model\.visual_token_share must be a share .* got 0\.0"),
        ({"visual_token_share": 1.5}, r"model\.visual_token_share"),
        ({"question_blind": -0.1}, r"model\.question_blind"),
        ({"warmup_fraction": 2}, r"model\.warmup_fraction"),
        ({"final_fraction": math.nan}, r"model\.final_fraction"),
        ({"learning_rate": 0}, r"model\.learning_rate must be positive, got 0"),
        ({"learning_rate": float("nan")}, r"model\.learning_rate must be positive, got nan"),
        ({"weight_decay": float("inf")}, r"model\.weight_decay must be at least 0, got inf"),
        ({"average": "median"}, r"average must be one of token, sample, square, got 'median'"),
    ],
)
def test_options_that_cannot_work(tiny_base: str, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        make(tiny_base, **options).training_step(four(), 0)


def test_data_of_another_tiling_is_refused(tiny_base: str):
    module = make(tiny_base)
    processor = SimpleNamespace(rule="another")
    module.trainer.datamodule = SimpleNamespace(source_names=lambda _: [], reader=SimpleNamespace(processor=processor))
    with pytest.raises(ConfigError, match=r"data\.base and the guide's base must tile alike: another and TileRule"):
        module.setup("fit")
