"""Weights laid out for the products of decoding, where the layout of training is slow.

A product with a few rows reads every weight for them, and on a CPU it first rearranges what it reads. Done once per
generation batch instead, decoding a dozen rows takes half the time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad


ROWS = 256
"""For how many rows oneDNN lays weights out: it decides the layout, which serves fewer as well."""
MOST_ROWS = 64
"""With more rows than this the layout of training is about as fast."""
ROUNDED = 8
"""Rows are filled up to a multiple of this: oneDNN keeps half a megabyte of code for each number of rows and kind of
layer."""
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
        for layer in linears:
            layer.forward = _Packed(layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in linears:
            vars(layer).pop("forward", None)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Packed:
    """The forward of a linear layer, in oneDNN where the rows are few."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def __call__(self, input: Tensor) -> Tensor:
        rows_RK = input.reshape(-1, input.shape[-1])
        count = len(rows_RK)
        if count > MOST_ROWS:
            return linear(input, self.linear.weight, self.linear.bias)
        filled_RK = pad(rows_RK, (0, 0, 0, -count % ROUNDED))
        output_RK = torch.ops.mkldnn._linear_pointwise(filled_RK, self.weight, self.linear.bias, "none", [], "")
        return output_RK[:count].view(*input.shape[:-1], -1)
