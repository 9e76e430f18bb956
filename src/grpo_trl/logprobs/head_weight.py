"""The head's matrix product, whose weight gradient is summed over slices of tokens in float32.

Autograd adds the gradients of slices in the precision of the product, and each addition rounds: in bfloat16, the error
grows as the square root of the number of slices.

Axes: K positions of a slice, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..model_utils import product_dtype


class SummedInFloat32:
    """A linear layer as a function of slices of its input: `head(hidden)`, the weight cast once for all slices.

        y = x W^T + b        dW = sum over slices of dy^T x, in float32 at least

    Call it for all slices of one forward; the weight gets its gradient when the last of them has been through backward.
    """

    def __init__(self, head: nn.Linear):
        dtype = product_dtype(head.weight)
        self.weight = head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.gradient: Tensor | None = None
        self._ticket = _Deliver.apply(head.weight, self)

    def __call__(self, hidden_KD: Tensor) -> Tensor:
        logits_KV = _Product.apply(hidden_KD.to(self.weight.dtype), self._ticket, self)
        return logits_KV if self.bias is None else logits_KV + self.bias


class _Deliver(torch.autograd.Function):
    """A number whose backward, which follows that of all who took it, hands the sum to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, product: SummedInFloat32) -> Tensor:
        ctx.product, ctx.dtype = product, weight.dtype
        return weight.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        gradient, ctx.product.gradient = ctx.product.gradient, None
        return None if gradient is None else gradient.to(ctx.dtype), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, ticket: Tensor, product: SummedInFloat32) -> Tensor:
        ctx.save_for_backward(hidden_KD)
        ctx.product = product
        return nn.functional.linear(hidden_KD, product.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_KV,), (hidden_KD,), product = grads, ctx.saved_tensors, ctx.product
        grad_KV = grad_KV.flatten(0, -2)
        added_VD = _multiply(grad_KV.T, hidden_KD.flatten(0, -2))
        product.gradient = added_VD if product.gradient is None else product.gradient.add_(added_VD)
        grad_ticket = torch.zeros((), device=grad_KV.device)
        return (grad_KV @ product.weight).view_as(hidden_KD), grad_ticket, None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, with a result in float32 at least."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
