"""Where the nucleus of top-p ends, exactly and without sorting a vocabulary.

A token is in the nucleus if the tokens that weigh more have less than p of the mass. Weights are integers (`inverse_cdf`),
so the nucleus is every token that weighs at least t, where

    t = the largest integer with sum of the weights that are at least t >= nucleus

On a CPU one pass adds up the weights by their leading bits, and only the few of the bin where the sum gets there are
sorted. Elsewhere the largest are sorted, and all of them where the nucleus does not end among these.

Axes: R rows, V vocabulary, C bins, K tokens that are sorted.
"""

import torch
from torch import Tensor


BIN_BITS = 5
"""Bits behind a weight's leading one that its bin is told by."""
LARGEST = 1024
"""Tokens that are sorted elsewhere."""


def least_weight(weights_RV: Tensor, nucleus_R1: Tensor, bits: int) -> Tensor:
    """Return t of each row, of shape (R, 1).

    Args:
        weights_RV: From 0 to 2^bits, int64.
        nucleus_R1: The weight that a nucleus must have, from 1 to that of its row, int64.
        bits: Of the largest weight there can be.
    """
    by_bins = weights_RV.device.type == "cpu"
    return least_by_bins(weights_RV, nucleus_R1, bits) if by_bins else least_by_topk(weights_RV, nucleus_R1)


def least_by_topk(weights_RV: Tensor, nucleus_R1: Tensor, largest: int = LARGEST) -> Tensor:
    """As `least_weight`, by the largest weights: the last one that has less than the nucleus above it."""
    largest = min(largest, weights_RV.shape[1])
    weights_RK = weights_RV.topk(largest, dim=-1).values
    inside_RK = weights_RK.cumsum(-1) - weights_RK < nucleus_R1
    if largest < weights_RV.shape[1] and inside_RK[:, -1].any():
        return least_by_topk(weights_RV, nucleus_R1, weights_RV.shape[1])
    return weights_RK.gather(1, (inside_RK.sum(-1, keepdim=True) - 1).clamp(min=0))


def least_by_bins(weights_RV: Tensor, nucleus_R1: Tensor, bits: int) -> Tensor:
    """As `least_weight`, by the sums of bins and the weights of one of them.

    The weights below the nucleus sum to what the row has besides it, or less; t is where the sum from the least one on
    exceeds that.
    """
    bin_RV = _bins(weights_RV, bits)
    mass_RC = weights_RV.new_zeros(len(weights_RV), (bits + 1) << BIN_BITS).scatter_add_(1, bin_RV.long(), weights_RV)
    up_to_RC = mass_RC.cumsum(-1)
    besides_R1 = up_to_RC[:, -1:] - nucleus_R1
    bin_R1 = _first_above(up_to_RC, besides_R1)
    weights_RK = _where_true(weights_RV, bin_RV == bin_R1).sort(-1).values
    below_R1 = up_to_RC.gather(1, bin_R1) - weights_RK.sum(-1, keepdim=True)
    return weights_RK.gather(1, _first_above(weights_RK.cumsum(-1), besides_R1 - below_R1))


def _first_above(sums: Tensor, limit_R1: Tensor) -> Tensor:
    """Where rising sums exceed a limit; the bound matters only where logits are not finite."""
    return torch.searchsorted(sums, limit_R1, right=True).clamp_(max=sums.shape[1] - 1)


def _bins(weights_RV: Tensor, bits: int) -> Tensor:
    """The place of the leading one and the bits behind it, as a float has them: the larger the weight, the larger."""
    mantissa, bias = 23, 127  # of float32
    bin_RV = weights_RV.float().view(torch.int32) >> (mantissa - BIN_BITS)
    return bin_RV.sub_(bias << BIN_BITS).clamp_(0, ((bits + 1) << BIN_BITS) - 1)


def _where_true(weights_RV: Tensor, mask_RV: Tensor) -> Tensor:
    """The weights of each row where the mask is True, then zeros; of shape (R, K)."""
    counts_R1 = mask_RV.sum(-1, keepdim=True)
    weights_RK = weights_RV.new_zeros(len(weights_RV), max(1, int(counts_R1.max())))
    weights_RK[torch.arange(weights_RK.shape[1]) < counts_R1] = weights_RV[mask_RV]
    return weights_RK
