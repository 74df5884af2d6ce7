"""The bottleneck's gradients against finite differences in float64: of what it returns, and of each loss term alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pgp_lightning.bottleneck import GaussianBottleneck, Posterior
from pgp_lightning.objective import divergence_loss, reconstruction_loss

WIDTH, WORDS = 3, 5
MASK = torch.tensor([[True, True], [True, False]])
OPTIONS = [{"gate": gate, "head_layers": layers} for gate in ("sigmoid", "exp") for layers in (1, 2)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOISE = draw(2, 2, WIDTH, seed=2)
READOUT = draw(WIDTH, WORDS, seed=3)


def mean(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    return posterior.mean


def log_variance(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    return posterior.log_variance


def latents(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    return bottleneck.sample(posterior, NOISE)


def divergence(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    return bottleneck.divergence(posterior)


def reconstruction_term(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    """The cross-entropy of words that are read off the sampled latents."""
    logits = latents(bottleneck, posterior)[MASK] @ READOUT
    return reconstruction_loss(logits, torch.tensor([4, 0, 2]), torch.tensor([0, 0, 1]), "sample")


def divergence_term(bottleneck: GaussianBottleneck, posterior: Posterior) -> Tensor:
    return divergence_loss(divergence(bottleneck, posterior), MASK)


HEADS = {"gate_head", "log_variance_head"}
# What each result depends on, by parameter or head; every result depends on the states.
RESULTS: list[tuple[Callable[[GaussianBottleneck, Posterior], Tensor], set[str]]] = [
    (mean, {"gate_head", "prior_mean"}),
    (log_variance, {"log_variance_head"}),
    (latents, {*HEADS, "prior_mean"}),
    (divergence, {*HEADS, "prior_mean", "prior_log_variance"}),
    (reconstruction_term, {*HEADS, "prior_mean"}),
    (divergence_term, {*HEADS, "prior_mean", "prior_log_variance"}),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("result", "sources"), RESULTS, ids=[result.__name__ for result, _ in RESULTS])
def test_gradients_equal_finite_differences(
    result: Callable[[GaussianBottleneck, Posterior], Tensor], sources: set[str], options: dict[str, object]
):
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(WIDTH, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for prior in (bottleneck.prior_mean, bottleneck.prior_log_variance):
            prior.copy_(draw(WIDTH, seed=4))
    states = draw(2, 2, WIDTH, seed=1).requires_grad_()
    parameters = dict(bottleneck.named_parameters())

    def computed(*_: Tensor) -> Tensor:  # gradcheck moves its inputs in place: these are the bottleneck's own
        return result(bottleneck, bottleneck(states))

    reached = [name for name in parameters if name.partition(".")[0] in sources]
    assert torch.autograd.gradcheck(computed, (states, *(parameters[name] for name in reached)))
    # Equal could also be zero on both sides: nothing is cut off, and nothing else takes part.
    gradients = torch.autograd.grad(computed().sum(), (states, *parameters.values()), allow_unused=True)
    found = {name for name, gradient in zip(parameters, gradients[1:], strict=True) if gradient is not None}
    assert found == set(reached)
    for name, gradient in zip(("states", *parameters), gradients, strict=True):
        assert gradient is None or gradient.abs().min() > 0 or name == "states", name
    assert (gradients[0][MASK] != 0).all()
