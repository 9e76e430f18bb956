"""Keys and values of prompts and completions in decoding, and the attention over them.

A prompt's keys and values are held once and serve all of its completions: the rows of a prompt are the queries of one
product with them. A row's own keys and values stand in a slot of preallocated memory. The two parts' outputs are merged
by their log-sum-exps, as in packed scoring.

Nothing that changes between two decoding steps is a Python number here: `Step` brings it as tensors, so that the
launches of a step can be recorded once and repeated.

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


NAME = "grpo_trl_group_cache"
_aten = torch.ops.aten


@dataclass(frozen=True)
class Prefill:
    """A forward over prompts, one behind the other in one row, and the slots that their keys and values go to."""

    layout: Layout
    slots: list[int]


@dataclass(frozen=True)
class Step:
    """A forward over the last token of each row."""

    tokens_R: Tensor
    positions_R: Tensor
    """Of the token in prompt and completion together."""
    lengths_R: Tensor
    """How many tokens of the completion are held already: the column that this one goes to."""
    rows_NG: Tensor
    """The rows of each prompt in flight; any row where it has fewer than G."""
    prompt_R: Tensor
    """The prompt of each row, and its place in that prompt's line of `rows_NG`."""
    place_R: Tensor
    row_R: Tensor
    """0, 1, ..."""
    prompt_lengths_N: Tensor
    prompt_columns: int
    """S, at least the longest prompt in flight."""
    columns: int
    """T, above the largest of `lengths_R`."""
    _shared: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """What layers that are alike have in common."""

    def masks(self, window: int | None, dtype: torch.dtype, queries_per_row: int) -> tuple[Tensor, Tensor]:
        """What is added to products: of shape (R, 1, 1, T) for own keys, (N, 1, 1 or G*Q, S) for those of prompts."""
        if window is not None and window >= self.prompt_columns + self.columns:
            window = None
        key = window, dtype, queries_per_row
        if key not in self._shared:
            self._shared[key] = self._make_masks(window, dtype, queries_per_row)
        return self._shared[key]

    def rotation(self, cos_R1D: Tensor, sin_R1D: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines, and the sines for components whose halves have changed places, of which the first is negated."""
        key = id(cos_R1D), id(sin_R1D)
        if key not in self._shared:
            first, second = sin_R1D.chunk(2, dim=-1)
            self._shared[key] = cos_R1D, torch.cat([-first, second], dim=-1)
        return self._shared[key]

    def routes(self, key_heads: int) -> tuple[Tensor, Tensor]:
        """From queries (R*K, ...) to those of prompts (N*K*G, ...), and from their outputs (N*G, ...) to rows (R, ...)."""
        key = "routes", key_heads
        if key not in self._shared:
            group = self.rows_NG.shape[1]
            head_K1 = torch.arange(key_heads, device=self.rows_NG.device)[:, None]
            there_NKG = self.rows_NG[:, None] * key_heads + head_K1
            self._shared[key] = there_NKG.flatten(), self.prompt_R * group + self.place_R
        return self._shared[key]

    def _make_masks(self, window: int | None, dtype: torch.dtype, queries_per_row: int) -> tuple[Tensor, Tensor]:
        device = self.tokens_R.device
        column_T = torch.arange(self.columns, device=device)
        column_S = torch.arange(self.prompt_columns, device=device)
        own_RT = column_T <= self.lengths_R[:, None]
        prompt_NGS = (column_S < self.prompt_lengths_N[:, None])[:, None]
        if window is not None:
            own_RT &= self.lengths_R[:, None] - column_T < window
            distance_NGS = self.positions_R[self.rows_NG][:, :, None] - column_S
            prompt_NGS = (prompt_NGS & (distance_NGS < window)).repeat_interleave(queries_per_row, dim=1)
        return _additive(own_RT[:, None, None], dtype), _additive(prompt_NGS[:, None], dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, hidden(dtype))


def hidden(dtype: torch.dtype) -> float:
    """What is added to the product of a query with a key that it does not see.

    Not -inf: a row that sees nothing must have a log-sum-exp that makes it weightless. Nor the least number: CUDA's kernel
    multiplies by log2(e) in float32, which would make -inf of it, and gives such a row the log-sum-exp 0.
    """
    return max(torch.finfo(dtype).min, -1e30)


@dataclass
class _Layer:
    """One attention layer's memory: a token's keys of all heads, then its values, in one line."""

    prompts: Tensor  # (slots, S, K*D + K*D of the values)
    own: Tensor  # (rows, T, K*D + K*D of the values)
    key_heads: int
    key_size: int
    scaling: float
    window: int | None
    softcap: float | None

    def split(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (slots, K, tokens, D)."""
        keys, values = memory.tensor_split((self.key_heads * self.key_size,), dim=-1)
        key, value = (x.unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for x in (keys, values))
        return key, value


@dataclass
class GroupCache:
    """Memory for decoding, allocated layer by layer at the first prefill and never grown.

    Rows and prompts in flight have the first slots of theirs, without holes; who frees one moves the last one there.
    """

    max_rows: int
    max_prompts: int
    max_prompt_tokens: int
    max_completion_tokens: int
    now: Prefill | Step | None = None
    """What the forward that is running computes."""
    _layers: dict[nn.Module, _Layer] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers; known after the first prefill."""
        return sum(x.own.shape[2] * x.own.element_size() for x in self._layers.values())

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
    ) -> Tensor:
        """Store keys and values, and attend over all that each query sees.

        Returns:
            Of shape (as the query's rows, tokens, H, D of the values).
        """
        if isinstance(self.now, Prefill):
            if module not in self._layers:
                self._layers[module] = self._allocate(key, value, scaling, window, softcap)
            self._store_prompts(self._layers[module], self.now, key, value)
            output, _ = shared_prefix_attention(
                module, query, key, value, None, scaling, 0.0, window, softcap, shared_prefix=self.now.layout
            )
            return output
        stored = torch.cat([key[:, :, 0].flatten(1), value[:, :, 0].flatten(1)], dim=-1)
        return self.attend_step(module, query[:, :, 0], stored).unflatten(-1, (query.shape[1], -1)).unsqueeze(1)

    def _store_prompts(self, layer: _Layer, prefill: Prefill, key: Tensor, value: Tensor) -> None:
        lines_SE = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (key, value)], dim=-1)
        for slot, group in zip(prefill.slots, prefill.layout.groups, strict=True):
            layer.prompts[slot, : group.prompt.length] = lines_SE[group.prompt.slice]

    def _allocate(
        self, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> _Layer:
        width = key.shape[1] * (key.shape[3] + value.shape[3])

        def memory(slots: int, tokens: int) -> Tensor:
            return _zeros((slots, tokens, width), key.dtype, key.device)

        return _Layer(
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
        rows, (prompts, group) = len(step.tokens_R), step.rows_NG.shape
        query_RHD, stored_RE = query_RHD.to(layer.own.dtype), stored_RE.to(layer.own.dtype)
        layer.own.flatten(0, 1).index_copy_(0, step.row_R * layer.own.shape[1] + step.lengths_R, stored_RE)
        query_RKQD = query_RHD.unflatten(1, (layer.key_heads, -1))
        queries = query_RKQD.shape[2]
        own_mask, prompt_mask = step.masks(layer.window, query_RHD.dtype, queries)
        there, back = step.routes(layer.key_heads)
        own = attend_part(
            query_RKQD, *layer.split(layer.own[:rows, : step.columns]), own_mask, layer.scaling, layer.softcap
        )
        routed = query_RHD.reshape(rows * layer.key_heads, -1).index_select(0, there)
        prompt = attend_part(
            routed.view(prompts, layer.key_heads, group * queries, -1),
            *layer.split(layer.prompts[:prompts, : step.prompt_columns]),
            prompt_mask,
            layer.scaling,
            layer.softcap,
        )
        # (N, K, G*Q, ...) to (N*G, Q, K, ...), as kernels leave it in memory, and to (R, Q, K, ...)
        output, lse = (
            x.transpose(1, 2)
            .reshape(prompts * group, -1)
            .index_select(0, back)
            .view(rows, queries, *y.transpose(1, 2).shape[2:])
            for x, y in zip(prompt, own, strict=True)
        )
        merged_RQKD = merge_parts(own[0].transpose(1, 2), own[1].transpose(1, 2), output, lse)
        return merged_RQKD.transpose(1, 2).flatten(1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 and not what was there: what is masked is multiplied by 0, and NaN would survive that."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system gives a page of this when it is written to; torch would write zeros to all of them
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys.

    Args:
        query: Of shape (B, K, L, D).
        key: Of shape (B, K, N, D).
        value: Of shape (B, K, N, D of the values).
        mask: Added to products; broadcasts to (B, K, L, N).
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
        bias = mask.expand(*query.shape[:3], key.shape[2])
        output, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, False, scale=scaling
        )
        return output, lse[:, :, : query.shape[2]]  # the kernel rounds its length up
    return plain_part(query, key, value, mask, scaling, softcap)


def plain_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The reference of `attend_part`, and what serves where no kernel does."""
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + mask
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
    group_cache: GroupCache | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it; arguments as in `policy.shared_prefix.shared_prefix_attention`.

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
    return group_cache.attend(module, query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, group_cache_attention)
