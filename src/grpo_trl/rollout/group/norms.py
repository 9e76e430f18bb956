"""RMSNorms of decoder layers, as one or a few launches.

Axes: R running rows, H query heads, K key-value heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


@dataclass(frozen=True)
class Norm:
    """`weight * x / sqrt(mean(x**2) + eps)`."""

    weight: Tensor
    eps: float
    widens: bool
    """Whether it computes in the weight's dtype; in that of `x` otherwise."""

    @classmethod
    def of(cls, module: Any) -> "Norm":
        """Of a family's module; Gemma's weights count from 1, in float32 at least."""
        weight = module.weight.detach()
        if type(module).__name__.startswith("Gemma"):
            wide = torch.promote_types(weight.dtype, torch.float32)
            return cls(1.0 + weight.to(wide), module.eps, wide != weight.dtype)
        return cls(weight, module.variance_epsilon, False)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.widens:
            return rms_norm(x.to(weight.dtype), tuple(weight.shape), weight, self.eps).to(x.dtype)
        return rms_norm(x, tuple(weight.shape), weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class HeadNorms:
    """Of queries and keys: of each head, or of all queries and of all keys."""

    query: Norm
    key: Norm
    whole: bool

    @classmethod
    def of(cls, attention: Any) -> "HeadNorms | None":
        if not hasattr(attention, "q_norm"):
            return None
        whole = attention.q_norm.weight.shape[0] != attention.head_dim
        return cls(Norm.of(attention.q_norm), Norm.of(attention.k_norm), whole)

    def __call__(self, parts_RND: Tensor, heads: int) -> Tensor:
        """Of H + K heads."""
        query, key = parts_RND[:, :heads], parts_RND[:, heads:]
        return torch.cat([self._normed(self.query, query), self._normed(self.key, key)], dim=1)

    def _normed(self, norm: Norm, x: Tensor) -> Tensor:
        return norm(x.flatten(1)).view_as(x) if self.whole else norm(x)
