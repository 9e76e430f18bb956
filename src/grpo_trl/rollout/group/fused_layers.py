"""Decoder layers of the Llama family with few launches, for decoding steps.

A layer of transformers takes about fifty launches for one token of each row. Here it takes half of them: one product for
query, key and value and one for gate and up; keys and values rotated and stored together; one kernel per norm. Weights
are laid out once per rollout, with adapters merged into them. Prompts are prefilled by transformers' own forwards, from
which the cache knows the scale, window and soft cap of their attention.

Served are the layers of `FAMILIES`; every other one computes as it does. The engine compares with plain forwards before its
first rollout, whichever way its layers take.

Axes: R running rows, H query heads, K key-value heads, D head size, C hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ...plan import LAID_OUT_SHARE
from .cpu_linear import lay_out, packed_linears
from .step import Step


FAMILIES = ("Gemma2", "Gemma3", "Granite", "Llama", "Mistral", "Olmo2", "Phi3", "Qwen2", "Qwen3")
PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}
Linear = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def laid_out(model: nn.Module, free_bytes: float) -> Iterator[None]:
    """Inside, `model` computes decoding steps with weights that are laid out for them, which must not change."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1)
    if size > LAID_OUT_SHARE * free_bytes:
        yield
        return
    layers = [module for module in model.modules() if _is_served(module)]
    fused = {inner for layer in layers for inner in layer.modules()}
    with packed_linears(module for module in model.modules() if module not in fused):
        try:
            for layer in layers:
                layer.forward = FusedLayer(layer)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _is_served(layer: nn.Module) -> bool:
    if type(layer).__name__ not in {f"{family}DecoderLayer" for family in FAMILIES} or "forward" in vars(layer):
        return False
    inner = [module for module in layer.modules() if module is not layer]
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in inner):
        return False
    parts = [
        module
        for part, names in PARTS.items()
        for name, module in getattr(layer, part).named_children()
        if name in names
    ]
    return all(_effective(module) is not None for module in parts)


def _effective(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer with its adapters merged; None if it is of another kind."""
    if type(module) is nn.Linear:
        return module.weight.detach(), module.bias
    base: Any = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "get_delta_weight") or getattr(module, "lora_variant", None):
        return None
    weight = base.weight.detach()
    if not (module.merged or module.disable_adapters):
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                if module.lora_B[adapter].bias is not None:
                    return None
                weight = weight + module.get_delta_weight(adapter).detach().to(weight.dtype)
    return weight, base.bias


class FusedLayer:
    """The forward of a decoder layer."""

    def __init__(self, layer: Any):
        self._forward = layer.forward
        self._attention = attention = layer.self_attn
        mlp = layer.mlp
        packed = hasattr(attention, "qkv_proj")
        self._qkv = _joined([attention.qkv_proj] if packed else [attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = _joined([attention.o_proj])
        self._gate_up = _joined([mlp.gate_up_proj] if packed else [mlp.gate_proj, mlp.up_proj])
        self._down = _joined([mlp.down_proj])
        self._activation = mlp.activation_fn if packed else mlp.act_fn
        self._head_size = attention.head_dim
        self._heads = _output_features(attention, "o_proj") // self._head_size
        # where norms stand: before attention and products, after them, or both
        after = hasattr(layer, "post_feedforward_layernorm")
        self._before_attention = _norm(getattr(layer, "input_layernorm", None))
        self._after_attention = _norm(layer.post_attention_layernorm if after else None)
        self._before_mlp = _norm(
            getattr(layer, "pre_feedforward_layernorm", None) if after else layer.post_attention_layernorm
        )
        self._after_mlp = _norm(layer.post_feedforward_layernorm if after else None)
        self._norm_heads = _head_norm(attention, self._heads)
        self._scale = getattr(layer, "residual_multiplier", 1.0)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = kwargs.get("group_cache")
        if cache is None or not isinstance(cache.now, Step):
            return self._forward(hidden_states, *args, **kwargs)
        hidden_RC = hidden_states[:, 0]
        attended_RC = self._attend(self._before_attention(hidden_RC), cache, *kwargs["position_embeddings"])
        hidden_RC = self._added(hidden_RC, self._after_attention(attended_RC))
        gate_up = self._gate_up(self._before_mlp(hidden_RC))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden_RC = self._added(hidden_RC, self._after_mlp(self._down(self._activation(gate) * up)))
        return hidden_RC[:, None]

    def _attend(self, hidden_RC: Tensor, cache: Any, cos: Tensor, sin: Tensor) -> Tensor:
        parts_RND = self._qkv(hidden_RC).unflatten(-1, (-1, self._head_size))  # queries, keys, values
        values = (parts_RND.shape[1] - self._heads) // 2
        turned = parts_RND[:, :-values]
        if self._norm_heads is not None:
            turned = self._norm_heads(turned)
        turned = _rotated(turned, *cache.now.rotation(cos, sin))
        parts_RND[:, :-values] = turned
        attended = cache.attend_step(
            self._attention, parts_RND[:, : self._heads], parts_RND[:, self._heads :].flatten(1)
        )
        return self._output(attended)

    def _added(self, hidden_RC: Tensor, change_RC: Tensor) -> Tensor:
        return hidden_RC + change_RC if self._scale == 1 else torch.add(hidden_RC, change_RC, alpha=self._scale)


def _joined(modules: list[nn.Module]) -> Linear:
    """One product for all of `modules`, whose outputs stand one behind the other."""
    weights, biases = zip(*(_effective(module) for module in modules), strict=True)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if torch.is_autocast_enabled(weight.device.type):  # which would cast weights that need no gradient at every step
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    if all(bias is None for bias in biases):
        return lay_out(weight, None)
    filled = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
    return lay_out(weight, torch.cat(filled).to(weight.dtype))


def _output_features(attention: Any, name: str) -> int:
    effective = _effective(getattr(attention, name))
    assert effective is not None
    return effective[0].shape[1]


def _norm(module: Any) -> Norm:
    if module is None:
        return lambda x: x
    weight, eps = _norm_parameters(module)
    shape = tuple(weight.shape)
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        return _norm_on_cpu(weight, eps)
    if weight.dtype == module.weight.dtype:
        return lambda x: rms_norm(x, shape, weight.to(x.dtype), eps)
    return lambda x: rms_norm(x.to(weight.dtype), shape, weight, eps).to(x.dtype)


def _norm_on_cpu(weight: Tensor, eps: float) -> Norm:
    """RMSNorm in half of the launches that torch's composite takes."""
    added = weight.new_tensor(eps)

    def norm(x: Tensor) -> Tensor:
        wide = x.to(weight.dtype)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(added, length, length, value=1 / len(weight)).rsqrt_()
        return scale.mul(wide).mul_(weight).to(x.dtype)

    return norm


def _norm_parameters(module: Any) -> tuple[Tensor, float]:
    """A norm's weight and what is added to the mean square; Gemma's weights count from 1, in float32 at least."""
    if type(module).__name__.startswith("Gemma"):
        weight = module.weight.detach()
        return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32)), module.eps
    return module.weight.detach(), module.variance_epsilon


def _head_norm(attention: Any, heads: int) -> Norm | None:
    """Of queries and keys, of shape (R, H + K, D): of each head, or of all queries and of all keys."""
    if not hasattr(attention, "q_norm"):
        return None
    query_norm, key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    whole = attention.q_norm.weight.shape[0] != attention.head_dim

    def normed(norm: Norm, x: Tensor) -> Tensor:
        return norm(x.flatten(1)).view_as(x) if whole else norm(x)

    return lambda x: torch.cat([normed(query_norm, x[:, :heads]), normed(key_norm, x[:, heads:])], dim=1)


def _rotated(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
    """Rotary position embedding of the first `cos_R1D.shape[-1]` components; see `Step.rotation`."""
    size = cos_R1D.shape[-1]
    turned = x_RND[..., :size]
    turned = torch.addcmul(turned * cos_R1D, turned.roll(size // 2, -1), sin_R1D)
    return turned if size == x_RND.shape[-1] else torch.cat([turned, x_RND[..., size:]], dim=-1)
