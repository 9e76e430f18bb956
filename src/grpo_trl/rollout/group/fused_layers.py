"""Decoder layers of the Llama family with few launches, for decoding steps.

A layer of transformers takes about fifty launches for one token of each row. Here one product gives query, key and value
and one gate and up, and kernels compute all that stands between two products, in Triton on a GPU; on a CPU a layer is one
call, in C++. Where there are neither, torch computes it. Weights are joined once per rollout, with adapters merged
into them. Prompts are prefilled by transformers' own forwards, from which the cache knows the scale, window and soft cap
of their attention.

Served are the layers of `LLAMA_FAMILIES`; every other one computes as it does. The engine compares with plain forwards
before its first rollout, whichever way its layers take.

Axes: R running rows, H query heads, K key-value heads, D head size, C hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...model_utils import llama_layers, product_dtype, replaced
from ...plan import LAID_OUT_SHARE
from . import cpu_kernels
from .cache import GroupCache, kernels_for
from .cpu_kernels import modules
from .norms import HeadNorms, Norm
from .step import Step


PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}


@contextlib.contextmanager
def laid_out(model: nn.Module, free_bytes: float) -> Iterator[None]:
    """Inside, `model` computes decoding steps with weights that are laid out for them, which must not change."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1)
    if size > LAID_OUT_SHARE * free_bytes:
        yield
        return
    layers = [layer for layer in llama_layers(model) if _is_served(layer)]
    fused = {inner for layer in layers for inner in layer.modules()}
    with modules.served(module for module in model.modules() if module not in fused), contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(vars(layer), "forward", _fused(layer)))
        yield


def _is_served(layer: nn.Module) -> bool:
    if "forward" in vars(layer):
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


class Product(NamedTuple):
    """Of inputs with a weight of shape (outputs, inputs)."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        self._activation = _activation(layer)
        self._head_size = attention.head_dim
        self._heads = _effective(attention.o_proj)[0].shape[1] // self._head_size  # type: ignore[index]
        # where norms stand: before attention and products, after them, or both
        after = hasattr(layer, "post_feedforward_layernorm")
        self._before_attention = _norm(layer, "input_layernorm")
        self._after_attention = _norm(layer, "post_attention_layernorm") if after else None
        self._before_mlp = _norm(layer, "pre_feedforward_layernorm" if after else "post_attention_layernorm")
        self._after_mlp = _norm(layer, "post_feedforward_layernorm")
        self._head_norms = HeadNorms.of(attention)
        self._scale = getattr(layer, "residual_multiplier", 1.0)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = kwargs.get("group_cache")
        if cache is None or not isinstance(cache.now, Step):
            return self._forward(hidden_states, *args, **kwargs)
        return self._step(hidden_states, cache, cache.now.rotation(*kwargs["position_embeddings"]))

    def _step(self, hidden_R1C: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return self._computed(hidden_R1C[:, 0], cache, rotation)[:, None]

    def _computed(self, hidden_RC: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        attended_RC = self._attend(_normed(self._before_attention, hidden_RC), cache, rotation)
        hidden_RC = self._added(hidden_RC, _normed(self._after_attention, attended_RC))
        gate, up = self._gate_up(_normed(self._before_mlp, hidden_RC)).chunk(2, dim=-1)
        return self._added(hidden_RC, _normed(self._after_mlp, self._down(self._activation(gate) * up)))

    def _attend(self, hidden_RC: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        parts_RND = self._qkv(hidden_RC).unflatten(-1, (-1, self._head_size))  # queries, keys, values
        values = (parts_RND.shape[1] - self._heads) // 2
        turned = parts_RND[:, :-values]
        if self._head_norms is not None:
            turned = self._head_norms(turned, self._heads)
        turned = _rotated(turned, *rotation)
        parts_RND[:, :-values] = turned
        attended = cache.attend_step(
            self._attention, parts_RND[:, : self._heads], parts_RND[:, self._heads :].flatten(1)
        )
        return self._output(attended)

    def _added(self, hidden_RC: Tensor, change_RC: Tensor) -> Tensor:
        return hidden_RC + change_RC if self._scale == 1 else torch.add(hidden_RC, change_RC, alpha=self._scale)


class KernelLayer(FusedLayer):
    """With one or two launches for all that stands between two products, in Triton; see `kernels`."""

    def __init__(self, layer: Any, kernels: Any):
        super().__init__(layer)
        self._kernels = kernels
        self._dtype = product_dtype(layer.self_attn.o_proj.weight)
        self._gate = kernels.ACTIVATIONS[type(self._activation).__name__]

    def _computed(self, hidden_RC: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        _, normed_RC = self._add_and_norm(hidden_RC, None, None, self._before_attention)
        attended_RC = self._attend(normed_RC, cache, rotation)
        hidden_RC, normed_RC = self._add_and_norm(hidden_RC, attended_RC, self._after_attention, self._before_mlp)
        changed_RC = self._down(self._kernels.gated(self._gate_up(normed_RC), self._gate))
        return self._add_and_norm(hidden_RC, changed_RC, self._after_mlp, None)[0]

    def _add_and_norm(
        self, hidden_RC: Tensor, change_RC: Tensor | None, after: Norm | None, before: Norm | None
    ) -> tuple[Tensor, Tensor]:
        added: tuple[Tensor, Tensor] = self._kernels.add_and_norm(
            hidden_RC, change_RC, after, before, self._scale, self._dtype
        )
        return added

    def _attend(self, hidden_RC: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        product_RE, norms = self._qkv(hidden_RC), self._head_norms
        if norms is not None and norms.whole:
            turned = product_RE.unflatten(-1, (-1, self._head_size))[
                :, : (self._heads + product_RE.shape[1] // self._head_size) // 2
            ]
            turned.copy_(norms(turned, self._heads))
            norms = None
        memory, step = cache.of_layer(self._attention), cache.now
        assert isinstance(step, Step)
        lines_R = step.lines(memory.own.shape[1])
        query_RHD = self._kernels.rotate_and_store(
            product_RE, memory.own, lines_R, self._heads, self._head_size, rotation, norms
        )
        return self._output(self._kernels.attend(query_RHD, memory, step))


class CompiledLayer(FusedLayer):
    """In one call, in C++ on a CPU; see `cpu_kernels`."""

    def __init__(self, layer: Any):
        super().__init__(layer)
        self._weights = cpu_kernels.Weights(
            *map(cpu_kernels.Norm.of, self._norms()),
            *map(cpu_kernels.Linear.of, (self._qkv, self._output, self._gate_up, self._down)),
            self._heads,
            self._head_norms is not None and self._head_norms.whole,
            cpu_kernels.ACTIVATIONS[type(self._activation).__name__],
            self._scale,
        )

    def _norms(self) -> list[Norm | None]:
        heads = self._head_norms
        return [
            self._before_attention,
            heads.query if heads else None,
            heads.key if heads else None,
            self._after_attention,
            self._before_mlp,
            self._after_mlp,
        ]

    def _step(self, hidden_R1C: Tensor, cache: GroupCache, rotation: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(cache.now, Step)
        if not hidden_R1C.dtype == rotation[0].dtype == torch.float32:  # of embeddings in another precision
            return super()._step(hidden_R1C, cache, rotation)
        return cpu_kernels.layer(hidden_R1C, self._weights, cache.of_layer(self._attention), cache.now, rotation)


def _fused(layer: Any) -> FusedLayer:
    """With kernels where they work and know the activation; those of a CPU compute in one precision."""
    weight = layer.self_attn.o_proj.weight
    dtype, device = product_dtype(weight), weight.device.type
    kernels = kernels_for(device, dtype)
    if kernels is None or type(_activation(layer)).__name__ not in kernels.ACTIVATIONS:
        return FusedLayer(layer)
    if kernels is not cpu_kernels:
        return KernelLayer(layer, kernels)
    mixed = any(p.dtype != dtype for p in layer.parameters())
    return FusedLayer(layer) if mixed else CompiledLayer(layer)


def _activation(layer: Any) -> Any:
    return layer.mlp.activation_fn if hasattr(layer.mlp, "activation_fn") else layer.mlp.act_fn


def _joined(modules: list[nn.Module]) -> Product:
    """One product for all of `modules`, whose outputs stand one behind the other."""
    weights, biases = zip(*(_effective(module) for module in modules), strict=True)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    weight = weight.to(product_dtype(weight))  # else autocast would, at every step, as they need no gradient
    if all(bias is None for bias in biases):
        return Product(weight, None)
    filled = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
    return Product(weight, torch.cat(filled).to(weight.dtype))


def _norm(layer: Any, name: str) -> Norm | None:
    return Norm.of(getattr(layer, name)) if hasattr(layer, name) else None


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotated(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
    """Rotary position embedding of the first `cos_R1D.shape[-1]` components; see `Step.rotation`."""
    size = cos_R1D.shape[-1]
    turned = x_RND[..., :size]
    turned = torch.addcmul(turned * cos_R1D, turned.roll(size // 2, -1), sin_R1D)
    return turned if size == x_RND.shape[-1] else torch.cat([turned, x_RND[..., size:]], dim=-1)
