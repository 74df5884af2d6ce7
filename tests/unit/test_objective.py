"""The objective's terms against slow twins, and the schedule at its corners."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.objective import beta, divergence_loss, objective, reconstruction_loss

ROWS = [2, 0, 0, 2, 5, 2, 2]  # samples 1, 3 and 4 have no supervised token


def predictions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(ROWS), 11, generator=generator)
    return logits, torch.randint(11, (len(ROWS),), generator=generator), torch.tensor(ROWS)


def slow_reconstruction_loss(logits: Tensor, targets: Tensor, rows: Tensor, average: str) -> float:
    """Written from each average's definition, without a common formula."""
    samples: dict[int, list[float]] = {}
    for scores, target, row in zip(logits.tolist(), targets.tolist(), rows.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(score) for score in scores))
        samples.setdefault(row, []).append(log_sum - scores[target])
    if average == "token":
        losses = [loss for sample in samples.values() for loss in sample]
        return sum(losses) / len(losses)
    if average == "sample":
        return sum(sum(sample) / len(sample) for sample in samples.values()) / len(samples)
    # n tokens of weight 1/sqrt(n): a sample weighs sqrt(n).
    total = sum(sum(sample) / math.sqrt(len(sample)) for sample in samples.values())
    return total / sum(math.sqrt(len(sample)) for sample in samples.values())


@pytest.mark.parametrize("average", ["token", "sample", "square"])
def test_reconstruction_loss_equals_the_slow_twin(average: str):
    logits, targets, rows = predictions()
    loss = reconstruction_loss(logits, targets, rows, average)
    assert loss.item() == pytest.approx(slow_reconstruction_loss(logits, targets, rows, average), rel=1e-5)


def test_the_averages_differ_and_agree_on_equal_lengths():
    logits, targets, rows = predictions()
    losses = {a: reconstruction_loss(logits, targets, rows, a).item() for a in ("token", "sample", "square")}
    assert len({round(loss, 3) for loss in losses.values()}) == 3
    even = torch.tensor([0, 1, 2, 0, 1, 2])
    for average in ("sample", "square"):
        equal = reconstruction_loss(logits[:6], targets[:6], even, average)
        torch.testing.assert_close(equal, reconstruction_loss(logits[:6], targets[:6], even, "token"))


@pytest.mark.parametrize("average", ["token", "sample", "square"])
def test_reconstruction_loss_ignores_order_and_row_names(average: str):
    logits, targets, rows = predictions()
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(1))
    shuffled = reconstruction_loss(logits[order], targets[order], rows[order] + 40, average)
    torch.testing.assert_close(shuffled, reconstruction_loss(logits, targets, rows, average))


@pytest.mark.parametrize("average", ["token", "sample", "square"])
def test_half_precision_logits_are_averaged_in_float32(average: str):
    logits, targets, rows = predictions()
    loss = reconstruction_loss(logits.bfloat16(), targets, rows, average)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, reconstruction_loss(logits.bfloat16().float(), targets, rows, average))


def test_reconstruction_loss_passes_gradients_by_weight():
    logits, targets, rows = predictions()
    logits.requires_grad_()
    reconstruction_loss(logits, targets, rows, "sample").backward()
    assert logits.grad is not None
    share = logits.grad[range(len(ROWS)), targets].abs() / (
        1 - logits.detach().softmax(dim=1)[range(len(ROWS)), targets]
    )
    torch.testing.assert_close(share, torch.tensor([1 / 12, 1 / 6, 1 / 6, 1 / 12, 1 / 3, 1 / 12, 1 / 12]))


def test_reconstruction_loss_refuses_what_it_cannot_average():
    logits, targets, rows = predictions()
    with pytest.raises(ConfigError, match="token, sample, square"):
        reconstruction_loss(logits, targets, rows, "mean")
    with pytest.raises(ValueError, match="at least one supervised token"):
        reconstruction_loss(logits[:0], targets[:0], rows[:0], "token")
    with pytest.raises(ValueError, match=r"rows \(S,\)"):
        reconstruction_loss(logits, targets, rows[:-1], "token")


def slow_divergence_loss(divergence: Tensor, mask: Tensor) -> float:
    means = []
    for values, chosen in zip(divergence.tolist(), mask.tolist(), strict=True):
        own = [value for value, keep in zip(values, chosen, strict=True) if keep]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)


def test_divergence_loss_equals_the_slow_twin():
    generator = torch.Generator().manual_seed(0)
    divergence = torch.rand(4, 9, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < torch.tensor([[0.2], [0.5], [0.9], [1.1]])
    mask[0, 0] = True
    loss = divergence_loss(divergence, mask)
    assert loss.item() == pytest.approx(slow_divergence_loss(divergence, mask), rel=1e-6)


def test_divergence_loss_ignores_padding_even_if_it_is_not_a_number():
    divergence = torch.tensor([[1.0, 3.0, math.nan], [4.0, math.inf, math.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert divergence_loss(divergence, mask).item() == 3.0  # the mean of 2 and 4, not of the three tokens


def test_divergence_loss_gives_every_sample_the_same_share_of_the_gradient():
    divergence = torch.ones(2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    divergence_loss(divergence, mask).backward()
    assert torch.equal(divergence.grad, torch.tensor([[0.125] * 4, [0.5, 0.0, 0.0, 0.0]]))


def test_divergence_loss_refuses_empty_rows_and_wrong_masks():
    divergence = torch.ones(2, 3)
    with pytest.raises(ValueError, match="a visual token in every sample"):
        divergence_loss(divergence, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="bool mask"):
        divergence_loss(divergence, torch.ones(2, 3))
    with pytest.raises(ValueError, match="bool mask"):
        divergence_loss(divergence, torch.ones(2, 2, dtype=torch.bool))


def test_objective_weighs_the_divergence_and_keeps_both_gradients():
    reconstruction, divergence = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    loss = objective(reconstruction, divergence, 0.25)
    loss.backward()
    assert loss.item() == 2.75
    assert reconstruction.grad.item() == 1.0
    assert divergence.grad.item() == 0.25


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.5), (0.5, 0.2), (0.3, 0.3)])
def test_beta_is_linear_then_constant(start: float, end: float):
    assert beta(0, start, end, 10) == start
    assert beta(5, start, end, 10) == pytest.approx((start + end) / 2)
    assert beta(10, start, end, 10) == end  # exactly
    assert beta(10_000, start, end, 10) == end
    assert beta(0, start, end, 0) == end


@given(st.integers(0, 500), st.integers(1, 300), st.floats(0, 2), st.floats(0, 2))
def test_beta_equals_a_walk_of_equal_steps(step: int, warmup_steps: int, start: float, end: float):
    value = start
    for _ in range(min(step, warmup_steps)):
        value += (end - start) / warmup_steps
    assert beta(step, start, end, warmup_steps) == pytest.approx(value, abs=1e-9)


def test_falling_beta_is_the_papers_formula():
    top, bottom, gamma = 0.5, 0.2, 70
    for step in range(0, 100, 7):
        printed = top - (top - bottom) * min(1, step / gamma)
        assert beta(step, top, bottom, gamma) == pytest.approx(printed)


@pytest.mark.parametrize(("step", "warmup_steps"), [(-1, 5), (0, -1)])
def test_beta_refuses_negative_steps(step: int, warmup_steps: int):
    with pytest.raises(ValueError, match="must not be negative"):
        beta(step, 0.2, 0.5, warmup_steps)
