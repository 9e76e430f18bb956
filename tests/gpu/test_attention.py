"""Attention of packed rows by the GPU's kernels, against dense attention in float64 over the same numbers."""

import pytest
import torch

from grpo_trl.attention.flash import flash_attention, has_flash
from grpo_trl.attention.layout import Layout
from grpo_trl.attention.shared_prefix import blocked_attention, dense_attention


LAYOUTS = {
    "ragged": Layout.of([(130, [64, 1, 200, 0, 17]), (7, [129]), (300, []), (1, [3, 3]), (65, [0, 0])]),
    "long prompt": Layout.of([(1000, [5, 70, 128, 31, 1, 9, 260, 63])]),
    "one token": Layout.of([(1, [])]),
}
HEADS = {
    "64, grouped": (14, 2, 64, 64),
    "80": (4, 4, 80, 80),
    "128, grouped": (28, 4, 128, 128),
    "256, one key head": (4, 1, 256, 256),
    "values smaller than keys": (4, 4, 192, 128),
    "not a multiple of 8": (4, 2, 60, 60),
}
"""Query heads, key heads, head size, and that of the values."""
WITHIN = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of the norm: three roundings of the format."""


def evaluate(attention, inputs, grad, layout, *args):
    """Output, and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attention(*leaves, Layout(layout.groups), leaves[0].shape[-1] ** -0.5, *args)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def errors(attention, layout, heads, dtype, *args):
    """Of output and gradients: the norm of the difference over that of the reference."""
    num_heads, key_heads, size, value_size = heads
    generator = torch.Generator("cuda").manual_seed(0)

    def sample(rows, columns):
        shape = 1, layout.num_tokens, rows, columns
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    inputs = sample(num_heads, size), sample(key_heads, size), sample(key_heads, value_size)
    grad = sample(num_heads, value_size)
    actual = evaluate(attention, inputs, grad, layout, *args)
    expected = evaluate(dense_attention, [x.double() for x in inputs], grad.double(), layout, *args)
    return [
        ((mine.double() - other).norm() / other.norm().clamp(min=1e-30)).item()
        for mine, other in zip(actual, expected, strict=True)
        if mine.shape == other.shape and other.norm() > 0
    ]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_and_its_gradients_are_those_of_dense_attention(layout, heads, dtype):
    assert has_flash(torch.empty(1, 1, 1, heads[2], dtype=dtype, device="cuda"))
    found = errors(flash_attention, layout, heads, dtype)
    assert max(found) < WITHIN[dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window, softcap", [(None, None), (40, None), (None, 2.0), (300, 2.0)])
def test_blocked_attention_and_its_gradients_are_those_of_dense_attention(window, softcap, dtype):
    found = errors(blocked_attention, LAYOUTS["ragged"], HEADS["64, grouped"], dtype, window, softcap)
    assert max(found) < WITHIN[dtype], found
