"""How far the log-probabilities of the group engine are from those of plain forwards of one row and of two."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...logprobs.comparison import Comparison, tolerance
from ...model_utils import causal_lm
from ...types import Completion
from ..base import RolloutRequest, SamplingOptions


TOKENS = 32
"""Tokens of each completion that is compared at first; MORE_TOKENS of it before the engine is given up."""
MORE_TOKENS = 128
WIDEST_WINDOW = 1024
"""Completions are compared past a sliding window of up to this many tokens."""


def compare(model: Any, completions: Sequence[Completion], temperature: float, mixed_precision: bool) -> Comparison:
    """Compare the completions' `sampler_logps` with plain forwards.

    Args:
        model: The policy, in evaluation mode.
        completions: Two of each prompt, next to each other, all of one number of tokens.
        temperature: The sampling temperature.
        mixed_precision: Whether the model computes in half precision, whatever its weights are.
    """
    pairs = [[first, second] for first, second in zip(completions[::2], completions[1::2], strict=True)]
    together = torch.cat([_logps(model, pair, temperature) for pair in pairs])
    alone = torch.cat([_logps(model, [completion], temperature) for completion in completions])
    sampled = torch.tensor([c.sampler_logps for c in completions], dtype=torch.float64)
    return Comparison.of(sampled.flatten(), alone.flatten(), together.flatten(), tolerance(model, mixed_precision))


def _logps(model: Any, completions: list[Completion], temperature: float) -> Tensor:
    """Of shape (completions, T), float64, on the CPU; logits are held for the completions' tokens alone."""
    input_ids = torch.tensor([c.prompt_ids + c.ids for c in completions], device=model.device)
    length = len(completions[0].ids)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = logits.gather(-1, input_ids[:, -length:, None])[:, :, 0]
    return (chosen.double() - logits.logsumexp(-1).double()).cpu()


def sample_request(request: RolloutRequest, prompts: int) -> RolloutRequest:
    """Two completions of each of `prompts` prompts, from the shortest to the longest."""
    order = sorted(range(len(request.prompt_ids)), key=lambda i: len(request.prompt_ids[i]))
    steps = max(1, prompts - 1)
    chosen = sorted({order[i * (len(order) - 1) // steps] for i in range(prompts)})
    return RolloutRequest(
        prompts=[request.prompts[i] for i in chosen],
        prompt_ids=[request.prompt_ids[i] for i in chosen],
        num_generations=2,
        seeds=[request.seeds[i] for i in chosen],
    )


def sample_options(model: Any, options: SamplingOptions, tokens: int) -> SamplingOptions:
    """For completions of `tokens` tokens past the model's window, none of which ends earlier."""
    window = getattr(causal_lm(model).config.get_text_config(), "sliding_window", None)
    if window is not None and window <= WIDEST_WINDOW:
        tokens += window
    return replace(options, max_completion_length=min(tokens, options.max_completion_length), eos_token_ids=())
