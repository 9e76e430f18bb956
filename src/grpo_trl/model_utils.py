"""What every package asks of a model: what is under its wrappers, its mode, its attention function, its errors."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel


LLAMA_FAMILIES = ("Gemma2", "Gemma3", "Granite", "Llama", "Mistral", "Olmo2", "Phi3", "Qwen2", "Qwen3")
"""Whose decoder layers are norms, attention, and a gated feed-forward."""


def llama_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a model of `LLAMA_FAMILIES`, in order; none of another one."""
    names = {f"{family}DecoderLayer" for family in LLAMA_FAMILIES}
    return [module for module in model.modules() if type(module).__name__ in names]


def causal_lm(model: Any) -> PreTrainedModel:
    """The language model under wrappers (DDP, DeepSpeed, torch.compile) and adapters.

    Raises:
        TypeError: There is none.
    """
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None)  # of torch.compile, which passes other attributes through
        if inner is None:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"{type(model).__name__} holds no transformers.PreTrainedModel.")
        model = inner
    return model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; each module in the mode that it was in after."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def set_optimizer_mode(optimizer: Any, training: bool) -> None:
    """Have a schedule-free optimizer put the weights that it trains, or those to evaluate, into the model."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextlib.contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the layers of `model` use the attention function that AttentionInterface has under `name`."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


class StandIn(nn.Module):
    """A function in place of a module: without its hooks, with its attributes."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.__dict__["stood_in_for"] = module
        self.function = function

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["stood_in_for"], name)
        return StandIn(value, self.function) if isinstance(value, nn.Module) else value  # OPT calls its model.decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextlib.contextmanager
def replaced(entries: Any, name: str | None, value: Any) -> Iterator[None]:
    """Another entry inside, what was there after."""
    missing = object()
    before = entries.get(name, missing)
    try:
        entries[name] = value
        yield
    finally:
        if before is missing:
            del entries[name]
        else:
            entries[name] = before


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, of whichever device; torch has no class of its own for the host's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):  # of mmap
        return error.errno == errno.ENOMEM
    # while a graph is captured, and in the libraries of CUDA, it arrives as a plain RuntimeError; so does C++'s own
    texts = ("out of memory", "bad_alloc")
    out = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return out or (isinstance(error, Exception) and should_reduce_batch_size(error))


def product_dtype(weight: Tensor) -> torch.dtype:
    """The precision of a product with a weight: that of autocast where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
