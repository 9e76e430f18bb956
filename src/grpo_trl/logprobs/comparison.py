"""How far two ways of computing the same log-probabilities may be apart.

The same tokens get slightly different log-probabilities in batches of different shapes, whose sums are rounded in another
order. So a difference is held against the model's own noise, between two shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model_utils import causal_lm


TOLERANCE = 1e-3
"""Mean difference (nats) of log-probabilities that float32 may show."""
COARSE_TOLERANCE = 0.05
"""The same where matrix products are rounded more: half precision, and TF32."""
NOISE_FACTOR = 4.0
"""How many times the model's own noise is allowed."""


@dataclass(frozen=True)
class Comparison:
    """Mean absolute differences of log-probabilities (nats)."""

    difference: float
    """Of the way that is judged from the plain one."""
    noise: float | None
    """Of the plain way from itself in another batch shape; None where that was not computed."""
    allowed: float
    tokens: int

    @classmethod
    def of(cls, judged: Tensor, plain: Tensor, other_shape: Tensor | None, tolerance: float) -> "Comparison":
        """Compare log-probabilities of the same tokens, each of shape (tokens,)."""
        noise = None if other_shape is None else _mean_difference(plain, other_shape)
        allowed = max(tolerance, NOISE_FACTOR * (noise or 0.0))
        return cls(_mean_difference(judged, plain), noise, allowed, len(plain))

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed

    def __str__(self) -> str:
        text = f"{self.difference:.2g} nats on average over {self.tokens} tokens, where {self.allowed:.2g} are allowed"
        if self.noise is None:
            return text
        return f"{text} (the model differs from itself by {self.noise:.2g} in another batch shape)"


def tolerance(model: nn.Module, mixed_precision: bool) -> float:
    """Mean difference (nats) of log-probabilities that two ways of computing them may show."""
    return COARSE_TOLERANCE if mixed_precision or _rounds(model) else TOLERANCE


def _mean_difference(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().mean().item() if len(one) else 0.0


def _rounds(model: nn.Module) -> bool:
    """Whether some products are rounded more than float32 does: in half precision, by TF32, or over a k-bit base."""
    parameters = list(model.parameters())
    on_gpu = parameters[0].device.type == "cuda"
    tf32 = on_gpu and torch.get_float32_matmul_precision() != "highest"
    coarse = any(p.dtype not in (torch.float32, torch.float64) for p in parameters)
    return tf32 or coarse or bool(getattr(causal_lm(model), "is_quantized", False))
