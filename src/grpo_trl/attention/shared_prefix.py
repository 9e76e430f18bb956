"""Attention over a packed row in which the completions of a group share their prompt.

A prompt's token attends causally to its prompt; a completion's token to the whole prompt and causally to its own
completion. `shared_prefix_attention` is an attention function of transformers' AttentionInterface, so that every model
that asks the interface for its attention is served; `serve_shared_prefix` switches a model to it and back.

Three ways behind one signature:
- `dense_attention`, the reference: one mask over the whole row;
- `blocked_attention`: the same sums, a block of queries against the keys that it sees; for whatever has no kernel;
- `flash.flash_attention`: flash kernels (torch's, or on a CPU in float32 those of `cpu_flash`) over prompt and completion,
  merged; the fast one.

Axes: H query heads, K key-value heads, S packed tokens, D head size; R query heads per key-value head, L queries and N
keys of a block. Tensors have a leading axis of one row, as the interface has it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from ..model_utils import attending_by
from .flash import flash_attention, has_flash
from .last_layer import reading_completions
from .layout import Layout, PackedGroup, Span


NAME = "grpo_trl_shared_prefix"
BLOCK = 256
"""Queries that `blocked_attention` takes at a time."""


def shared_prefix_attention(
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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: The attention layer.
        query: Of shape (1, H, S, D).
        key: Of shape (1, K, S, D) where K divides H.
        value: Of shape (1, K, S, D of the values).
        attention_mask: None; the layout says who sees whom.
        scaling: What products of query and key are multiplied by; 1/sqrt(D) by default.
        dropout: 0.
        sliding_window: A token sees this many positions, its own included; all of them by default.
        softcap: Products x become `softcap * tanh(x / softcap)`.
        shared_prefix: Where prompts and completions stand.
        s_aux: None; attention sinks are not served.
        kwargs: What else the model passes on.

    Returns:
        The output, of shape (1, S, H, D of the values), and None for the weights.

    Raises:
        NotImplementedError: The model asks for something that packed attention does not have.
    """
    if shared_prefix is None:
        raise NotImplementedError("the model does not pass keywords of its forward on to its attention")
    if dropout:
        raise NotImplementedError(
            f"dropout of attention, {dropout}, has no packed form; disable_dropout=True turns it off"
        )
    if s_aux is not None or attention_mask is not None:
        raise NotImplementedError("attention sinks and a model's own masks have no packed form")
    query, key = query.to(value.dtype), key.to(value.dtype)  # a norm of queries may leave autocast's precision
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= shared_prefix.longest else sliding_window
    if window is None and softcap is None and has_flash(query):
        output = flash_attention(query, key, value, shared_prefix, scaling)
    else:
        output = blocked_attention(query, key, value, shared_prefix, scaling, window, softcap)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_attention)


@contextlib.contextmanager
def serve_shared_prefix(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of `model` attend by `shared_prefix_attention`, and the last one leaves out what nobody reads.

    A backward pass that recomputes activations must run inside too.
    """
    with attending_by(model, NAME), reading_completions(model):
        yield


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The reference: softmax over a mask of shape (S, S). Arguments as in `shared_prefix_attention`.

    Returns:
        The output, of shape (1, H, S, D of the values).
    """
    labels = (*_labels(layout), layout.positions)
    group_S, branch_S, position_S = (torch.tensor(values, device=query.device) for values in labels)
    distance_SS = position_S[:, None] - position_S[None, :]
    same_group_SS = group_S[:, None] == group_S[None, :]
    visible_SS = (branch_S[None, :] == 0) | (branch_S[:, None] == branch_S[None, :])
    mask_SS = same_group_SS & visible_SS & _in_reach(distance_SS, window)
    return _attend(query, [(key, value, mask_SS)], scaling, softcap)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `dense_attention`, without products that the mask would drop, and with memory for one block at a time."""
    outputs = []
    for group in layout.groups:
        for segment in (group.prompt, *group.branches):
            for start in range(segment.start, segment.stop, BLOCK):
                rows = Span(start, min(start + BLOCK, segment.stop))
                parts = [
                    (key[:, :, span.slice], value[:, :, span.slice], mask_LN)
                    for span, mask_LN in _seen_by(rows, segment, group, window, query.device)
                ]
                block = query[:, :, rows.slice]
                if torch.is_grad_enabled():
                    outputs.append(checkpoint(_attend, block, parts, scaling, softcap, use_reentrant=False))
                else:
                    outputs.append(_attend(block, parts, scaling, softcap))
    return torch.cat(outputs, dim=2)


def _seen_by(
    rows: Span, segment: Span, group: PackedGroup, window: int | None, device: torch.device
) -> list[tuple[Span, Tensor]]:
    """The spans of keys that `rows` of `segment` see something of, each with its mask of shape (L, N)."""
    spans = [(Span(segment.start, rows.stop), 0)]
    if segment != group.prompt:
        spans.insert(0, (group.prompt, group.prompt.length))
    seen = []
    for span, ahead in spans:
        # how far the segment's first token stands behind the span's first
        first = rows.start - segment.start + ahead
        skipped = 0 if window is None else min(max(0, first - window + 1), span.length)
        span = Span(span.start + skipped, span.stop)
        if span.length:
            query_L = torch.arange(first, first + rows.length, device=device)
            key_N = torch.arange(skipped, skipped + span.length, device=device)
            seen.append((span, _in_reach(query_L[:, None] - key_N[None, :], window)))
    return seen


def _in_reach(distance: Tensor, window: int | None) -> Tensor:
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attend(
    query: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]], scaling: float, softcap: float | None
) -> Tensor:
    """Softmax attention of one block of queries over several parts, each (keys, values, mask of shape (L, N))."""
    queries = query.unflatten(1, (parts[0][0].shape[1], -1))  # (1, K, R, L, D)
    scores = torch.cat([_scores(queries, key, mask, scaling, softcap) for key, _, mask in parts], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    shares = weights.split([mask.shape[1] for _, _, mask in parts], dim=-1)
    # heads that share their keys are rows of one product, so that no key is copied
    products = [
        (share.flatten(2, 3) @ value).unflatten(2, queries.shape[2:4])
        for share, (_, value, _) in zip(shares, parts, strict=True)
    ]
    return torch.stack(products).sum(0).flatten(1, 2) if len(products) > 1 else products[0].flatten(1, 2)


def _scores(queries: Tensor, key: Tensor, mask_LN: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Of shape (1, K, R, L, N), -inf where the mask is False."""
    scores = (queries.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, queries.shape[2:4]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask_LN, -torch.inf)


def _labels(layout: Layout) -> tuple[list[int], list[int]]:
    """For every token its group, and its branch in that group (0: the prompt)."""
    segments = [
        (g, b, s) for g, group in enumerate(layout.groups) for b, s in enumerate((group.prompt, *group.branches))
    ]
    groups = [g for g, _, segment in segments for _ in range(segment.length)]
    return groups, [b for _, b, segment in segments for _ in range(segment.length)]
