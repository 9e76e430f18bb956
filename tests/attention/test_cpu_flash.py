"""Attention of packed rows by kernels in C++, against dense attention in float64 over the same numbers."""

import pytest
import torch

from grpo_trl.attention import cpu_flash, flash
from grpo_trl.attention.flash import flash_attention
from grpo_trl.attention.layout import Layout
from grpo_trl.attention.shared_prefix import dense_attention

from .test_shared_prefix import LAYOUT, LAYOUTS, tensors


HEADS = {
    "own keys": (2, 2, 16, 16),
    "shared keys": (6, 2, 16, 16),
    "one key head": (3, 1, 48, 48),
    "smaller values": (4, 2, 48, 32),
    "larger values": (2, 1, 16, 64),
}
HEAD = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


@pytest.fixture
def calls(monkeypatch):
    """The passes that the kernels computed."""
    if cpu_flash._kernels() is None:
        pytest.skip("needs g++")
    calls = []
    for name in ("forward", "backward"):
        right = getattr(cpu_flash, name)
        monkeypatch.setattr(cpu_flash, name, lambda *args, n=name, f=right: calls.append(n) or f(*args))
    return calls


def assert_dense(layout, inputs, grad, scaling=0.3, within=2e-5):
    """The output and all gradients, relative to their largest."""
    output = flash_attention(*inputs, layout, scaling)
    output.backward(grad)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_attention(*doubles, layout, scaling)
    expected.backward(grad.double())
    pairs = [(output, expected), *((x.grad, y.grad) for x, y in zip(inputs, doubles, strict=True))]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).abs().max() <= within * theirs.abs().max().clamp(min=1)


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


@LAYOUT
@HEAD
def test_output_and_gradients_are_those_of_dense_attention(layout, heads, calls):
    assert_dense(layout, *tensors(layout, heads, torch.float32))
    assert calls == ["forward", "backward"]


@LAYOUT
@HEAD
def test_tokens_that_nobody_reads_are_left_0_and_the_others_stay_as_they_are(layout, heads, calls, nan_in_new_memory):
    inputs, grad = tensors(layout, heads, torch.float32)
    unread = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for group in layout.groups:
        unread[group.prompt.start : group.prompt.stop - 1] = True
    grad[:, :, unread] = 0
    results = []
    for one in (layout, layout.read):
        given = [x.detach().requires_grad_() for x in inputs]
        output = flash_attention(*given, one, 0.3)
        output.backward(grad)
        results.append([output[:, :, ~unread], *(x.grad for x in given)])
    assert not output[:, :, unread].any()
    assert all(x.isfinite().all() for result in results for x in result)
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_scores_far_apart_are_as_good(factor, calls):
    layout = LAYOUTS["more than a block of keys"]
    (query, key, value), grad = tensors(layout, HEADS["shared keys"], torch.float32)
    assert_dense(layout, [(query * factor).detach().requires_grad_(), key, value], grad, within=2e-4)


def test_tensors_of_any_stride_have_their_gradients(calls):
    """Models make heads by transposing, and values by slicing what one product gives."""
    layout = LAYOUTS["several groups"]
    (query, key, value), grad = tensors(layout, HEADS["shared keys"], torch.float32)
    packed = torch.cat([x.detach().transpose(1, 2).flatten(2) for x in (query, key, value)], dim=-1)
    parts = packed.split([96, 32, 32], dim=-1)
    views = [x.unflatten(-1, (-1, 16)).transpose(1, 2).requires_grad_() for x in parts]
    turned = grad.transpose(2, 3).contiguous().transpose(2, 3)
    assert_dense(layout, views, turned)
    ones = torch.ones(1, 1, 1, 1).expand_as(grad)
    for x in views:
        x.grad = None
    assert_dense(layout, views, ones)


def test_gradients_do_not_depend_on_the_number_of_threads(calls):
    layout, threads, found = LAYOUTS["more than a block of keys"], torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            inputs, grad = tensors(layout, HEADS["shared keys"], torch.float32)
            flash_attention(*inputs, layout, 0.3).backward(grad)
            found.append([x.grad for x in inputs])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_numbers_that_are_not_finite_stay_so(calls):
    layout = Layout.of([(3, [2])])
    (query, key, value), _ = tensors(layout, HEADS["own keys"], torch.float32)
    with torch.no_grad():
        query[0, 0, 4] = torch.nan
    output = flash_attention(query, key, value, layout, 0.3)
    assert output[0, 0, 4].isnan().all()
    assert output[0, 0, :4].isfinite().all()


@pytest.mark.parametrize(
    "dtype, size, serves", [(torch.float32, 32, True), (torch.float64, 32, False), (torch.float32, 24, False)], ids=str
)
def test_kernels_are_for_float32_and_sizes_of_whole_vectors(dtype, size, serves, calls):
    assert cpu_flash.serves(torch.zeros(1, 1, 2, size, dtype=dtype)) == serves


def test_without_a_compiler_torchs_kernels_serve(monkeypatch):
    monkeypatch.setattr(cpu_flash, "_kernels", lambda: None)
    assert flash._passes(torch.zeros(1, 1, 2, 32)) == (flash._cpu_forward, flash._cpu_backward)
    layout = LAYOUTS["several groups"]
    assert_dense(layout, *tensors(layout, HEADS["shared keys"], torch.float32))
