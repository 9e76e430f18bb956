import pytest
import torch
from torch import nn

from grpo_trl.rollout.group.cpu_kernels import compiled
from grpo_trl.rollout.group.cpu_kernels.modules import served
from tests.helpers.families import make_family
from tests.helpers.models import make_model


pytestmark = pytest.mark.skipif(compiled() is None, reason="needs g++")


def forwards(model):
    return {name: "forward" in vars(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 300])
@pytest.mark.parametrize("inputs, outputs", [(24, 40), (16, 3), (37, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_served_layers_compute_the_same(rows, inputs, outputs, bias):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    x = torch.randn(rows, 3, inputs)
    with served([layer]):
        assert forwards(layer) == {"": True}
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert forwards(layer) == {"": False}


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "olmo2"])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_the_last_norm_of_a_model_computes_the_same(family, rows):
    norm = make_family(family, hidden_size=36).float().model.norm.requires_grad_(False)
    x = 3 * torch.randn(rows, 2, 36, generator=torch.Generator().manual_seed(0))
    expected, exact = norm(x), norm(x.double())
    with served([norm]):
        assert "forward" in vars(norm)
        assert torch.allclose(norm(x), expected, atol=1e-5)
        assert torch.equal(norm(x.double()), exact)
    assert "forward" not in vars(norm)


def test_long_sums_are_as_good_as_torchs():
    torch.manual_seed(0)
    layer, x = nn.Linear(5000, 8, bias=False).requires_grad_(False), torch.randn(16, 5000)
    exact = x.double() @ layer.weight.double().T
    theirs = (layer(x).double() - exact).square().mean().sqrt()
    with served([layer]):
        mine = (layer(x).double() - exact).square().mean().sqrt()
    assert mine < 2 * theirs


def test_inputs_that_a_layer_does_not_take_are_torchs_error():
    layer = nn.Linear(8, 4)
    with served([layer]), pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 6))


def test_layers_are_as_they_were_after_an_exception():
    model = make_model()
    with pytest.raises(RuntimeError, match="stop"), served(model.modules()):
        raise RuntimeError("stop")
    assert not any(forwards(model).values())


def test_weights_that_change_between_two_uses_are_read_again():
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(2, 8)
    for _ in range(2):
        with served([layer]):
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        layer.weight.add_(1.0)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_only_plain_layers_in_float32_are_served():
    own, hooked = OwnLinear(4, 4), nn.Linear(4, 4)
    hooked.forward = lambda x: x  # as accelerate's hooks set it
    layers = [nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16(), own, hooked]
    before = [layer.forward for layer in layers]
    plain = nn.Linear(4, 4)
    with served([*layers, plain]):
        assert [layer.forward for layer in layers] == before
        assert forwards(plain) == {"": True}
    assert hooked.forward is before[3]


def test_nothing_is_served_under_autocast():
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), served([layer]):
        assert forwards(layer) == {"": False}
