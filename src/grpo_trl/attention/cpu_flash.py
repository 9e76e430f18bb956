"""Shared-prefix attention from kernels in C++, for float32 on a CPU: one call for all prompts and completions.

Axes: H query heads, K key-value heads, S packed tokens, D head size.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cpu_kernels import FLOAT, POINTER, SIZE, library
from .layout import Layout


LANES = 16
"""Head sizes must be a multiple of this."""


def serves(query: Tensor) -> bool:
    """Whether there is a kernel for the device, the dtype and the head size."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[-1] % LANES == 0
        and _kernels() is not None
    )


@functools.cache
def _kernels() -> Any:
    return library(
        Path(__file__).with_suffix(".cpp"),
        {
            "flash_forward": [POINTER] * 7 + [FLOAT] + [SIZE] * 5,
            "flash_backward": [POINTER] * 12 + [FLOAT] + [SIZE] * 6,
        },
    )


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> tuple[Tensor, Tensor]:
    """The output, of shape (1, H, S, D), and the log-sum-exp, of shape (1, H, S); arguments as in `flash_attention`."""
    query, key, value = (_rows(x) for x in (query, key, value))
    output = _rows(torch.zeros_like(query) if layout.only_read else torch.empty_like(query))
    # not empty: backward reads that of tokens that are left out, and a gradient of 0 does not survive NaN
    lse = query.new_zeros(query.shape[:3])
    segments, strides = _segments(layout, layout.only_read), _strides(query, key, value, output)
    _kernels().flash_forward(
        *(x.data_ptr() for x in (query, key, value, output, lse, segments, strides)),
        scaling,
        *(len(segments), query.shape[2], query.shape[1], key.shape[1], query.shape[3]),
    )
    return output, lse


def backward(grad: Tensor, saved: Sequence[Tensor], layout: Layout, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from what `forward` was given and gave."""
    grad, query, key, value, output = (_rows(x) for x in (grad, *saved[:4]))
    lse = saved[4]
    grads = tuple(
        _rows(torch.zeros_like(x)) for x in (query, key, value)
    )  # of other strides than a view that is not dense
    segments, crossings = _segments(layout), _crossings(layout)
    tensors = query, key, value, output, lse, grad, *grads, segments, crossings
    strides = _strides(query, key, value, output, grad, *grads)
    _kernels().flash_backward(
        *(x.data_ptr() for x in (*tensors, strides)),
        scaling,
        *(len(segments), len(crossings), query.shape[2], query.shape[1], key.shape[1], query.shape[3]),
    )
    return grads[0], grads[1], grads[2]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    """From head to head and from token to token."""
    return torch.tensor([x.stride(axis) for x in tensors for axis in (1, 2)])


def _segments(layout: Layout, only_read: bool = False) -> Tensor:
    """Where each prompt and completion starts and stops, and the prompt of the latter.

    With `only_read` of each prompt its last token alone, like a completion of the others.
    """
    spans = []
    for group in layout.groups:
        start, stop = group.prompt.start, group.prompt.stop
        spans.append((stop - 1, stop, start, stop - 1) if only_read else (start, stop, 0, 0))
        spans += [(branch.start, branch.stop, start, stop) for branch in group.branches if branch.length]
    return torch.tensor(spans, dtype=torch.int32)


def _crossings(layout: Layout) -> Tensor:
    """Where the completions of each group start and stop, and their prompt."""
    spans = [(branches.start, branches.stop, prompt.start, prompt.stop) for branches, prompt in layout.crossings]
    return torch.tensor(spans, dtype=torch.int32).view(-1, 4)
