"""Whether a model's completions can be scored packed, with their prompt shared."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .completion import Completion
from .head import causal_lm
from .logprobs import evaluation_mode, score, score_completions
from .packing import Packer, by_prompt
from .shared_prefix import attending_by


SERVED_LAYERS = ("full_attention", "sliding_attention")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding in which a row depends on the rows beside it."""
TOLERANCE = 1e-3
"""Mean difference (nats) of log-probabilities that float32 may show."""
COARSE_TOLERANCE = 0.05
"""The same where matrix products are rounded more: half precision, and TF32."""
SPY = "grpo_trl_spy"


def unservable(model: Any) -> str | None:
    """Why the model cannot be scored packed, as far as its configuration says; None if it says nothing."""
    name = type(causal_lm(model)).__name__
    config: Any = causal_lm(model).config.get_text_config()
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter puts virtual tokens before the prompt"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(SERVED_LAYERS))
    if others:
        return f"{name} has layers of the kind {', '.join(others)}"
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks (attention_chunk_size={config.attention_chunk_size})"
    if scaling := set(_rope_types(config)) & set(LENGTH_DEPENDENT):
        return f"{name} turns positions by the longest row of a batch (rope_type {', '.join(scaling)})"
    dropout = max((_attention_dropout(module) for module in model.modules()), default=0.0)
    if dropout:
        return f"{name} drops attention weights (attention_dropout={dropout}; disable_dropout=True turns it off)"
    return None


def disagreement(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float, mixed_precision: bool
) -> str | None:
    """Why packed scores of the model cannot be used, by comparing them with padded ones; None if they agree.

    Two completions are scored both ways; then packed once more in training mode, to see whether dropout is in the way.

    Args:
        model: As in `logprobs.score`.
        completions: To choose from.
        packer: How both are made into tensors.
        temperature: The sampling temperature.
        mixed_precision: Whether the model computes in half precision, whatever its weights are.
    """
    name = type(causal_lm(model)).__name__
    if reason := ignored_window(model):
        return reason
    sample = _sample(completions)
    local = replace(packer, batch_size=2, max_tokens=None, gather=lambda number: [number])
    packed_packer = replace(local, shared_prefix=True)
    padded = score_completions(model, sample, replace(local, shared_prefix=False), temperature)
    try:
        packed = score_completions(model, sample, packed_packer, temperature)
        devices = [] if (device := next(model.parameters()).device).type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices), evaluation_mode(model):
            model.train()
            score(model, packed_packer.piece(sample, len(sample)), temperature)
    except torch.OutOfMemoryError:  # padding takes more
        raise
    except Exception as error:  # whatever a model's own code raises where it is called in a way that it does not know
        return f"{name} cannot be called with packed rows ({type(error).__name__}: {error})"
    difference = (torch.cat(packed) - torch.cat(padded)).abs()
    mean = difference.mean().item() if len(difference) else 0.0
    if mean <= tolerance(model, mixed_precision):
        return None
    return f"packed log-probabilities of {name} differ from padded ones by {mean:.2g} nats on average"


@torch.no_grad()
def ignored_window(model: nn.Module) -> str | None:
    """Why attention would not hear of the model's window, as where it stands in the mask alone; None if it hears of it."""
    lm = causal_lm(model)
    config: Any = lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if not getattr(config, "sliding_window", None) or not windowed:
        return None
    heard = set()

    def spy(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heard.add(kwargs.get("sliding_window"))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(SPY, spy)
    with attending_by(model, SPY), evaluation_mode(model):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=lm.device), use_cache=False)
    if heard - {None}:
        return None
    return f"{type(lm).__name__} has a window of {config.sliding_window} tokens in its mask alone"


def tolerance(model: nn.Module, mixed_precision: bool) -> float:
    """Mean difference (nats) of log-probabilities that two ways of computing them may show."""
    return COARSE_TOLERANCE if mixed_precision or _rounds(model) else TOLERANCE


def _sample(completions: Sequence[Completion]) -> list[Completion]:
    """Two completions of one prompt, the second as long as possible: the first could disturb it. Else two prompts."""

    def telling(pair: list[Completion]) -> tuple[int, bool, int]:
        shortest = min(len(c.inputs) for c in pair)
        return len(pair), shortest > 0 and pair[0].prompt_ids == pair[-1].prompt_ids, shortest

    pairs = [
        sorted((completions[i] for i in group), key=lambda c: len(c.inputs), reverse=True)[:2]
        for group in by_prompt(completions)
    ]
    return max([[pair[0] for pair in pairs[:2]], *pairs], key=telling)


def _rope_types(config: Any) -> list[str]:
    """Of all layers; the parameters are one dict, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [p["rope_type"] for p in (parameters, *parameters.values()) if isinstance(p, dict) and p.get("rope_type")]


def _attention_dropout(module: nn.Module) -> float:
    dropout = getattr(module, "attention_dropout", 0.0)
    dropout = getattr(dropout, "p", dropout)
    return float(dropout) if isinstance(dropout, (int, float)) else 0.0


def _rounds(model: nn.Module) -> bool:
    """Whether products are rounded more than float32 does."""
    parameter = next(model.parameters())
    tf32 = parameter.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return tf32 or parameter.dtype not in (torch.float32, torch.float64)
