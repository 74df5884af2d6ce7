"""The Gaussian bottleneck against its closed form, torch.distributions, Monte Carlo and its invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pgp_lightning.bottleneck import (
    GATE_BIAS_LIMIT,
    GATE_INPUT_MAX,
    LOG_VARIANCE_RANGE,
    STATE_LIMIT,
    GaussianBottleneck,
    Posterior,
)
from pgp_lightning.errors import ConfigError
from tests.pairwise import pairwise

WIDTH = 6


def trained_like(seed: int = 0, **options) -> GaussianBottleneck:
    """A bottleneck whose prior has left its initial value."""
    torch.manual_seed(seed)
    bottleneck = GaussianBottleneck(WIDTH, **options)
    with torch.no_grad():
        bottleneck.prior_mean.normal_()
        bottleneck.prior_log_variance.normal_()
    return bottleneck


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def posterior_like_prior(bottleneck: GaussianBottleneck, batch: int, tokens: int) -> Posterior:
    mean = bottleneck.prior_mean.detach().expand(batch, tokens, WIDTH).clone()
    log_variance = bottleneck.prior_log_variance.detach().expand(batch, tokens, WIDTH).clone()
    return Posterior(mean, log_variance, torch.zeros_like(mean))


def set_gate(bottleneck: GaussianBottleneck, value: float) -> None:
    last = bottleneck.gate_head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, value)


def slow_posterior(bottleneck: GaussianBottleneck, v: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 1 and 3 for a two-layer sigmoid bottleneck, one scalar after the other, in float64."""

    def head(network: torch.nn.Sequential, x: list[float]) -> list[float]:
        for layer in (network[0], network[2]):
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            x = [sum(w * a for w, a in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            if layer is network[0]:
                x = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in x]
        return x

    prior_mean = bottleneck.prior_mean.tolist()
    mean, log_variance = [], []
    for x in v.flatten(0, -2).tolist():
        gate = [1 / (1 + math.exp(-a)) for a in head(bottleneck.gate_head, x)]
        mean.append([g * (a - p) + p for g, a, p in zip(gate, x, prior_mean, strict=True)])
        log_variance.append(head(bottleneck.log_variance_head, x))
    return torch.tensor(mean).view_as(v), torch.tensor(log_variance).view_as(v)


def slow_divergence(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    """Eq. 2 as it is printed, one channel after the other, in float64."""
    prior = list(zip(bottleneck.prior_mean.tolist(), bottleneck.prior_log_variance.tolist(), strict=True))
    tokens = []
    for mean, log_variance in zip(
        posterior.mean.flatten(0, -2).tolist(), posterior.log_variance.flatten(0, -2).tolist(), strict=True
    ):
        total = 0.0
        for m, s, (p, r) in zip(mean, log_variance, prior, strict=True):
            variance, prior_variance = math.exp(s), math.exp(r)
            total += 0.5 * (math.log(prior_variance / variance) + (variance + (m - p) ** 2) / prior_variance - 1)
        tokens.append(total / WIDTH)
    return torch.tensor(tokens).view(posterior.mean.shape[:-1])


def test_posterior_equals_the_slow_twin():
    bottleneck, v = trained_like(), states(2, 5)
    posterior = bottleneck(v)
    mean, log_variance = slow_posterior(bottleneck, v)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.log_variance, log_variance, rtol=1e-5, atol=1e-6)


def test_divergence_equals_the_printed_formula():
    bottleneck = trained_like()
    posterior = bottleneck(states(3, 4))
    torch.testing.assert_close(bottleneck.divergence(posterior), slow_divergence(bottleneck, posterior))


def test_divergence_equals_torch_distributions():
    bottleneck = trained_like()
    posterior = bottleneck(states(3, 4))
    prior = Normal(bottleneck.prior_mean, (0.5 * bottleneck.prior_log_variance).exp())
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), prior).mean(dim=-1)
    torch.testing.assert_close(bottleneck.divergence(posterior), expected)


@torch.no_grad()
def test_divergence_equals_a_monte_carlo_estimate_over_samples():
    """Uses sample() itself, so it also checks that Z is drawn from the posterior the divergence is about."""
    bottleneck = trained_like()
    posterior = bottleneck(states(1, 2))
    many = Posterior(*(part.expand(40_000, 2, WIDTH) for part in posterior))
    z = bottleneck.sample(many, torch.randn(many.mean.shape, generator=torch.Generator().manual_seed(2)))
    prior = Normal(bottleneck.prior_mean, (0.5 * bottleneck.prior_log_variance).exp())
    log_ratio = Normal(many.mean, (0.5 * many.log_variance).exp()).log_prob(z) - prior.log_prob(z)
    draws = log_ratio.mean(dim=-1)
    error = 5 * draws.std(dim=0) / math.sqrt(len(draws))  # five standard errors
    assert ((draws.mean(dim=0) - bottleneck.divergence(posterior)[0]).abs() < error).all()
    assert (error < 0.05).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 30.0]))
def test_divergence_is_never_negative(seed: int, scale: float):
    bottleneck = trained_like(seed=0)
    generator = torch.Generator().manual_seed(seed)
    base = posterior_like_prior(bottleneck, 2, 7)
    nudged = Posterior(*(part + scale * torch.randn(part.shape, generator=generator) for part in base))
    assert (bottleneck.divergence(nudged) >= 0).all()


def test_divergence_vanishes_exactly_where_the_posterior_is_the_prior():
    bottleneck = trained_like()
    same = posterior_like_prior(bottleneck, 2, 3)
    assert torch.equal(bottleneck.divergence(same), torch.zeros(2, 3))
    for part in ("mean", "log_variance"):
        for nudge in (1e-2, -1e-2):
            moved = getattr(same, part).clone()
            moved[1, 2, 4] += nudge  # one channel of one token
            divergence = bottleneck.divergence(same._replace(**{part: moved}))
            assert divergence[1, 2] > 0
            assert divergence.count_nonzero() == 1


def test_divergence_is_a_mean_over_channels():
    bottleneck = GaussianBottleneck(WIDTH)
    posterior = Posterior(torch.full((1, 1, WIDTH), 2.0), torch.zeros(1, 1, WIDTH), torch.ones(1, 1, WIDTH))
    assert bottleneck.divergence(posterior).item() == 2.0  # (2^2) / 2, whatever the width


def test_initial_values_of_gate_variance_prior_and_divergence():
    bottleneck = GaussianBottleneck(WIDTH)
    for head, bias in ((bottleneck.gate_head, 0.0), (bottleneck.log_variance_head, -2.0)):
        assert torch.equal(head[-1].bias, torch.full((WIDTH,), bias))
    for parameter in (bottleneck.prior_mean, bottleneck.prior_log_variance):
        assert parameter.requires_grad
        assert not parameter.any()
    other = GaussianBottleneck(WIDTH, gate_bias=1.5, log_variance_bias=-1.0, learned_prior=False)
    assert torch.equal(other.gate_head[-1].bias, torch.full((WIDTH,), 1.5))
    assert torch.equal(other.log_variance_head[-1].bias, torch.full((WIDTH,), -1.0))
    assert not other.prior_mean.requires_grad
    assert not other.prior_log_variance.requires_grad


@pytest.mark.parametrize(("gate", "value", "start"), [("sigmoid", 0.0, 0.5), ("exp", 0.0, 1.0), ("exp", -0.7, 0.4966)])
def test_the_bias_sets_the_gate(gate: str, value: float, start: float):
    bottleneck = trained_like(gate=gate)
    set_gate(bottleneck, value)
    torch.testing.assert_close(bottleneck(states(2, 3)).gate, torch.full((2, 3, WIDTH), start), rtol=0, atol=1e-4)


@pytest.mark.parametrize("gate", ["sigmoid", "exp"])
def test_closed_gate_gives_the_prior_mean(gate: str):
    bottleneck = trained_like(gate=gate)
    set_gate(bottleneck, -200.0)
    posterior = bottleneck(states(2, 3))
    assert torch.equal(posterior.mean, bottleneck.prior_mean.expand(2, 3, WIDTH))


@pytest.mark.parametrize(("gate", "value"), [("sigmoid", 200.0), ("exp", 0.0)])
def test_open_gate_gives_the_state(gate: str, value: float):
    bottleneck, v = trained_like(gate=gate), states(2, 3)
    set_gate(bottleneck, value)
    torch.testing.assert_close(bottleneck(v).mean, v, rtol=0, atol=1e-6)


def test_open_gate_without_spread_passes_the_state_on():
    bottleneck, v = trained_like(), states(2, 3)
    set_gate(bottleneck, 200.0)
    torch.nn.init.constant_(bottleneck.log_variance_head[-1].bias, -1e4)
    z = bottleneck.sample(bottleneck(v), torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(z, v, rtol=0, atol=5 * math.exp(0.5 * LOG_VARIANCE_RANGE[0]))


def test_sample_is_mean_plus_scaled_noise_and_reproducible():
    bottleneck = trained_like()
    posterior = bottleneck(states(2, 3))
    noise = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(4))
    z = bottleneck.sample(posterior, noise)
    torch.testing.assert_close(z, posterior.mean + posterior.log_variance.exp().sqrt() * noise)
    assert torch.equal(z, bottleneck.sample(posterior, noise.clone()))
    assert torch.equal(bottleneck.sample(posterior, torch.zeros_like(noise)), posterior.mean)
    for dtype in (torch.bfloat16, torch.float64):
        assert bottleneck.sample(posterior, noise.to(dtype)).dtype == torch.float32


def test_a_token_does_not_see_its_neighbours():
    bottleneck, v = trained_like(), states(3, 5)
    together = bottleneck.divergence(bottleneck(v))
    apart = bottleneck.divergence(bottleneck(v[1:2, 2:4]))
    torch.testing.assert_close(apart, together[1:2, 2:4], rtol=1e-5, atol=1e-6)


@pairwise(
    gate=["sigmoid", "exp"],
    head_layers=[1, 2],
    magnitude=[0.0, 1e-38, 1.0, 1e4, 1e20, torch.finfo(torch.float32).max],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_everything_stays_finite(gate: str, head_layers: int, magnitude: float, dtype: torch.dtype):
    bottleneck = trained_like(gate=gate, head_layers=head_layers)
    limit = torch.finfo(dtype).max
    v = (states(2, 4).sign() * magnitude).clamp(-limit, limit).to(dtype).requires_grad_()
    posterior = bottleneck(v)
    z = bottleneck.sample(posterior, states(2, 4, seed=5))
    divergence = bottleneck.divergence(posterior)
    for part in (*posterior, z, divergence):
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    (divergence.mean() + z.mean()).backward()
    for parameter in bottleneck.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert v.grad is not None
    # Autograd hands a float16 state a float16 gradient; there alone a true value may exceed the dtype.
    assert not v.grad.isnan().any()
    assert v.grad.isfinite().all() or dtype == torch.float16


@pytest.mark.parametrize("value", [-1e6, 1e6])
def test_divergence_stays_finite_with_a_runaway_prior(value: float):
    bottleneck = GaussianBottleneck(WIDTH)
    torch.nn.init.constant_(bottleneck.prior_log_variance, value)
    torch.nn.init.constant_(bottleneck.prior_mean, value)
    assert bottleneck.divergence(bottleneck(states(1, 2) * STATE_LIMIT)).isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_state_that_is_not_finite_stays_visible(bad: float):
    bottleneck, v = trained_like(), states(1, 2)
    v[0, 1, 3] = bad
    divergence = bottleneck.divergence(bottleneck(v))
    assert divergence[0, 0].isfinite()
    assert not divergence[0, 1].isfinite()


def test_float16_states_pass_unclamped():
    assert torch.finfo(torch.float16).max == STATE_LIMIT


def test_half_states_and_autocast_give_float32_results():
    bottleneck, v = trained_like(), states(2, 4).bfloat16()
    expected = bottleneck(v.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = bottleneck(v)
        divergence = bottleneck.divergence(posterior)
        z = bottleneck.sample(posterior, states(2, 4, seed=5))
    for part, reference in zip(posterior, expected, strict=True):
        assert torch.equal(part, reference)
    assert torch.equal(divergence, bottleneck.divergence(expected))
    assert torch.equal(z, bottleneck.sample(expected, states(2, 4, seed=5)))


def test_half_weights_are_computed_with_in_float32():
    """Strategies that keep weights in bfloat16 convert this module too."""
    half = trained_like().bfloat16()
    full = trained_like()
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    v = states(2, 4)
    for part, reference in zip(half(v), full(v), strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, reference)
    assert torch.equal(half.divergence(half(v)), full.divergence(full(v)))


def test_a_fixed_prior_gets_no_gradient():
    bottleneck = GaussianBottleneck(WIDTH, learned_prior=False)
    bottleneck.divergence(bottleneck(states(2, 3))).mean().backward()
    assert bottleneck.prior_mean.grad is None
    assert bottleneck.prior_log_variance.grad is None
    trained = {name for name, parameter in bottleneck.named_parameters() if parameter.grad is not None}
    assert trained == {f"{head}.{i}.{part}" for head in ("gate_head", "log_variance_head") for i in (0, 2)
                       for part in ("weight", "bias")}  # fmt: skip


def test_wrong_shapes_and_options_are_refused():
    bottleneck = GaussianBottleneck(WIDTH)
    with pytest.raises(ValueError, match="width 6"):
        bottleneck(torch.zeros(1, 2, WIDTH + 1))
    with pytest.raises(ValueError, match="posterior's shape"):
        bottleneck.sample(bottleneck(states(1, 2)), torch.zeros(1, 1, WIDTH))
    with pytest.raises(ConfigError, match="gate must be one of sigmoid, exp"):
        GaussianBottleneck(WIDTH, gate="tanh")
    with pytest.raises(ConfigError, match="head_layers must be 1 or 2"):
        GaussianBottleneck(WIDTH, head_layers=3)
    with pytest.raises(ConfigError, match="width must be at least 1"):
        GaussianBottleneck(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_bias": 17.0}, r"gate_bias must lie between -16\.6 and 16\.6, .* got 17\.0"),
        ({"gate_bias": -17.0}, "gate_bias must lie between"),
        ({"gate": "exp", "gate_bias": 20.0}, r"gate_bias must lie between -16\.6 and 8\.0, .* got 20\.0"),
        ({"gate_bias": math.nan}, "gate_bias .* got nan"),
        ({"gate": "exp", "gate_bias": -math.inf}, "gate_bias .* got -inf"),
        ({"log_variance_bias": -20.0}, r"log_variance_bias must lie between -12\.0 and 6\.0, .* got -20\.0"),
        ({"log_variance_bias": 6.5}, r"log_variance_bias .* got 6\.5"),
        ({"log_variance_bias": math.nan}, "log_variance_bias .* got nan"),
    ],
)
def test_a_bias_without_a_gradient_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        GaussianBottleneck(WIDTH, **options)


@pytest.mark.parametrize(
    ("gate", "low", "high", "head"),
    [
        ("sigmoid", -GATE_BIAS_LIMIT, GATE_BIAS_LIMIT, "gate_head"),
        ("exp", -GATE_BIAS_LIMIT, GATE_INPUT_MAX, "gate_head"),
        ("sigmoid", *LOG_VARIANCE_RANGE, "log_variance_head"),
    ],
)
def test_the_permitted_range_ends_where_the_gradient_does(gate: str, low: float, high: float, head: str):
    def gradient(bias: float) -> float:
        """Return the greatest gradient of a head's bias, were all its weights 0."""
        bottleneck = GaussianBottleneck(WIDTH, gate=gate, head_layers=1)
        last = getattr(bottleneck, head)[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, bias)
        posterior = bottleneck(states(2, 3))
        (posterior.gate if head == "gate_head" else posterior.log_variance).sum().backward()
        return float(last.bias.grad.abs().max())

    assert gradient(low + 0.01) > 0 and gradient(high - 0.01) > 0
    assert gradient(high + 0.01) == 0
    name = "gate_bias" if head == "gate_head" else "log_variance_bias"
    GaussianBottleneck(WIDTH, gate=gate, **{name: low + 0.01})
    GaussianBottleneck(WIDTH, gate=gate, **{name: high - 0.01})
    for outside in (low - 0.01, high + 0.01):
        with pytest.raises(ConfigError):
            GaussianBottleneck(WIDTH, gate=gate, **{name: outside})
