"""Where the nucleus of top-p ends, exactly and without sorting a vocabulary.

A token is in the nucleus if the tokens that weigh more have less than p of the mass. Weights are integers (`inverse_cdf`),
so the nucleus is every token that weighs at least t, where

    t = the largest integer with sum of the weights that are at least t >= nucleus

The largest weights are sorted, and all of them where the nucleus does not end among these.

Axes: R rows, V vocabulary, K tokens that are sorted.
"""

from torch import Tensor


LARGEST = 1024
"""Tokens that are sorted at first."""


def least_weight(weights_RV: Tensor, nucleus_R1: Tensor, largest: int = LARGEST) -> Tensor:
    """Return t of each row, of shape (R, 1): the last weight that has less than the nucleus above it.

    Args:
        weights_RV: Not negative, int64.
        nucleus_R1: The weight that a nucleus must have, from 1 to that of its row, int64.
        largest: Weights that are sorted at first.
    """
    largest = min(largest, weights_RV.shape[1])
    weights_RK = weights_RV.topk(largest, dim=-1).values
    inside_RK = weights_RK.cumsum(-1) - weights_RK < nucleus_R1
    if largest < weights_RV.shape[1] and inside_RK[:, -1].any():
        return least_weight(weights_RV, nucleus_R1, weights_RV.shape[1])
    return weights_RK.gather(1, (inside_RK.sum(-1, keepdim=True) - 1).clamp(min=0))
