import psutil
import pytest
import torch
from torch import nn

from grpo_trl.rollout.group import cpu_linear as weights
from grpo_trl.rollout.group.cpu_linear import packed_weights
from tests.helpers.models import make_model


class Free:
    def __init__(self, available):
        self.available = available


def kinds(model):
    return {name: type(m.forward).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_packed_layers_compute_the_same(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16, bias=False)).requires_grad_(False)
    x = torch.randn(rows, 3, 24)
    expected = model(x)
    with packed_weights(model):
        assert set(kinds(model).values()) == {"_Packed"}
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert set(kinds(model).values()) == {"method"}


def test_layers_are_as_they_were_after_an_exception():
    model = make_model()
    with pytest.raises(RuntimeError, match="stop"), packed_weights(model):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_that_change_between_two_uses_are_read_anew():
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(2, 8)
    for _ in range(2):
        with packed_weights(layer):
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        layer.weight.add_(1.0)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_only_plain_layers_in_float32_are_packed(monkeypatch):
    own, hooked = OwnLinear(4, 4), nn.Linear(4, 4)
    hooked.forward = lambda x: x  # as accelerate's hooks set it
    layers = [nn.Linear(4, 4).double(), nn.Linear(4, 4).bfloat16(), own, hooked]
    model = nn.ModuleList([*layers, nn.Linear(4, 4)])
    before = [layer.forward for layer in layers]
    with packed_weights(model):
        assert [layer.forward for layer in layers] == before
        assert type(model[4].forward).__name__ == "_Packed"
    assert hooked.forward is before[3]


def test_nothing_is_packed_under_autocast_or_where_memory_is_short(monkeypatch):
    model = nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_weights(model):
        assert kinds(model) == {"": "method"}
    size = model.weight.numel() * 4
    for free, kind in ((size / weights.FREE_SHARE - 100, "method"), (size / weights.FREE_SHARE + 100, "_Packed")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: Free(free))
        with packed_weights(model):
            assert kinds(model) == {"": kind}
