"""The last decoder layer of a packed row, where only some of its tokens are read.

Of a prompt only the last token predicts one of a completion. The others serve the last layer as keys and values alone: what
it makes of them behind its attention is not computed.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model_utils import StandIn, llama_layers, replaced
from .layout import Layout


@contextlib.contextmanager
def reading_completions(model: nn.Module) -> Iterator[None]:
    """Inside, the last layer of `model` leaves out the tokens that predict nothing, if it is of `LLAMA_FAMILIES`.

    They leave it as they came. Its forward needs the keyword `shared_prefix`, the row's layout.
    """
    layers = llama_layers(model)[-1:]
    before = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = _reading(layer.__class__)
        yield
    finally:
        for layer, kind in zip(layers, before, strict=True):
            layer.__class__ = kind


@functools.cache
def _reading(kind: Any) -> type:
    """A subclass of a layer's class: transformers recomputes the forward of such a one too."""
    if hasattr(kind, "reads_completions"):
        return kind

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, shared_prefix: Layout | None = None, **kwargs: Any
    ) -> Tensor:
        if shared_prefix is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        sizes = shared_prefix.unread_and_read
        with _attending_to_all(self, hidden_states, shared_prefix):
            output = kind.forward(self, _read(hidden_states, sizes), *args, **kwargs)
        unread, read = hidden_states.split(sizes, dim=1)[::2], output.split(sizes[1::2], dim=1)
        return torch.cat([x for pair in zip(unread, read, strict=True) for x in pair], dim=1)

    return type(kind.__name__, (kind,), {"forward": forward, "reads_completions": True})


@contextlib.contextmanager
def _attending_to_all(layer: Any, hidden: Tensor, layout: Layout) -> Iterator[None]:
    """Inside, `layer` computes tokens that are read, and its attention has keys and values of all."""
    attention, norm = layer.self_attn, getattr(layer, "input_layernorm", None)
    normed = hidden if norm is None else norm(hidden)

    def attend(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        attended, weights = attention(hidden_states=normed, shared_prefix=layout.read, **kwargs)
        return _read(attended, layout.unread_and_read), weights

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(layer._modules, "self_attn", StandIn(attention, attend)))
        if norm is not None:  # once for all tokens, above
            stack.enter_context(replaced(layer._modules, "input_layernorm", StandIn(norm, lambda x: x)))
        yield


def _read(x: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat(x.split(sizes, dim=1)[1::2], dim=1)
