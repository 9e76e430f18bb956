"""Surrogates: what a unit contributes to the policy's objective, given its importance ratio w.

Axes: B completions, T completion tokens, U units of the ratio (see `ratios.py`). Advantages A have the shape (B, 1), or
(B, T) where each token has its own; a term has the shape that its factors broadcast to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .ratios import EXP_LIMIT, exp_tangent


class Clipped(NamedTuple):
    """Where a clip range takes the gradient; bool, detached."""

    low_BU: Tensor
    """The ratio lies below the range, with a negative advantage."""
    high_BU: Tensor
    """The ratio lies above the range, with a positive advantage."""


@dataclass(frozen=True)
class Terms:
    """The surrogate's value per unit, and detached tensors that explain it."""

    objective_BU: Tensor
    """What is maximized, before weights."""
    slope_BU: Tensor
    """Size of the derivative of the objective with respect to the log-ratio (equal to that with respect to the logprob
    where the ratio is a token's)."""
    clipped: Clipped | None = None
    """None where the surrogate has no clip range."""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values per unit of which the mean is a metric, by the metric's name."""


class Surrogate(Protocol):
    """From log-ratios of units (nats, with gradient), advantages and logprobs of tokens (0 outside the mask) to terms."""

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor, logps_BT: Tensor) -> Terms: ...


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate; with `delta`, clipped on both sides.

        min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)
        min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)

    Source: PPO, arXiv 1707.06347, Eq. (7). An `epsilon_high` of its own: DAPO, arXiv 2503.14476, section 3.1. `delta`:
    INTELLECT-2, arXiv 2505.07291.
    """

    epsilon: float
    epsilon_high: float
    delta: float | None = None

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor, logps_BT: Tensor) -> Terms:
        low, high = 1 - self.epsilon, 1 + self.epsilon_high
        ratio_BU = exp_tangent(log_ratio_BU)
        bounded_BU = ratio_BU.clamp(max=self.delta) if self.delta is not None else ratio_BU
        objective_BU = torch.minimum(bounded_BU * advantages_BU, ratio_BU.clamp(low, high) * advantages_BU)
        clipped = Clipped((ratio_BU < low) & (advantages_BU < 0), (ratio_BU > high) & (advantages_BU > 0))
        flat_BU = clipped.low_BU | clipped.high_BU | (ratio_BU > bounded_BU)
        return Terms(objective_BU, (ratio_BU.detach() * advantages_BU.abs()).masked_fill(flat_BU, 0.0), clipped)


@dataclass(frozen=True)
class Cispo:
    """CISPO: a token's logprob, weighted by its bounded ratio, through which no gradient flows.

        stopgrad(min(w, epsilon_high)) A logp

    No token loses its gradient. Source: MiniMax-M1, arXiv 2506.13585, Eq. (4) and (5); the bound without 1 +: ScaleRL,
    arXiv 2510.13786.
    """

    epsilon_high: float

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor, logps_BT: Tensor) -> Terms:
        ratio_BU = exp_tangent(log_ratio_BU.detach())
        weight_BU = ratio_BU.clamp(max=self.epsilon_high) * advantages_BU
        bounded_BU = (ratio_BU > self.epsilon_high) & (advantages_BU > 0)
        return Terms(weight_BU * logps_BT, weight_BU.abs(), means={"cispo_clip_ratio": bounded_BU.to(ratio_BU.dtype)})


@dataclass(frozen=True)
class Sapo:
    """SAPO: a sigmoid in place of the clip range.

        4 / tau sigmoid(tau (w - 1)) A,    tau = temperature_pos where A > 0, else temperature_neg

    Its slope is A at w = 1 and fades on both sides. Source: SAPO, arXiv 2511.20347.
    """

    temperature_pos: float
    temperature_neg: float

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor, logps_BT: Tensor) -> Terms:
        ratio_BU = exp_tangent(log_ratio_BU)
        temperature_BU = torch.where(advantages_BU > 0, self.temperature_pos, self.temperature_neg)
        gate_BU = torch.sigmoid(temperature_BU * (ratio_BU - 1))
        slope_BU = (4 * gate_BU * (1 - gate_BU) * ratio_BU * advantages_BU.abs()).detach()
        return Terms(4 / temperature_BU * gate_BU * advantages_BU, slope_BU)


@dataclass(frozen=True)
class Vespo:
    """VESPO: a token's logprob, weighted by a gamma function of its completion's ratio, through which no gradient flows.

        stopgrad(phi(W)) A logp,    phi(W) = e^lambda W^k e^(-lambda W),    W = product of the completion's ratios

    phi(1) = 1. (k, lambda) are `k_pos` and `lambda_pos` where A >= 0, else `k_neg` and `lambda_neg`. Source: VESPO,
    arXiv 2602.10693.
    """

    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor, logps_BT: Tensor) -> Terms:
        log_ratio_B1 = log_ratio_BU.detach().sum(1, keepdim=True).clamp(max=EXP_LIMIT)  # phi is 0 there
        phi_BU = self.phi(log_ratio_B1, advantages_BU)
        weight_BU = phi_BU * advantages_BU
        return Terms(weight_BU * logps_BT, weight_BU.abs(), means={"vespo/phi_seq_mean": phi_BU})

    def phi(self, log_ratio_B1: Tensor, advantages_BU: Tensor) -> Tensor:
        """Weigh completions by the logarithms of their ratios, at most `EXP_LIMIT`."""
        k_BU = torch.where(advantages_BU >= 0, self.k_pos, self.k_neg)
        lambda_BU = torch.where(advantages_BU >= 0, self.lambda_pos, self.lambda_neg)
        return torch.exp(lambda_BU + k_BU * log_ratio_B1 - lambda_BU * log_ratio_B1.exp())
