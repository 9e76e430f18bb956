"""Modules outside of fused layers that kernels compute in decoding steps: linear layers, and norms of the Llama family."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ....model_utils import LLAMA_FAMILIES, replaced
from .. import norms
from . import Linear, Norm, compiled, normalize, product


MOST_ROWS = 256
"""With more rows than this torch's products are as fast."""
NORMS = {f"{family}RMSNorm" for family in LLAMA_FAMILIES}


@contextlib.contextmanager
def served(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, plain ones among `modules` compute by a kernel, in float32 on a CPU; weights must not change."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if (forward := _forward_of(module)) is not None:
                stack.enter_context(replaced(vars(module), "forward", forward))
        yield


def _forward_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """None for what no kernel computes."""
    is_linear, is_norm = type(module) is nn.Linear, type(module).__name__ in NORMS
    if not (is_linear or is_norm) or "forward" in vars(module) or torch.is_autocast_enabled("cpu"):
        return None
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in module.parameters()) or compiled() is None:
        return None
    return _linear_forward(module) if is_linear else _norm_forward(module)


def _linear_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias
    parameters = Linear.of((weight, bias))

    def forward(x: Tensor) -> Tensor:
        fits = x.dtype == torch.float32 and x.shape[-1] == weight.shape[1] and x.numel() <= MOST_ROWS * x.shape[-1]
        return product(x, parameters) if fits else linear(x, weight, bias)

    return forward


def _norm_forward(module: Any) -> Callable[[Tensor], Tensor]:
    plain, parameters = module.forward, Norm.of(norms.Norm.of(module))

    def forward(x: Tensor) -> Tensor:
        return normalize(x, parameters) if x.dtype == torch.float32 else plain(x)

    return forward
