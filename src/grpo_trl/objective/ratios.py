"""Importance ratios: from the log-ratios of tokens to those of units.

Axes: B completions, T completion tokens, U units. A unit is what one importance ratio or one KL estimate belongs to: a
token (U = T) or a whole completion (U = 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


EXP_LIMIT = 20.0
"""Log-ratio above which exp is continued by its tangent."""


def exp_tangent(x: Tensor) -> Tensor:
    """Compute exp(x), continued by its tangent above 20.

        x <= 20:  e^x            x > 20:  e^20 (1 + x - 20)

    Value and slope are continuous and the result is convex, finite in float32 for x up to 1e29. A clamp would have slope
    0 there and reverse the gradient of exp(R) - R - 1.

    Args:
        x: Log-ratios (nats), any shape, floating.

    Returns:
        A tensor like `x`.
    """
    tangent = math.exp(EXP_LIMIT) * (1 + x - EXP_LIMIT)
    return torch.where(x > EXP_LIMIT, tangent, torch.exp(x.clamp(max=EXP_LIMIT)))


def token(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Keep one value per token, of shape (B, T), 0 outside the mask."""
    return torch.where(mask_BT, values_BT, 0.0)


def sequence(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over each completion: the log-ratio of its probability, of shape (B, 1); 0 where the mask is empty."""
    return token(values_BT, mask_BT).sum(1, keepdim=True)


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Average over each completion's tokens, of shape (B, 1): the log-ratio of the geometric mean of token ratios.

    Source: GSPO, arXiv 2507.18071, Eq. (7).
    """
    return sequence(values_BT, mask_BT) / mask_BT.sum(1, keepdim=True).clamp(min=1)


RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence_mean": sequence_mean,
}
"""Name -> (values of tokens, mask) to values of units."""


def unit_mask(values_BU: Tensor, mask_BT: Tensor) -> Tensor:
    """Mask of the units that `values_BU` has: the tokens' own, or True for completions with at least one token."""
    return mask_BT if values_BU.shape == mask_BT.shape else mask_BT.any(1, keepdim=True)
