"""Log-probabilities and entropies of logits on a GPU, in Triton: one pass forward, one backward, in the logits' precision.

torch's own operations widen the logits to float32 and go over them ten times. Sums are taken in float32 here too. Under
`TRITON_INTERPRET=1` the kernels run on a CPU.

Axes: K positions, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


BLOCK = 4096
"""Logits that a program computes with at a time."""


def token_logprobs(
    logits_KV: Tensor, targets_K: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """See `head.token_logprobs`."""
    logps_K, entropy_K = _TokenLogprobs.apply(logits_KV.contiguous(), targets_K.contiguous(), temperature)
    return logps_K, entropy_K if entropy_gradient else entropy_K.detach()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, targets_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        positions, size = logits_KV.shape
        logps_K, entropy_K, lse_K = (logits_KV.new_empty(positions, dtype=torch.float32) for _ in range(3))
        if positions:
            with torch.cuda.device_of(logits_KV):  # Triton launches on the current device
                _forward[(positions,)](
                    *(logits_KV, targets_K, logps_K, entropy_K, lse_K, size, temperature), BLOCK_SIZE=BLOCK, num_warps=8
                )
        ctx.save_for_backward(logits_KV, targets_K, entropy_K, lse_K)
        ctx.temperature = temperature
        return logps_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_KV, targets_K, entropy_K, lse_K = ctx.saved_tensors
        grad_KV = torch.empty_like(logits_KV)
        positions, size = logits_KV.shape
        if positions:
            _backward[(positions, triton.cdiv(size, BLOCK))](
                *(logits_KV, targets_K, entropy_K, lse_K, *(grad.contiguous() for grad in grads), grad_KV),
                *(size, ctx.temperature),
                BLOCK_SIZE=BLOCK,
                num_warps=8,
            )
        return grad_KV, None, None


@triton.jit
def _forward(logits, targets, logps, entropies, lses, size, temperature, BLOCK_SIZE: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_SIZE)
    largest = tl.full([], -1e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)  # of exp(x - largest), and of that times x - largest
    weighted = tl.full([], 0.0, tl.float32)
    for start in range(0, size, BLOCK_SIZE):
        there = start + v < size
        x = tl.load(logits + k * size + start + v, mask=there, other=float("-inf")).to(tl.float32) / temperature
        new = tl.maximum(largest, tl.max(x, 0))
        e = tl.exp(x - new)
        shrink = tl.exp(largest - new)
        weighted = shrink * (weighted + total * (largest - new)) + tl.sum(tl.where(e == 0.0, 0.0, e * (x - new)), 0)
        total = shrink * total + tl.sum(e, 0)
        largest = new
    lse = largest + tl.log(total)
    target = tl.load(logits + k * size + tl.load(targets + k)).to(tl.float32) / temperature
    tl.store(logps + k, target - lse)
    tl.store(entropies + k, tl.log(total) - weighted / total)
    tl.store(lses + k, lse)


@triton.jit
def _backward(
    logits, targets, entropies, lses, grad_logps, grad_entropies, grads, size, temperature, BLOCK_SIZE: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    there = v < size
    x = tl.load(logits + k * size + v, mask=there, other=float("-inf")).to(tl.float32) / temperature
    logp = x - tl.load(lses + k)
    p = tl.exp(logp)
    of_entropy = tl.where(p == 0.0, 0.0, p * (logp + tl.load(entropies + k)))
    chosen = tl.where(v == tl.load(targets + k), 1.0, 0.0)
    grad = tl.load(grad_logps + k) * (chosen - p) - tl.load(grad_entropies + k) * of_entropy
    tl.store(grads + k * size + v, (grad / temperature).to(grads.dtype.element_ty), mask=there)
