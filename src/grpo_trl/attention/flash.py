"""Shared-prefix attention from flash kernels: torch's, and in float32 on a CPU those of `cpu_flash`.

A completion's token attends to two parts, its prompt and its own completion. A kernel gives each part's output o_j and
log-sum-exp l_j, and the whole is

    o = sum_j o_j exp(l_j) / sum_j exp(l_j)          l = log sum_j exp(l_j)

In the backward pass a part's kernel, called with the merged o and l, gives the exact gradient of that part.

Left out: soft-capped products and windows that are shorter than the sequence, which the kernels do not have.

Source: the merge is that of Flash-Decoding and of Ring Attention (arXiv 2310.01889).

Axes: H query heads, K key-value heads, S packed tokens, D head size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import cpu_flash
from .layout import Layout, Span


HALF = (torch.float16, torch.bfloat16)
Ends = tuple[Tensor, int]
_aten = torch.ops.aten


def has_flash(query: Tensor) -> bool:
    """Whether torch has a flash kernel for the device, the dtype and the head size."""
    if query.device.type == "cuda":
        return query.dtype in HALF and query.shape[-1] <= 256
    return query.device.type == "cpu"


def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Shared-prefix attention.

    Args:
        query: Of shape (1, H, S, D).
        key: Of shape (1, K, S, D) where K divides H; it is not copied for the query heads that share it.
        value: Of shape (1, K, S, D of the values); a size that differs from D is padded.
        layout: Where prompts and completions stand.
        scaling: What products of query and key are multiplied by.

    Returns:
        The output, of shape (1, H, S, D of the values).
    """
    size = max(query.shape[-1], value.shape[-1])
    if query.device.type == "cuda":
        size = -(-size // 8) * 8  # what its kernels take
    padded = [x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (query, key, value)]
    return _FlashAttention.apply(*padded, layout, scaling)[..., : value.shape[-1]]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
        forward, ctx.gradients = _passes(query)
        output, *rest = forward(query, key, value, layout, scaling)
        ctx.save_for_backward(query, key, value, output, *rest)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients(grad, ctx.saved_tensors, ctx.layout, ctx.scaling), None, None)


def _passes(query: Tensor) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Forward and backward."""
    if query.device.type == "cuda":
        return _cuda_forward, _cuda_backward
    if cpu_flash.serves(query):
        return cpu_flash.forward, cpu_flash.backward
    return _cpu_forward, _cpu_backward


def merge_parts(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """The output of the whole, from two parts' outputs of shape (..., D) and log-sum-exps of shape (...)."""
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(output.to(share.dtype), other.to(share.dtype), share).to(output.dtype)


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> tuple[Tensor, Tensor]:
    """A kernel call per prompt and completion, and one per group for all of its completions over their prompt."""

    def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scaling
        )

    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for segment in layout.segments:
        output[:, :, segment.slice], lse[:, :, segment.slice] = attend(segment.slice, segment.slice, True)
    for branches, prompt in layout.crossings:
        s = branches.slice
        other, other_lse = attend(s, prompt.slice, False)
        output[:, :, s] = merge_parts(output[:, :, s], lse[:, :, s], other, other_lse)
        lse[:, :, s] = torch.logaddexp(lse[:, :, s], other_lse)
    return output, lse


def _cpu_backward(
    grad: Tensor, saved: Sequence[Tensor], layout: Layout, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, output, lse = saved

    def gradients(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, queries],
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            output[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scaling,
        )

    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for segment in layout.segments:
        for total, part in zip(grads, gradients(segment.slice, segment.slice, True), strict=True):
            total[:, :, segment.slice] = part
    for branches, prompt in layout.crossings:
        places = (branches.slice, prompt.slice, prompt.slice)
        for total, place, part in zip(grads, places, gradients(branches.slice, prompt.slice, False), strict=True):
            total[:, :, place] += part
    return grads


class _Varlen:
    """The layout as the CUDA kernels read it: sequences one behind the other, and where each of them ends."""

    def __init__(self, layout: Layout, device: torch.device):
        self.device = device
        crossings = layout.crossings
        self.segments = self._ends(layout.segments)
        self.branches = self._ends([branches for branches, _ in crossings])
        self.prompts = self._ends([prompt for _, prompt in crossings])
        self.branch_tokens = self._tokens([branches for branches, _ in crossings])
        self.prompt_tokens = self._tokens([prompt for _, prompt in crossings])

    def _ends(self, spans: list[Span]) -> tuple[Tensor, int]:
        """Where each span ends when they stand one behind the other, from 0 on; the length of the longest."""
        lengths = [0, *(span.length for span in spans)]
        return torch.tensor(lengths).cumsum(0).to(self.device, torch.int32), max(lengths)

    def _tokens(self, spans: list[Span]) -> Tensor:
        return torch.tensor([i for span in spans for i in range(span.start, span.stop)], device=self.device)

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "_Varlen":
        """Made once per layout, for all layers."""
        if "_varlen" not in layout.__dict__:
            layout.__dict__["_varlen"] = cls(layout, device)
        return layout.__dict__["_varlen"]


def _cuda_forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> tuple[Tensor, ...]:
    """One kernel call for all prompts and completions, and one for all completions over their prompts."""
    rows = _Varlen.of(layout, query.device)
    query_SHD, key_SKD, value_SKD = (x[0].transpose(0, 1) for x in (query, key, value))
    output_SHD, lse_HS, *states = _varlen_forward(
        query_SHD, key_SKD, value_SKD, rows.segments, rows.segments, True, scaling
    )
    if layout.crossings:
        b, p = rows.branch_tokens, rows.prompt_tokens
        other_SHD, other_lse_HS, *other_states = _varlen_forward(
            query_SHD[b], key_SKD[p], value_SKD[p], rows.branches, rows.prompts, False, scaling
        )
        output_SHD[b] = merge_parts(output_SHD[b], lse_HS.T[b], other_SHD, other_lse_HS.T)
        lse_HS[:, b] = torch.logaddexp(lse_HS[:, b], other_lse_HS)
        states += other_states
    return output_SHD.transpose(0, 1).unsqueeze(0), lse_HS.unsqueeze(0), *states


def _cuda_backward(
    grad: Tensor, saved: Sequence[Tensor], layout: Layout, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, output, lse, *states = saved
    rows = _Varlen.of(layout, query.device)
    grad_SHD, query_SHD, key_SKD, value_SKD, output_SHD = (
        x[0].transpose(0, 1) for x in (grad, query, key, value, output)
    )
    grads = _varlen_backward(
        (grad_SHD, query_SHD, key_SKD, value_SKD, output_SHD, lse[0]),
        states[:2],
        rows.segments,
        rows.segments,
        True,
        scaling,
    )
    if layout.crossings:
        b, p = rows.branch_tokens, rows.prompt_tokens
        parts = _varlen_backward(
            (grad_SHD[b], query_SHD[b], key_SKD[p], value_SKD[p], output_SHD[b], lse[0][:, b]),
            states[2:],
            rows.branches,
            rows.prompts,
            False,
            scaling,
        )
        for total, tokens, part in zip(grads, (b, p, p), parts, strict=True):
            total.index_add_(0, tokens, part)
    query_grad, key_grad, value_grad = (total.transpose(0, 1).unsqueeze(0) for total in grads)
    return query_grad, key_grad, value_grad


def _varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Ends, keys: Ends, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of shape (S, H, D), log-sum-exp of shape (H, S), and the state of dropout, of which there is none."""
    output, lse, *state, _ = _aten._flash_attention_forward(
        query, key, value, queries[0], keys[0], queries[1], keys[1], 0.0, causal, False, scale=scaling
    )
    return output, lse, *state


def _varlen_backward(
    tensors: Sequence[Tensor], state: Sequence[Tensor], queries: Ends, keys: Ends, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `tensors` are the output's gradient, these three, output and log-sum-exp."""
    tensors = [x.contiguous() for x in tensors]
    return _aten._flash_attention_backward(
        *tensors, queries[0], keys[0], queries[1], keys[1], 0.0, causal, *state, scale=scaling
    )
