"""The posterior guide's two passes against transformers' own forward, and every invariant of the method."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgp_lightning.guides.posterior import PosteriorGuide, Subset
from pgp_lightning.objective import divergence_loss, reconstruction_loss
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.request import Request
from tests.tiny import ANSWERS, GRIDS, QUESTIONS, WIDTH, row_of, tiny_request
from tests.unit.guides.made import CLOSE, both_passes, make, some, watched


def full_ids(guide: PosteriorGuide, request: Request, row: int, answer: str | None, order: Any) -> tuple[Any, ...]:
    """Return a row's whole prompt as transformers wants it, where its visual tokens lie, and its labels."""
    processor = guide.vlm.processor
    prompt = processor.prompt(request.questions[row], answer, order, request.systems[row])
    context = processor.encode("<IMG_CONTEXT>") * request.counts[row]
    ids = torch.tensor([[*prompt.before, *context, *prompt.after, *prompt.answer]])
    labels = torch.full_like(ids, -100)
    if prompt.answer:
        labels[0, -len(prompt.answer) :] = torch.tensor(prompt.answer)
    return ids, slice(len(prompt.before), len(prompt.before) + len(context)), labels


def in_the_family_model(guide: PosteriorGuide, request: Request, row: int, answer: str | None, order: Any) -> Any:
    """Run transformers' own forward on a row; return its output and the row's visual slots."""
    ids, visual, labels = full_ids(guide, request, row, answer, order)
    tiles = row_of(request, row).tiles
    pixels = InternVL.normalise(tiles)
    mask = torch.ones_like(ids)
    labels = None if answer is None else labels
    with torch.no_grad():
        out = guide.vlm.model(
            input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels, output_hidden_states=True
        )
    return out, visual


# Against transformers' own forward


@pytest.mark.parametrize("order", ["question_first", "image_first"])
def test_states_are_the_model_s_last_hidden_states_at_the_visual_slots(
    guide: PosteriorGuide, native: PosteriorGuide, request_: Request, order: str
):
    mine = guide if order == "question_first" else native
    with torch.no_grad():
        found = mine.bottleneck_pass(request_, mine.visual_tokens(request_))
    assert found.mask.sum(dim=1).tolist() == request_.counts
    for row in range(len(request_)):
        # The original sees the rest of the prompt and an answer too; what comes later cannot matter.
        out, visual = in_the_family_model(mine, request_, row, ANSWERS[row], order)
        torch.testing.assert_close(found.states[row, found.mask[row]], out.hidden_states[-1][0, visual], **CLOSE)


def test_system_texts_are_part_of_both_passes(native: PosteriorGuide, request_: Request):
    asked = replace(request_, systems=["what is it", None, "", "red"])
    with torch.no_grad():
        found = native.bottleneck_pass(asked, visual := native.visual_tokens(asked))
        plain = native.bottleneck_pass(request_, visual)
        predicted = native.reconstruction_pass(asked, list(ANSWERS), visual)
    for row, system in enumerate(asked.systems):
        out, slots = in_the_family_model(native, asked, row, ANSWERS[row], "image_first")
        torch.testing.assert_close(found.states[row, found.mask[row]], out.hidden_states[-1][0, slots], **CLOSE)
        answer = predicted.rows == row
        torch.testing.assert_close(predicted.logits[answer], out.logits[0, -int(answer.sum()) - 1 : -1], **CLOSE)
        same = torch.equal(found.states[row], plain.states[row])
        assert same == (system is None or not (system or native.vlm.processor.template.system))


@pytest.mark.parametrize("which", ["guide", "native", "mixed"])
def test_logits_and_loss_are_the_model_s_own(request: pytest.FixtureRequest, request_: Request, which: str):
    mine: PosteriorGuide = request.getfixturevalue(which)
    order = mine.arguments["reconstruction_order"]
    with torch.no_grad():
        predicted = mine.reconstruction_pass(request_, list(ANSWERS), mine.visual_tokens(request_))
    assert predicted.logits.dtype == torch.float32
    losses = []
    for row in range(len(request_)):
        out, _ = in_the_family_model(mine, request_, row, ANSWERS[row], order)
        own = predicted.rows == row
        count = int(own.sum())
        torch.testing.assert_close(predicted.logits[own], out.logits[0, -count - 1 : -1], **CLOSE)
        losses.append((out.loss.item(), count))
        loss = reconstruction_loss(predicted.logits[own], predicted.targets[own], predicted.rows[own], "token")
        assert loss.item() == pytest.approx(out.loss.item(), rel=1e-4)
    total = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert reconstruction_loss(*predicted, "token").item() == pytest.approx(total, rel=1e-4)
    mean = sum(loss for loss, _ in losses) / len(losses)
    assert reconstruction_loss(*predicted, "sample").item() == pytest.approx(mean, rel=1e-4)


def brute_force(guide: PosteriorGuide, request: Request, row: int, kept: Tensor, visual: Tensor, answer: str) -> Tensor:
    """Run a whole row with a 4-D mask that hides what is not kept: hidden states (N, d) of all slots."""
    ids, slots, _ = full_ids(guide, request, row, answer, "question_first")
    embeddings = guide.vlm.model.get_input_embeddings()(ids).clone()
    embeddings[0, slots] = visual
    length = ids.shape[1]
    there = torch.ones(length, dtype=torch.bool)
    there[slots] = False
    there[slots.start + kept] = True
    allowed = torch.ones(length, length).tril().bool() & there[None, :] | torch.eye(length, dtype=torch.bool)
    bias = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden: Tensor = guide.vlm.decoder(
        inputs_embeds=embeddings, attention_mask=bias[None, None], position_ids=torch.arange(length)[None]
    ).last_hidden_state[0]
    return hidden


def test_a_subset_equals_masking_the_rest_of_the_whole_sequence(guide: PosteriorGuide, request_: Request):
    # transformers takes gaps in positions for borders of packed sequences; the passes must not fall into that trap.
    subset = some(request_)
    with torch.no_grad():
        visual = guide.visual_tokens(request_)
        found = guide.bottleneck_pass(request_, visual, subset)
        latents = torch.randn(len(request_), subset.kept.shape[1], WIDTH)
        predicted = guide.reconstruction_pass(request_, list(ANSWERS), latents, subset)
        for row, count in enumerate(request_.counts):
            kept = subset.kept[row, subset.mask[row]]
            own = predicted.rows == row
            _, slots, _ = full_ids(guide, request_, row, ANSWERS[row], "question_first")
            hidden = brute_force(guide, request_, row, kept, visual[row, :count], ANSWERS[row])
            torch.testing.assert_close(found.states[row, subset.mask[row]], hidden[slots][kept], **CLOSE)
            everything = torch.zeros(count, WIDTH)
            everything[kept] = latents[row, subset.mask[row]]
            hidden = brute_force(guide, request_, row, kept, everything, ANSWERS[row])
            logits = guide.vlm.model.lm_head(hidden)[-int(own.sum()) - 1 : -1]
            torch.testing.assert_close(predicted.logits[own], logits, **CLOSE)


def test_without_a_mask_the_trap_springs(guide: PosteriorGuide, monkeypatch: pytest.MonkeyPatch):
    # The proof that the test above can fail: one row, so that no padding needs the mask.
    request = tiny_request(QUESTIONS[:1], GRIDS[:1])
    subset = Subset(torch.tensor([[0, 3, 4, 9]]), torch.ones(1, 4, dtype=torch.bool))
    with torch.no_grad():
        visual = guide.visual_tokens(request)
        right = guide.bottleneck_pass(request, visual, subset).states
        decoder, given = type(guide.vlm.decoder), type(guide.vlm.decoder).forward
        monkeypatch.setattr(decoder, "forward", lambda self, **k: given(self, **{**k, "attention_mask": None}))
        wrong = guide.bottleneck_pass(request, visual, subset).states
        whole = guide.bottleneck_pass(request, visual).states
    assert (wrong - right).abs().max() > 0.1
    monkeypatch.undo()
    torch.testing.assert_close(whole, guide.bottleneck_pass(request, visual).states, **CLOSE)  # without gaps none


# The method's invariants


@pytest.mark.parametrize("share", ["all", "subset"])
def test_gradients_reach_adapter_and_bottleneck_and_nothing_else(tiny_base: str, request_: Request, share: str):
    guide = make(tiny_base).train()
    frozen = {name: p.detach().clone() for name, p in guide.named_parameters() if not p.requires_grad}
    frozen |= {name: b.detach().clone() for name, b in guide.named_buffers()}
    trained = {name: p for name, p in guide.named_parameters() if p.requires_grad}
    kinds = {re.search(r"lora_[AB]|gate_head|log_variance_head|prior_mean|prior_log_variance", n)[0] for n in trained}  # type: ignore[index]
    assert kinds == {"lora_A", "lora_B", "gate_head", "log_variance_head", "prior_mean", "prior_log_variance"}
    assert set(trained) == set(guide.trainable())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    before = {name: p.detach().clone() for name, p in trained.items()}
    subset = some(request_) if share == "subset" else None
    found = guide.bottleneck_pass(request_, guide.visual_tokens(request_), subset)
    latents = guide.bottleneck.sample(found.posterior, torch.randn_like(found.states))
    predicted = guide.reconstruction_pass(request_, list(ANSWERS), latents, subset)
    loss = reconstruction_loss(*predicted, "token") + 0.5 * divergence_loss(found.divergence, found.mask)
    loss.backward()
    for name, parameter in guide.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    after = dict(guide.named_parameters()) | dict(guide.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_each_term_alone_reaches_all_that_it_depends_on(tiny_base: str, request_: Request):
    for term in ("seeing", "blind", "divergence"):
        guide = make(tiny_base)
        found = guide.bottleneck_pass(request_, guide.visual_tokens(request_))
        if term == "divergence":
            divergence_loss(found.divergence, found.mask).backward()
        else:
            latents = guide.bottleneck.sample(found.posterior, torch.randn_like(found.states))
            predicted = guide.reconstruction_pass(request_, list(ANSWERS), latents, blind=term == "blind")
            reconstruction_loss(*predicted, "token").backward()
        trained = {name: p for name, p in guide.named_parameters() if p.requires_grad}
        cut_off = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
        # The prior's variance is in the divergence alone.
        assert cut_off == (set() if term == "divergence" else {"bottleneck.prior_log_variance"}), term


def test_the_question_changes_the_scores_only_if_it_comes_first(guide: PosteriorGuide, native: PosteriorGuide):
    scores: dict[str, list[Tensor]] = {"question": [], "image": []}
    for question in ("read the blue sign", "read the red sign", "is there a white cross"):
        request = tiny_request((question,), GRIDS[2:])
        scores["question"].append(guide(request)[0])
        scores["image"].append(native(request)[0])
    for other in (1, 2):
        assert (scores["question"][other] - scores["question"][0]).abs().max() > 1e-3
        assert torch.equal(scores["image"][other], scores["image"][0])


def test_neighbours_and_padding_do_not_change_a_sample(guide: PosteriorGuide, request_: Request):
    together = guide(request_)
    assert together.shape == (4, 20) and together.dtype == torch.float32
    for row, count in enumerate(request_.counts):
        assert (together[row, count:] == -torch.inf).all() and together[row, :count].isfinite().all()
        alone = guide(row_of(request_, row))
        assert alone.shape == (1, count)
        torch.testing.assert_close(together[row, :count], alone[0], **CLOSE)
    turned = tiny_request(QUESTIONS[2:] + QUESTIONS[:2], images=(2, 0, 0, 1))
    torch.testing.assert_close(guide(turned), together[[2, 3, 0, 1]], **CLOSE)


def test_scores_are_not_negative_and_differ_between_tokens(guide: PosteriorGuide, request_: Request):
    scores = guide(request_)
    assert (scores[scores.isfinite()] >= 0).all()
    assert all(len(row[row.isfinite()].unique()) == count for row, count in zip(scores, request_.counts, strict=True))


def test_scores_do_not_drop_out(tiny_base: str, request_: Request):
    # A guide comes in training mode, and stays in it.
    guide = PosteriorGuide(base=tiny_base, lora_rank=4, lora_dropout=0.9)
    for name, parameter in guide.named_parameters():
        if "lora_B" in name:  # starts at 0, where dropout has nothing to drop
            torch.nn.init.normal_(parameter)
    first = guide(request_)
    assert torch.equal(guide(request_), first) and guide.training and guide.model.training
    assert torch.equal(guide.eval()(request_), first)


def test_forward_is_the_training_pass(guide: PosteriorGuide, request_: Request):
    scores = guide(request_)
    assert not scores.requires_grad
    found, _ = both_passes(guide, request_)
    assert found.divergence.requires_grad
    assert torch.equal(scores[found.mask], found.divergence[found.mask])
    mean, log_variance, gate = found.posterior
    prior_mean, prior = guide.bottleneck.prior_mean, guide.bottleneck.prior_log_variance
    torch.testing.assert_close(mean, gate * (found.states - prior_mean) + prior_mean)
    terms = prior - log_variance + (log_variance.exp() + (mean - prior_mean) ** 2) / prior.exp() - 1
    torch.testing.assert_close(found.divergence, 0.5 * terms.mean(dim=-1), **CLOSE)


def test_with_gate_open_and_no_variance_the_second_pass_sees_the_states(tiny_base: str, request_: Request):
    guide = make(tiny_base, lora_rank=0)
    with torch.no_grad():
        guide.bottleneck.prior_mean.zero_()
        for head, bias in ((guide.bottleneck.gate_head, 100.0), (guide.bottleneck.log_variance_head, -100.0)):
            head[-1].weight.zero_()
            head[-1].bias.fill_(bias)
        found = guide.bottleneck_pass(request_, guide.visual_tokens(request_))
        assert torch.equal(found.posterior.mean, found.states)
        latents = guide.bottleneck.sample(found.posterior, torch.randn_like(found.states))
        with watched(guide.vlm.decoder, lambda k: (k["inputs_embeds"], k["position_ids"])) as seen:
            guide.reconstruction_pass(request_, list(ANSWERS), latents)
    ((embeddings, _),) = seen
    for row, count in enumerate(request_.counts):
        _, slots, _ = full_ids(guide, request_, row, ANSWERS[row], "question_first")
        torch.testing.assert_close(embeddings[row, slots], found.states[row, :count], rtol=0, atol=0.02)


def test_blind_reconstruction_does_not_depend_on_the_question(guide: PosteriorGuide):
    images, latents = GRIDS[:2], torch.randn(2, 12, WIDTH)
    one = guide.reconstruction_pass(tiny_request(QUESTIONS[:2], images), ["red", "2"], latents, blind=True)
    other = guide.reconstruction_pass(tiny_request(QUESTIONS[2:], images), ["red", "2"], latents, blind=True)
    seeing = guide.reconstruction_pass(tiny_request(QUESTIONS[2:], images), ["red", "2"], latents)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.targets, other.targets)
    assert (seeing.logits - other.logits).abs().max() > 1e-2
    changed = guide.reconstruction_pass(tiny_request(QUESTIONS[:2], images), ["red", "2"], latents + 1, blind=True)
    assert (changed.logits - one.logits).abs().max() > 1e-2
