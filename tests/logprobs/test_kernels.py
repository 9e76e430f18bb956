"""Kernels of logprobs, on a GPU or in Triton's interpreter (`TRITON_INTERPRET=1`)."""

import contextlib

import pytest
import torch

from grpo_trl.gpu_kernels import triton_works
from grpo_trl.logprobs import head
from grpo_trl.logprobs.compute import compute_logprobs
from grpo_trl.logprobs.head import enable_logprobs, token_logprobs
from grpo_trl.logprobs.packing import Packer
from tests.helpers.families import make_completions, make_family


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not triton_works(DEVICE, torch.float32), reason="needs Triton and a GPU or TRITON_INTERPRET=1"
)


def expected(logits, targets, temperature, grads):
    """In float64."""
    logits = logits.detach().double().requires_grad_()
    log_probs = (logits / temperature).log_softmax(-1)
    logps = log_probs.gather(1, targets[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e300)).sum(-1)
    (logps * grads[0] + entropy * grads[1]).sum().backward()
    return logps, entropy, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary, entropy_gradient", [(7, True), (5000, False), (9000, True)])
def test_logprobs_and_their_gradients_are_those_of_plain_formulas(vocabulary, temperature, dtype, entropy_gradient):
    torch.manual_seed(0)
    logits = (torch.randn(5, vocabulary, device=DEVICE) * 4 + 30).to(dtype)
    logits[1, 2] = -torch.inf
    logits[3] *= 3  # nearly certain
    logits.requires_grad_()
    targets = torch.randint(3, vocabulary, (5,), device=DEVICE)
    grads = torch.randn(2, 5, device=DEVICE)
    logps, entropy = token_logprobs(logits, targets, temperature, entropy_gradient)
    assert entropy.requires_grad == entropy_gradient
    (logps * grads[0] + entropy * grads[1]).sum().backward()
    if not entropy_gradient:
        grads[1] = 0
    exact = expected(logits, targets, temperature, grads)
    assert torch.allclose(logps.double(), exact[0], atol=1e-5, rtol=1e-6)
    assert torch.allclose(entropy.double(), exact[1], atol=1e-5, rtol=1e-5)
    assert torch.allclose(logits.grad.double(), exact[2], atol=2e-5, rtol=4 * torch.finfo(dtype).eps)


def test_what_is_not_finite_shows():
    logits = torch.zeros(3, 20, device=DEVICE)
    logits[0, 3], logits[1, 3] = torch.nan, torch.inf
    logps, entropy = token_logprobs(logits, torch.tensor([5, 5, 5], device=DEVICE), 1.0, False)
    assert logps.isfinite().tolist() == entropy.isfinite().tolist() == [False, False, True]


def test_targets_may_lie_apart_in_memory():
    logits = torch.randn(4, 20, device=DEVICE)
    targets = torch.arange(8, device=DEVICE)[::2]
    logps, _ = token_logprobs(logits, targets, 1.0, False)
    assert torch.allclose(logps, logits.log_softmax(-1)[range(4), targets], atol=1e-6)


def test_no_positions_have_no_logprobs():
    logits = torch.randn(0, 20, device=DEVICE, requires_grad=True)
    logps, entropy = token_logprobs(logits, torch.zeros(0, dtype=torch.long, device=DEVICE), 1.0, True)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 20)


def test_a_second_derivative_is_refused():
    """It would be taken for 0."""
    logits = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    logps, _ = token_logprobs(logits, torch.arange(3, device=DEVICE), 1.0, False)
    (grad,) = torch.autograd.grad(logps.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_kernels_are_launched_on_the_device_of_the_logits(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: devices.append(tensor) or contextlib.nullcontext())
    logits = torch.randn(3, 20, device=DEVICE)
    token_logprobs(logits, torch.arange(3, device=DEVICE), 1.0, False)
    assert [device.data_ptr() for device in devices] == [logits.data_ptr()]


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_of_a_model_are_those_of_torchs_own_operations(entropy_gradient, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *of: 5)  # several slices
    model = make_family("gemma2", attn_implementation="eager").to(DEVICE)
    enable_logprobs(model)
    batch = Packer(10**6, None, 0, DEVICE).micro_batch(make_completions([(9, [4, 6, 1]), (3, [2, 5])]), 1)

    def gradients():
        model.zero_grad()
        found = compute_logprobs(model, batch, 0.8, entropy_gradient=entropy_gradient)
        loss = found.logps_BT.sum() + (found.entropy_BT.sum() if entropy_gradient else 0.0)
        loss.backward()
        return [found.logps_BT.detach(), found.entropy_BT.detach(), *(p.grad for p in model.parameters())]

    mine = gradients()
    monkeypatch.setattr(head, "triton_works", lambda *of: False)
    for one, other in zip(mine, gradients(), strict=True):
        assert torch.allclose(one, other, atol=2e-5, rtol=1e-4)
