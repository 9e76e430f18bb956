"""Kernels of a decoding step on a CPU, in C++: the functions of `kernels`, in float32 and with torch's threads.

Axes: R running rows, H query heads, D head size, C hidden size, I intermediate size, E all that a product gives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....cpu_kernels import FLOAT, POINTER, SIZE, library
from ..norms import HeadNorms, Norm
from ..step import Keys


__all__ = ["ACTIVATIONS", "Partial", "add_and_norm", "attend", "gated", "rotate_and_store"]

ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
"""Of gates, by the name of their module."""
COMPILED = library(
    Path(__file__).with_name("kernels.cpp"),
    {
        "attend": [POINTER] * 12 + [FLOAT] * 2 + [SIZE] * 11,
        "add_and_norm": [POINTER] * 6 + [FLOAT] * 3 + [SIZE] * 2,
        "rotate_and_store": [POINTER] * 8 + [FLOAT] + [SIZE] * 5,
        "gate": [POINTER] * 2 + [SIZE] * 3,
    },
)
"""None where they cannot be compiled."""


class Partial(NamedTuple):
    """Memory for what a row's own keys and those of its prompt give."""

    output: Tensor  # (2, R, H, D of the values)
    lse: Tensor  # (2, R, H)

    @classmethod
    def empty(cls, keys: Sequence[Keys], query_RHD: Tensor, value_size: int) -> "Partial":
        rows, heads, _ = query_RHD.shape
        return cls(query_RHD.new_empty(len(keys), rows, heads, value_size), query_RHD.new_empty(len(keys), rows, heads))


def attend(
    query_RHD: Tensor, keys: Sequence[Keys], key_heads: int, partial: Partial, scaling: float, softcap: float | None
) -> Tensor:
    """As `kernels.attend`."""
    rows, heads, size = query_RHD.shape
    value_size = partial.output.shape[3]
    output = query_RHD.new_empty(rows, heads * value_size)
    memories = [pointer for held in keys for pointer in (held.memory.data_ptr(), *(x.data_ptr() for x in held.reach))]
    shapes = [length for held in keys for length in (*held.reach.rows_XG.shape, held.memory.shape[1])]
    COMPILED.attend(
        query_RHD.data_ptr(),
        *memories,
        partial.output.data_ptr(),
        partial.lse.data_ptr(),
        output.data_ptr(),
        scaling,
        softcap or 0.0,
        rows,
        *shapes,
        key_heads,
        heads // key_heads,
        size,
        value_size,
    )
    return output


def add_and_norm(
    hidden_RC: Tensor,
    change_RC: Tensor | None,
    after: Norm | None,
    before: Norm | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `kernels.add_and_norm`."""
    rows, size = hidden_RC.shape
    added_RC = hidden_RC if change_RC is None else torch.empty_like(hidden_RC)
    normed_RC = torch.empty_like(hidden_RC)
    COMPILED.add_and_norm(
        hidden_RC.data_ptr(),
        None if change_RC is None else change_RC.data_ptr(),
        after and after.weight.data_ptr(),
        before and before.weight.data_ptr(),
        added_RC.data_ptr(),
        normed_RC.data_ptr(),
        after.eps if after else 0.0,
        before.eps if before else 0.0,
        scale,
        rows,
        size,
    )
    return added_RC, normed_RC


def rotate_and_store(
    product_RE: Tensor,
    memory: Tensor,
    lines_R: Tensor,
    heads: int,
    size: int,
    rotation: tuple[Tensor, Tensor],
    norms: HeadNorms | None,
) -> Tensor:
    """As `kernels.rotate_and_store`."""
    rows, width = product_RE.shape
    cos, sin = rotation
    query_RHD = product_RE.new_empty(rows, heads, size)
    COMPILED.rotate_and_store(
        product_RE.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        norms and norms.query.weight.data_ptr(),
        norms and norms.key.weight.data_ptr(),
        query_RHD.data_ptr(),
        memory.data_ptr(),
        lines_R.data_ptr(),
        norms.query.eps if norms else 0.0,
        rows,
        heads,
        (width // size - heads) // 2,
        size,
        cos.shape[-1],
    )
    return query_RHD


def gated(gate_up_RI: Tensor, activation: int) -> Tensor:
    """As `kernels.gated`."""
    rows, size = gate_up_RI.shape[0], gate_up_RI.shape[1] // 2
    output_RI = gate_up_RI.new_empty(rows, size)
    COMPILED.gate(gate_up_RI.data_ptr(), output_RI.data_ptr(), rows, size, activation)
    return output_RI
