"""Keys and values of prompts and completions in decoding, and the attention over them.

A prompt's keys and values are held once and serve all of its completions: the rows of a prompt are the queries of one
product with them. A row's own keys and values stand in a slot of preallocated memory. The two parts' outputs are merged
by their log-sum-exps, as in packed rows of the update.

Axes: R rows in flight, N prompts in flight, G most rows of a prompt, H query heads, K key-value heads, Q query heads per
key-value head, D head size, S prompt tokens, T completion tokens, L queries of a part.
"""

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...attention.flash import merge_parts
from ...attention.layout import Layout
from ...attention.shared_prefix import shared_prefix_attention
from ...gpu_kernels import triton_works
from . import cpu_kernels
from .step import LayerMemory, Prefill, Step


NAME = "grpo_trl_group_cache"
_aten = torch.ops.aten


@dataclass
class GroupCache:
    """Memory for decoding, allocated layer by layer at the first prefill and never grown.

    Rows and prompts in flight have the first slots of theirs, without holes; who frees one moves another one there.
    """

    max_rows: int
    max_prompts: int
    max_prompt_tokens: int
    max_completion_tokens: int
    now: Prefill | Step | None = None
    """What the forward that is running computes."""
    _layers: dict[nn.Module, LayerMemory] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers; known after the first prefill."""
        return sum(x.own.shape[2] * x.own.element_size() for x in self._layers.values())

    @property
    def reads_by_length(self) -> bool:
        """Whether a step reads no more keys than there are, so that its shapes may be those of the memory."""
        return any(kernels_for(x.own.device.type, x.own.dtype) is not None for x in self._layers.values())

    def move_row(self, source: int, target: int, length: int) -> None:
        for layer in self._layers.values():
            layer.own[target, :length] = layer.own[source, :length]

    def move_prompt(self, source: int, target: int, length: int) -> None:
        for layer in self._layers.values():
            layer.prompts[target, :length] = layer.prompts[source, :length]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Store keys and values, and attend over all that each query sees; `layout` is that of prompts.

        Returns:
            Of shape (as the query's rows, tokens, H, D of the values).
        """
        if isinstance(self.now, Prefill):
            if module not in self._layers:
                self._layers[module] = self._allocate(key, value, scaling, window, softcap)
            assert layout is not None
            self._store_prompts(self._layers[module], self.now.slots, layout, key, value)
            output, _ = shared_prefix_attention(
                module, query, key, value, None, scaling, 0.0, window, softcap, shared_prefix=layout
            )
            return output
        stored = torch.cat([key[:, :, 0].flatten(1), value[:, :, 0].flatten(1)], dim=-1)
        return self.attend_step(module, query[:, :, 0], stored).unflatten(-1, (query.shape[1], -1)).unsqueeze(1)

    def _store_prompts(self, layer: LayerMemory, slots: list[int], layout: Layout, key: Tensor, value: Tensor) -> None:
        lines_SE = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (key, value)], dim=-1)
        for slot, group in zip(slots, layout.groups, strict=True):
            layer.prompts[slot, : group.prompt.length] = lines_SE[group.prompt.slice]

    def _allocate(
        self, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> LayerMemory:
        width = key.shape[1] * (key.shape[3] + value.shape[3])

        def memory(slots: int, tokens: int) -> Tensor:
            return _zeros((slots, tokens, width), key.dtype, key.device)

        return LayerMemory(
            memory(self.max_prompts, self.max_prompt_tokens),
            memory(self.max_rows, self.max_completion_tokens),
            key.shape[1],
            key.shape[3],
            scaling,
            window,
            softcap,
        )

    def attend_step(self, module: nn.Module, query_RHD: Tensor, stored_RE: Tensor) -> Tensor:
        """Store the keys and values of one token of each row, and attend over all that it sees.

        Args:
            module: The attention layer, which has prefilled prompts.
            query_RHD: Of shape (R, H, D).
            stored_RE: Keys of all heads and then values, of shape (R, K*D + K*D of the values).

        Returns:
            Of shape (R, H*D of the values).
        """
        layer, step = self._layers[module], self.now
        assert isinstance(step, Step)
        query_RHD, stored_RE = query_RHD.to(layer.own.dtype), stored_RE.to(layer.own.dtype)
        layer.own.flatten(0, 1).index_copy_(0, step.lines(layer.own.shape[1]), stored_RE)
        if (kernels := kernels_for(query_RHD.device.type, query_RHD.dtype)) is not None:
            return kernels.attend(query_RHD.contiguous(), layer, step)
        query = query_RHD.reshape(len(query_RHD) * layer.key_heads, -1, query_RHD.shape[2])
        own_mask, prompt_mask = step.masks(layer.window, query.dtype, query.shape[1])
        there, back = step.routes(layer.key_heads)
        places = step.places(layer.key_heads)
        own_query = query if places is None else query.index_select(0, places)
        own = _attend_slots(layer, own_query, layer.own_heads, own_mask)
        prompt = _attend_slots(layer, query.index_select(0, there), layer.prompt_heads, prompt_mask)
        merged_RQKD = merge_parts(*own, *(x.index_select(0, back) for x in prompt))
        return merged_RQKD.transpose(1, 2).flatten(1)

    def of_layer(self, module: nn.Module) -> LayerMemory:
        """What an attention layer holds, once it has prefilled prompts."""
        return self._layers[module]


def kernels_for(device_type: str, dtype: torch.dtype) -> Any:
    """The module of kernels that works there: `kernels` or `cpu_kernels`; None where torch's own serve."""
    if triton_works(device_type, dtype):
        from . import kernels

        return kernels
    if device_type == "cpu" and dtype == torch.float32 and cpu_kernels.compiled() is not None:
        return cpu_kernels
    return None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 and not what was there: what is masked is multiplied by 0, and NaN would survive that."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system gives a page of this when it is written to; torch would write zeros to all of them
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _attend_slots(
    layer: LayerMemory, query: Tensor, heads: tuple[Tensor, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to the first slots, and to as many columns of them as `mask` has.

    Args:
        layer: Of which `heads` are.
        query: Of shape (n*K*g, Q, D), for n slots with g rows each.
        heads: Keys and values of all slots.
        mask: Of shape (n, 1, 1 or g*Q, columns); added to products.

    Returns:
        The output, of shape (n*g, Q, K, D of the values), and the log-sum-exp, of shape (n*g, Q, K).
    """
    slots, queries = len(mask), query.shape[1]
    key, value = (x[:slots, :, : mask.shape[3]] for x in heads)
    query = query.view(slots, layer.key_heads, -1, query.shape[2])
    parts = attend_part(query, key, value, mask, layer.scaling, layer.softcap)
    # kernels leave it in memory as (n, g*Q, K, ...)
    output, lse = (x.transpose(1, 2).reshape(-1, queries, layer.key_heads, *x.shape[3:]) for x in parts)
    return output, lse


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys.

    Args:
        query: Of shape (B, K, L, D).
        key: Of shape (B, K, N, D).
        value: Of shape (B, K, N, D of the values).
        mask: Added to products; broadcasts to (B, K, L, N). None where every key is seen.
        scaling: What products are multiplied by before.
        softcap: Products x become `softcap * tanh(x / softcap)` before.

    Returns:
        The output, of shape (B, K, L, D of the values), and the log-sum-exp of the products, of shape (B, K, L).
    """
    if softcap is None and query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scaling
        )
    if softcap is None and query.device.type == "cuda" and query.dtype != torch.float64:
        bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        output, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, False, scale=scaling
        )
        return output, lse[:, :, : query.shape[2]]  # the kernel rounds its length up
    return plain_part(query, key, value, mask, scaling, softcap)


def plain_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The reference of `attend_part`, and what serves where no kernel does."""
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse


def group_cache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefix: Layout | None = None,
    group_cache: GroupCache | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it; arguments as in `attention.shared_prefix.shared_prefix_attention`.

    Args:
        group_cache: Keeps keys and values, and knows what this forward computes.

    Raises:
        NotImplementedError: The model asks for something that the cache does not have.
    """
    if group_cache is None:
        raise NotImplementedError("the model does not pass keywords of its forward on to its attention")
    if s_aux is not None or attention_mask is not None:
        raise NotImplementedError("attention sinks and a model's own masks are not served")
    query, key = query.to(value.dtype), key.to(value.dtype)  # a norm of queries may leave autocast's precision
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return group_cache.attend(module, query, key, value, scaling, sliding_window, softcap, shared_prefix), None


AttentionInterface.register(NAME, group_cache_attention)
