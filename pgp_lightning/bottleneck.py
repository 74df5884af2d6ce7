"""The Gaussian bottleneck of posterior-guided pruning (PGP): gate, posterior, learned prior, divergence and sample.

Implements Eqs. 1-4 of the PGP paper (also published as IF-Prune). Letters as there: B batch, m visual tokens,
d hidden size, V' the guide's last hidden states at the visual tokens, Z latents; ``p`` marks the prior.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgp_lightning.errors import ConfigError

__all__ = [
    "GATE_BIAS_LIMIT",
    "GATE_INPUT_MAX",
    "LOG_VARIANCE_RANGE",
    "STATE_LIMIT",
    "GateKind",
    "GaussianBottleneck",
    "Posterior",
    "check_biases",
]

GateKind = Literal["sigmoid", "exp"]

# Standard deviations from 0.0025 to 20: wider than training uses, narrow enough for every exp below.
LOG_VARIANCE_RANGE = (-12.0, 6.0)
# exp(8) is about 3,000, past any gate of use; its square still leaves float32 room in Eq. 2.
GATE_INPUT_MAX = 8.0
# 16.6: past it float32's sigmoid is 1 and has no gradient, and a gate below exp(-16.6) is lost in Eq. 3's rounding.
GATE_BIAS_LIMIT = -math.log(torch.finfo(torch.float32).eps / 2)
# The largest finite float16, so float16 states pass unchanged; larger ones could overflow Eq. 2.
STATE_LIMIT = 65504.0


class Posterior(NamedTuple):
    """One diagonal Gaussian per visual token, all float32 of shape (B, m, d)."""

    mean: Tensor
    """mu_i of Eq. 3."""
    log_variance: Tensor
    """log sigma_i^2, inside ``LOG_VARIANCE_RANGE``."""
    gate: Tensor
    """g_i of Eq. 3: how far the mean goes from the prior's (0) to the token's own state (1)."""


class _WideLinear(nn.Linear):
    """A linear layer computed in its input's dtype even where a strategy stores its weights in half precision."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class GaussianBottleneck(nn.Module):
    """Channel-wise Gaussian posteriors of visual tokens against one prior shared by all tokens and all data.

    The paper's "two MLP layers and two learnable embeddings" are the heads I and S, mu_p and log sigma_p^2.
    Everything is computed in float32, whatever the states' or the weights' dtype and under autocast too (in float64
    with float64 weights), and is finite for finite states: states are clamped to +-``STATE_LIMIT``, log variances to
    ``LOG_VARIANCE_RANGE`` and the exp gate's input to at most ``GATE_INPUT_MAX``. Infinite or NaN states stay visible
    as such.

    Args:
        width: hidden size d of the states.
        gate: activation of I; "sigmoid" is the method, "exp" the paper's ablation.
        learned_prior: whether mu_p and log sigma_p^2 are trained; otherwise they stay 0, a standard normal.
        head_layers: depth of I and of S, 1 for Linear, 2 for Linear-GELU-Linear; the paper does not say.
        gate_bias: initial bias of I's last layer, so the gate's logit ("sigmoid") or log ("exp") at the start;
            0 starts the sigmoid gate at 0.5 but the exp gate at 1, -0.7 starts the exp gate at 0.5.
        log_variance_bias: initial bias of S's last layer, so log sigma_i^2 at the start.

    Raises:
        ConfigError: if the width is not positive, ``gate`` or ``head_layers`` is none of the above, or a bias starts
            where there is no gradient.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: GateKind = "sigmoid",
        learned_prior: bool = True,
        head_layers: Literal[1, 2] = 2,
        gate_bias: float = 0.0,
        log_variance_bias: float = -2.0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"width must be at least 1, got {width}; pass the guide's hidden size")
        if gate not in get_args(GateKind):
            raise ConfigError(f"gate must be one of {', '.join(get_args(GateKind))}, got {gate!r}")
        if head_layers not in (1, 2):
            raise ConfigError(f"head_layers must be 1 or 2, got {head_layers}")
        check_biases(gate, gate_bias, log_variance_bias)
        self.width = width
        self.gate = gate
        self.gate_head = _head(width, head_layers, gate_bias)
        self.log_variance_head = _head(width, head_layers, log_variance_bias)
        self.prior_mean = nn.Parameter(torch.zeros(width), requires_grad=learned_prior)
        self.prior_log_variance = nn.Parameter(torch.zeros(width), requires_grad=learned_prior)

    def forward(self, v: Tensor) -> Posterior:
        """Map hidden states to posteriors (Eqs. 1 and 3).

        Args:
            v: states V' of any floating dtype, (B, m, d).

        Returns:
            Float32 mean, log variance and gate, (B, m, d) each.

        Raises:
            ValueError: if the states' width is not d.
        """
        if v.shape[-1] != self.width:
            raise ValueError(f"expected states of width {self.width}, got shape {tuple(v.shape)}")
        with torch.autocast(v.device.type, enabled=False):
            v = v.to(torch.promote_types(self.prior_mean.dtype, torch.float32))
            # An infinite state means the backbone overflowed: it must not hide behind the clamp.
            v = torch.where(v.isinf(), v, v.clamp(-STATE_LIMIT, STATE_LIMIT))
            inputs = self.gate_head(v)
            gate = inputs.sigmoid() if self.gate == "sigmoid" else inputs.clamp(max=GATE_INPUT_MAX).exp()
            prior_mean = self.prior_mean.to(v.dtype)
            # Eq. 3: the gate bounds how far the mean can leave the prior; a free projection would let Eq. 2 explode.
            mean = gate * (v - prior_mean) + prior_mean
            log_variance = self.log_variance_head(v).clamp(*LOG_VARIANCE_RANGE)
        return Posterior(mean, log_variance, gate)

    def sample(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """Draw latents Z by the reparameterisation of Eq. 4.

        Args:
            posterior: (B, m, d).
            noise: standard normal draws, (B, m, d); the caller owns their generator.

        Returns:
            Float32 latents, (B, m, d).

        Raises:
            ValueError: if the noise has not the posterior's shape.
        """
        if noise.shape != posterior.mean.shape:
            raise ValueError(
                f"expected noise of the posterior's shape {tuple(posterior.mean.shape)}, got {tuple(noise.shape)}"
            )
        return posterior.mean + (0.5 * posterior.log_variance).exp() * noise.to(posterior.mean.dtype)

    def divergence(self, posterior: Posterior) -> Tensor:
        """Compute every token's KL divergence from the prior (Eq. 2: the mean over channels, not the sum).

        Args:
            posterior: (B, m, d).

        Returns:
            Float32 (B, m), never negative, and 0 where a token's posterior is the prior.
        """
        prior_log_variance = self.prior_log_variance.to(posterior.mean.dtype).clamp(*LOG_VARIANCE_RANGE)
        log_ratio = posterior.log_variance - prior_log_variance
        # r - 1 - log r by expm1: near r = 1 the plain form cancels to noise that may be negative.
        spread = (log_ratio.expm1() - log_ratio).clamp(min=0.0)
        shift = (posterior.mean - self.prior_mean.to(posterior.mean.dtype)).square() * (-prior_log_variance).exp()
        return 0.5 * (spread + shift).mean(dim=-1)


def check_biases(gate: GateKind, gate_bias: float, log_variance_bias: float) -> None:
    """Refuse initial biases at which gate or variance has no gradient in float32.

    Raises:
        ConfigError: says which range has one.
    """
    widest = GATE_BIAS_LIMIT if gate == "sigmoid" else GATE_INPUT_MAX
    for name, bias, low, high in (
        ("gate_bias", gate_bias, -GATE_BIAS_LIMIT, widest),
        ("log_variance_bias", log_variance_bias, *LOG_VARIANCE_RANGE),
    ):
        if not low < bias < high:  # as NaN is not
            raise ConfigError(f"{name} must lie between {low:.1f} and {high:.1f}, where it has a gradient, got {bias}")


def _head(width: int, layers: int, bias: float) -> nn.Sequential:
    """Build a per-token network of the given depth whose last layer starts with a constant bias."""
    hidden: list[nn.Module] = [] if layers == 1 else [_WideLinear(width, width), nn.GELU()]
    last = _WideLinear(width, width)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(*hidden, last)
