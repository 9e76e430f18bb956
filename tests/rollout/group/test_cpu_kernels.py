"""When kernels in C++ decode; what they compute is in `test_kernels`."""

from types import SimpleNamespace

import pytest
import torch

from grpo_trl.rollout.group import cache, cpu_kernels, fused_layers
from grpo_trl.rollout.group.step import Step
from tests.helpers.families import make_family


def test_they_serve_in_float32_on_a_cpu_where_they_can_be_compiled(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "compiled", object)
    assert cache.kernels_for("cpu", torch.float32) is cpu_kernels
    assert cache.kernels_for("cpu", torch.bfloat16) is None
    assert cache.kernels_for("cpu", torch.float64) is None
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: None)
    assert cache.kernels_for("cpu", torch.float32) is None


needs_compiler = pytest.mark.skipif(cpu_kernels.compiled() is None, reason="needs g++")


@needs_compiler
def test_hidden_states_of_another_precision_are_left_to_torch():
    model = make_family("qwen3")
    model.model.embed_tokens.bfloat16()
    model.lm_head.bfloat16()
    layer, calls = fused_layers.CompiledLayer(model.model.layers[0]), []
    hidden, rotation = torch.zeros(1, 16), (torch.zeros(1, 1, 8),) * 2
    cache = SimpleNamespace(now=object.__new__(Step), of_layer=lambda module: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layers.FusedLayer, "_step", lambda *args: calls.append("torch"))
        patch.setattr(cpu_kernels, "layer", lambda *args: calls.append("compiled"))
        layer._step(hidden, cache, rotation)
        layer._step(hidden.bfloat16(), cache, rotation)
        layer._step(hidden, cache, (rotation[0].bfloat16(),) * 2)
    assert calls == ["compiled", "torch", "torch"]


@needs_compiler
def test_layers_of_mixed_precision_are_left_to_torch():
    layer = make_family("qwen3").model.layers[0]
    assert type(fused_layers._fused(layer)) is fused_layers.CompiledLayer
    layer.input_layernorm.bfloat16()
    assert type(fused_layers._fused(layer)) is fused_layers.FusedLayer
