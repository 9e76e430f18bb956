"""Aggregation: how terms add up to the loss of a mini-batch.

Axes: B completions, T completion tokens.

The weight of a token follows from its own completion alone. What the sum is divided by follows from counts of the whole
mini-batch, which are known before its first backward. So no cut into micro-batches, no order and no number of ranks
changes the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """What a mini-batch holds over all ranks, including the completions that are set aside."""

    completions: int
    tokens: int
    """Trained tokens."""
    possible_tokens: int
    """Tokens that its completions would have if each had `max_completion_length`."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.completions + other.completions,
            self.tokens + other.tokens,
            self.possible_tokens + other.possible_tokens,
        )


@dataclass(frozen=True)
class Aggregation:
    """Weights of tokens, and the divisor of the weighted sum.

    A term that belongs to a whole completion has the summed weight of the completion's tokens.
    """

    weights: Callable[[Tensor, torch.dtype], Tensor]
    """(mask of shape (B, T), dtype) -> weights of shape (B, T), 0 outside the mask."""
    divisor: Callable[[Counts], float]


def _share_of_completion(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return mask_BT.to(dtype) / mask_BT.sum(1, keepdim=True).clamp(min=1)


def _one(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return mask_BT.to(dtype)


PER_COMPLETION = Aggregation(_share_of_completion, lambda counts: float(counts.completions))
"""1/B sum_i 1/|o_i| sum_t; for a term of the whole completion 1/B sum_i."""
PER_TOKEN = Aggregation(_one, lambda counts: float(max(counts.tokens, 1)))
"""1 / (sum_i |o_i|) sum_i sum_t."""
CONSTANT = Aggregation(_one, lambda counts: float(counts.possible_tokens))
"""1 / (B max_completion_length) sum_i sum_t."""
LENGTH_WEIGHTED = Aggregation(_one, lambda counts: float(counts.completions))
"""1/B sum_i sum_t; for a term of the whole completion 1/B sum_i |o_i|."""
