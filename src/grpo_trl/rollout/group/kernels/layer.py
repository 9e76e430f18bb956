"""What a decoder layer computes between two products, a launch for each. Sums are taken in float32.

Axes: R running rows, H query heads, K key-value heads, D head size, C hidden size, I intermediate size, E all that a
product gives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norms import HeadNorms, Norm


ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
"""Of gates, by the name of their module."""


def add_and_norm(
    hidden_RC: Tensor,
    change_RC: Tensor | None,
    after: Norm | None,
    before: Norm | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return `hidden + scale * after(change)`, and what `before` makes of it, in `dtype`."""
    rows, size = hidden_RC.shape
    added_RC = hidden_RC if change_RC is None else torch.empty_like(hidden_RC)
    normed_RC = hidden_RC.new_empty(rows, size, dtype=dtype)
    _add_and_norm[(rows,)](
        *(hidden_RC, change_RC, after and after.weight, before and before.weight, added_RC, normed_RC),
        *(after.eps if after else 0.0, before.eps if before else 0.0, scale),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        ADDS=change_RC is not None,
        AFTER=after is not None,
        BEFORE=before is not None,
        num_warps=4 if size <= 2048 else 8,
    )
    return added_RC, normed_RC


@triton.jit
def _add_and_norm(
    hidden,
    change,
    after,
    before,
    added,
    normed,
    eps_after,
    eps_before,
    scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
):
    c = tl.arange(0, PADDED)
    there = c < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + c
    x = tl.load(hidden + at, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(change + at, mask=there, other=0.0).to(tl.float32)
        if AFTER:
            y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps_after)
            y = (
                (y * tl.load(after + c, mask=there, other=0.0).to(tl.float32))
                .to(change.dtype.element_ty)
                .to(tl.float32)
            )
        rounded = (x + scale * y).to(added.dtype.element_ty)
        tl.store(added + at, rounded, mask=there)
        x = rounded.to(tl.float32)
    if BEFORE:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps_before)
        x = x * tl.load(before + c, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + at, x.to(normed.dtype.element_ty), mask=there)


def rotate_and_store(
    product_RE: Tensor,
    memory: Tensor,
    lines_R: Tensor,
    heads: int,
    size: int,
    rotation: tuple[Tensor, Tensor],
    norms: HeadNorms | None,
) -> Tensor:
    """Rotate queries and keys by their positions, and store keys and values.

    Args:
        product_RE: Queries, keys and values of all heads, of shape (R, (H + 2K)*D), contiguous.
        memory: Written to, of shape (rows, columns, 2*K*D).
        lines_R: The line of the memory, as rows*columns of them, that each row's keys go to.
        heads: H.
        size: D.
        rotation: Cosines and signed sines of the first components; see `Step.rotation`.
        norms: Of the queries and the keys of one head, taken before.

    Returns:
        The queries, of shape (R, H, D).
    """
    rows, width = product_RE.shape
    cos, sin = rotation
    query_RHD = product_RE.new_empty(rows, heads, size, dtype=memory.dtype)
    parts = width // size
    _rotate_and_store[(rows, parts)](
        *(product_RE, cos, sin, norms and norms.query.weight, norms and norms.key.weight),
        *(
            query_RHD,
            memory,
            lines_R,
            norms.query.eps if norms else 0.0,
            heads,
            parts - (parts - heads) // 2,
            parts,
        ),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        TURNED=cos.shape[-1],
        NORMED=norms is not None,
        num_warps=1,
    )
    return query_RHD


@triton.jit
def _rotate_and_store(
    product,
    cos,
    sin,
    query_norm,
    key_norm,
    query,
    memory,
    lines,
    eps,
    heads,
    turned_heads,
    parts,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = tl.arange(0, PADDED)
    there = d < SIZE
    source = product + (row * parts + part) * SIZE
    x = tl.load(source + d, mask=there, other=0.0).to(tl.float32)
    if part < turned_heads:
        turned = d < TURNED
        partner = tl.where(turned, (d + TURNED // 2) % TURNED, d)
        y = tl.load(source + partner, mask=there, other=0.0).to(tl.float32)
        if NORMED:
            scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
            if part < heads:
                x *= scale * tl.load(query_norm + d, mask=there, other=0.0).to(tl.float32)
                y *= scale * tl.load(query_norm + partner, mask=there, other=0.0).to(tl.float32)
            else:
                x *= scale * tl.load(key_norm + d, mask=there, other=0.0).to(tl.float32)
                y *= scale * tl.load(key_norm + partner, mask=there, other=0.0).to(tl.float32)
        cos_D = tl.load(cos + row * TURNED + d, mask=turned, other=1.0).to(tl.float32)
        sin_D = tl.load(sin + row * TURNED + d, mask=turned, other=0.0).to(tl.float32)
        x = x * cos_D + y * sin_D
    if part < heads:
        tl.store(query + (row * heads + part) * SIZE + d, x.to(query.dtype.element_ty), mask=there)
    else:
        at = tl.load(lines + row).to(tl.int64) * (parts - heads) + part - heads
        tl.store(memory + at * SIZE + d, x.to(memory.dtype.element_ty), mask=there)


def gated(gate_up_RI: Tensor, activation: int) -> Tensor:
    """The activated first half times the second one, of shape (R, I); see `ACTIVATIONS`."""
    rows, size = gate_up_RI.shape[0], gate_up_RI.shape[1] // 2
    output_RI = gate_up_RI.new_empty(rows, size)
    block = 1024
    _gate[(rows, triton.cdiv(size, block))](gate_up_RI, output_RI, size, BLOCK=block, ACTIVATION=activation)
    return output_RI


@triton.jit
def _gate(gate_up, output, size, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < size
    gate = tl.load(gate_up + row * 2 * size + i, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + i, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        gate = gate * tl.sigmoid(gate)
    else:
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    rounded = gate.to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * size + i, (rounded * up).to(output.dtype.element_ty), mask=there)
