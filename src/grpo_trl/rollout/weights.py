"""Weights laid out for the products of decoding, where the layout of training is slow.

A product with a few rows reads every weight for them, and on a CPU it first rearranges what it reads. Done once per window
instead, decoding a dozen rows takes half the time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn


ROWS = 256
"""For how many rows oneDNN lays weights out; they serve fewer and more as well."""
FREE_SHARE = 0.1
"""Share of the free memory that copies of weights may take."""


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers in float32 on a CPU compute with copies of their weights that are laid out for it.

    The weights must not change inside. Where the copies would take much of the memory, there are none.
    """
    linears = [
        m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and _is_packable(m.weight)
    ]
    size = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    if torch.is_autocast_enabled("cpu") or size > FREE_SHARE * psutil.virtual_memory().available:
        linears = []
    try:
        for linear in linears:
            linear.forward = _Packed(linear)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Packed:
    """The forward of a linear layer, in oneDNN."""

    def __init__(self, linear: nn.Linear):
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def __call__(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
