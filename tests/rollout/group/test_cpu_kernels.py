"""When kernels in C++ decode; what they compute is in `test_kernels`."""

import pytest
import torch

from grpo_trl.rollout.group import cache, cpu_kernels, fused_layers
from tests.helpers.families import make_family


def test_they_serve_in_float32_on_a_cpu_where_they_can_be_compiled(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "compiled", object)
    assert cache.kernels_for("cpu", torch.float32) is cpu_kernels
    assert cache.kernels_for("cpu", torch.bfloat16) is None
    assert cache.kernels_for("cpu", torch.float64) is None
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: None)
    assert cache.kernels_for("cpu", torch.float32) is None


@pytest.mark.skipif(cpu_kernels.compiled() is None, reason="needs g++")
def test_layers_of_mixed_precision_are_left_to_torch():
    layer = make_family("qwen3").model.layers[0]
    assert type(fused_layers._fused(layer)) is fused_layers.CompiledLayer
    layer.input_layernorm.bfloat16()
    assert type(fused_layers._fused(layer)) is fused_layers.FusedLayer
