"""Weights laid out for the products of decoding, where the layout of training is slow.

A product with a few rows reads every weight for them, and on a CPU it first rearranges what it reads. Done once per rollout
instead, decoding a dozen rows takes half the time.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad


ROWS = 256
"""For how many rows oneDNN lays weights out: it decides the layout, which serves fewer as well."""
MOST_ROWS = 256
"""With more rows than this the layout of training is as fast."""
ROUNDED = 8
"""More rows than this are filled up to a multiple of it: oneDNN keeps half a megabyte of code for each number of rows and
shape."""


def lay_out(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer with these weights, which must not change, for inputs of shape (..., features)."""
    if not _is_packable(weight):
        return lambda x: linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product(x: Tensor) -> Tensor:
        rows_RK = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        count = len(rows_RK)
        if count > MOST_ROWS:
            return linear(x, weight, bias)
        missing = filled_up(count) - count
        filled_RK = pad(rows_RK, (0, 0, 0, missing)) if missing else rows_RK
        output_RK = torch.ops.mkldnn._linear_pointwise(filled_RK, packed, bias, "none", [], "")
        if missing:
            output_RK = output_RK[:count]
        return output_RK if x.ndim == 2 else output_RK.view(*x.shape[:-1], -1)

    return product


def filled_up(rows: int) -> int:
    """How many rows are computed for `rows`."""
    return rows if rows <= ROUNDED else -(-rows // ROUNDED) * ROUNDED


@contextlib.contextmanager
def packed_linears(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the plain linear layers among `modules` in float32 on a CPU compute with `lay_out`."""
    linears = [m for m in modules if type(m) is nn.Linear and "forward" not in vars(m) and _is_packable(m.weight)]
    try:
        for layer in linears:
            layer.forward = lay_out(layer.weight.detach(), layer.bias)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in linears:
            vars(layer).pop("forward", None)


def _is_packable(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
