"""Compares packed logprobs with padded ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..attention.compatibility import ignored_window
from ..model_utils import causal_lm, evaluation_mode
from ..types import Completion
from .compute import compute_completion_logprobs, compute_logprobs
from .packing import Packer, group_by_prompt


TOLERANCE = 1e-3
"""Mean difference (nats) of log-probabilities that float32 may show."""
COARSE_TOLERANCE = 0.05
"""The same where matrix products are rounded more: half precision, and TF32."""


def packed_mismatch(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float, mixed_precision: bool
) -> str | None:
    """Why packed scores of the model cannot be used, by comparing them with padded ones; None if they agree.

    Logprobs of two completions are computed both ways; then packed once more in training mode, where dropout would
    show.

    Args:
        model: As in `compute_logprobs`.
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
    padded = compute_completion_logprobs(model, sample, replace(local, shared_prefix=False), temperature)
    try:
        packed = compute_completion_logprobs(model, sample, packed_packer, temperature)
        devices = [] if (device := next(model.parameters()).device).type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices), evaluation_mode(model):
            model.train()
            compute_logprobs(model, packed_packer.micro_batch(sample, len(sample)), temperature)
    except torch.OutOfMemoryError:  # padding takes more
        raise
    except Exception as error:  # whatever a model's own code raises where it is called in a way that it does not know
        return f"{name} cannot be called with packed rows ({type(error).__name__}: {error})"
    difference = (torch.cat(packed) - torch.cat(padded)).abs()
    mean = difference.mean().item() if len(difference) else 0.0
    if mean <= tolerance(model, mixed_precision):
        return None
    return f"packed log-probabilities of {name} differ from padded ones by {mean:.2g} nats on average"


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
        for group in group_by_prompt(completions)
    ]
    return max([[pair[0] for pair in pairs[:2]], *pairs], key=telling)


def _rounds(model: nn.Module) -> bool:
    """Whether products are rounded more than float32 does."""
    parameter = next(model.parameters())
    tf32 = parameter.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return tf32 or parameter.dtype not in (torch.float32, torch.float64)
