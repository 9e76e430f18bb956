"""Whether a model's layers can attend over packed rows, as far as its configuration and one forward tell."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..model_utils import attending_by, causal_lm, evaluation_mode


SERVED_LAYERS = ("full_attention", "sliding_attention")


LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding in which a row depends on the rows beside it."""


SPY = "grpo_trl_spy"


def incompatibility(model: Any) -> str | None:
    """Return why the model cannot attend over packed rows, as far as its configuration says; None if it says nothing."""
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


def _rope_types(config: Any) -> list[str]:
    """Of all layers; the parameters are one dict, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [p["rope_type"] for p in (parameters, *parameters.values()) if isinstance(p, dict) and p.get("rope_type")]


def _attention_dropout(module: nn.Module) -> float:
    dropout = getattr(module, "attention_dropout", 0.0)
    dropout = getattr(dropout, "p", dropout)
    return float(dropout) if isinstance(dropout, (int, float)) else 0.0
