"""Surrogates: what a unit contributes to the policy's objective, given its importance ratio.

Axes: B completions, T completion tokens, U units of the ratio (see `ratios.py`). Advantages have the shape (B, 1), or
(B, T) where each token has its own.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ratios import exp_tangent


@dataclass(frozen=True)
class Terms:
    """The surrogate's value per unit, and what explains it; all but `objective_BU` is detached."""

    objective_BU: Tensor
    """What is maximized, before weights."""
    slope_BU: Tensor
    """Size of the derivative of the objective with respect to the log-ratio."""
    clipped_low_BU: Tensor
    """The ratio lies below the clip range with a negative advantage; bool."""
    clipped_high_BU: Tensor
    """The ratio lies above the clip range with a positive advantage; bool."""


class Surrogate(Protocol):
    """From log-ratios (nats, with gradient) and advantages to terms."""

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor) -> Terms: ...


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate.

        min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)

    Source: PPO, arXiv 1707.06347, Eq. (7).
    """

    epsilon: float
    epsilon_high: float

    def __call__(self, log_ratio_BU: Tensor, advantages_BU: Tensor) -> Terms:
        low, high = 1 - self.epsilon, 1 + self.epsilon_high
        ratio_BU = exp_tangent(log_ratio_BU)
        objective_BU = torch.minimum(ratio_BU * advantages_BU, ratio_BU.clamp(low, high) * advantages_BU)
        clipped_low_BU = (ratio_BU < low) & (advantages_BU < 0)
        clipped_high_BU = (ratio_BU > high) & (advantages_BU > 0)
        slope_BU = (ratio_BU.detach() * advantages_BU.abs()).masked_fill(clipped_low_BU | clipped_high_BU, 0.0)
        return Terms(objective_BU, slope_BU, clipped_low_BU, clipped_high_BU)
