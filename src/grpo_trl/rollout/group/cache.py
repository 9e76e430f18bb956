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
    _masks: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def masks(self, window: int | None, dtype: torch.dtype, queries_per_row: int) -> tuple[Tensor, Tensor]:
        """What is added to products: of shape (R, 1, 1, T) for own keys, (N, 1, 1 or G*Q, S) for those of prompts."""
        if window is not None and window >= self.prompt_columns + self.columns:
            window = None
        key = window, dtype, queries_per_row
        if key not in self._masks:
            self._masks[key] = self._make_masks(window, dtype, queries_per_row)
        return self._masks[key]

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
    # not -inf: a row that sees nothing must have a log-sum-exp that makes it weightless, and no NaN
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass
class _Layer:
    """One attention layer's memory."""

    prompt_key: Tensor  # (slots, S, K, D)
    prompt_value: Tensor
    key: Tensor  # (rows, T, K, D)
    value: Tensor


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
        return sum(part[0, 0].numel() * part.element_size() for x in self._layers.values() for part in (x.key, x.value))

    def move_row(self, source: int, target: int, length: int) -> None:
        for layer in self._layers.values():
            for part in (layer.key, layer.value):
                part[target, :length] = part[source, :length]

    def move_prompt(self, source: int, target: int, length: int) -> None:
        for layer in self._layers.values():
            for part in (layer.prompt_key, layer.prompt_value):
                part[target, :length] = part[source, :length]

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
            self._store_prompts(module, self.now, key, value)
            output, _ = shared_prefix_attention(
                module, query, key, value, None, scaling, 0.0, window, softcap, shared_prefix=self.now.layout
            )
            return output
        assert self.now is not None
        return self._attend_step(self._layers[module], self.now, query, key, value, scaling, window, softcap)

    def _store_prompts(self, module: nn.Module, prefill: Prefill, key: Tensor, value: Tensor) -> None:
        if module not in self._layers:
            self._layers[module] = self._allocate(key, value)
        layer = self._layers[module]
        for slot, group in zip(prefill.slots, prefill.layout.groups, strict=True):
            layer.prompt_key[slot, : group.prompt.length] = key[0, :, group.prompt.slice].transpose(0, 1)
            layer.prompt_value[slot, : group.prompt.length] = value[0, :, group.prompt.slice].transpose(0, 1)

    def _allocate(self, key: Tensor, value: Tensor) -> _Layer:
        def memory(like: Tensor, slots: int, tokens: int) -> Tensor:
            return _zeros((slots, tokens, like.shape[1], like.shape[3]), like.dtype, like.device)

        return _Layer(
            memory(key, self.max_prompts, self.max_prompt_tokens),
            memory(value, self.max_prompts, self.max_prompt_tokens),
            memory(key, self.max_rows, self.max_completion_tokens),
            memory(value, self.max_rows, self.max_completion_tokens),
        )

    def _attend_step(
        self,
        layer: _Layer,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        rows, columns = len(step.tokens_R), step.columns
        prompts, group = step.rows_NG.shape
        layer.key[step.row_R, step.lengths_R] = key[:, :, 0]
        layer.value[step.row_R, step.lengths_R] = value[:, :, 0]
        query_RKQD = query[:, :, 0].unflatten(1, (key.shape[1], -1))
        own_mask, prompt_mask = step.masks(window, query.dtype, query_RKQD.shape[2])
        own, own_lse = attend_part(
            query_RKQD,
            layer.key[:rows, :columns].transpose(1, 2),
            layer.value[:rows, :columns].transpose(1, 2),
            own_mask,
            scaling,
            softcap,
        )
        output, lse = attend_part(
            query_RKQD[step.rows_NG].transpose(1, 2).flatten(2, 3),  # (N, K, G*Q, D)
            layer.prompt_key[:prompts, : step.prompt_columns].transpose(1, 2),
            layer.prompt_value[:prompts, : step.prompt_columns].transpose(1, 2),
            prompt_mask,
            scaling,
            softcap,
        )
        output, lse = (
            x.unflatten(2, (group, -1))[step.prompt_R, :, step.place_R] for x in (output, lse)
        )  # (R, K, Q, ...)
        return merge_parts(own, own_lse, output, lse).flatten(1, 2).unsqueeze(1)


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
