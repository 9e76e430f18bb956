"""Linear layers whose products a kernel computes, where a step has few rows."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import Linear, compiled, product


MOST_ROWS = 256
"""With more rows than this torch's products are as fast."""


@contextlib.contextmanager
def served(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, plain linear layers among `modules` compute by a kernel, in float32 on a CPU; weights must not change."""
    layers = [module for module in modules if _is_served(module)]
    try:
        for layer in layers:
            layer.forward = _forward(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_served(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module) or torch.is_autocast_enabled("cpu"):
        return False
    on_cpu = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    return on_cpu and compiled() is not None


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    compiled = Linear.of((weight, bias))

    def forward(x: Tensor) -> Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != torch.float32:
            return linear(x, weight, bias)
        return product(x, compiled)

    return forward
