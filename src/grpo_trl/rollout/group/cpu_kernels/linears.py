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
    parameters = [*module.parameters()]
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in parameters)
    return on_cpu and compiled() is not None


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    parameters = Linear.of((weight, bias))

    def forward(x: Tensor) -> Tensor:
        fits = x.dtype == torch.float32 and x.shape[-1] == weight.shape[1] and x.numel() <= MOST_ROWS * x.shape[-1]
        return product(x, parameters) if fits else linear(x, weight, bias)

    return forward
