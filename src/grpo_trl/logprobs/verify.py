"""Compares packed logprobs with padded ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attention.compatibility import ignored_window
from ..model_utils import causal_lm, evaluation_mode, ran_out_of_memory
from ..types import Completion
from .compute import compute_completion_logprobs, compute_logprobs
from .packing import Packer, group_by_prompt


TOLERANCE = 1e-3
"""Mean difference (nats) of log-probabilities that float32 may show."""
COARSE_TOLERANCE = 0.05
"""The same where matrix products are rounded more: half precision, and TF32."""


NOISE_FACTOR = 4.0
"""How many times the model's own noise is allowed."""
MORE_COMPLETIONS = 8
"""Compared before packing is given up."""


def packed_mismatch(
    model: nn.Module,
    completions: Sequence[Completion],
    packer: Packer,
    temperature: float,
    mixed_precision: bool,
    thorough: bool = False,
) -> str | None:
    """Why packed logprobs of the model cannot be used, by comparing them with padded ones; None if they agree.

    Logprobs of two completions are computed both ways; then packed once more in training mode, where dropout would
    show. If `thorough`, more completions are compared, and the difference is held against the model's own noise: that
    of one padded row from several, whose sums are rounded in another order.

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
    sample = list(completions[:MORE_COMPLETIONS]) if thorough else _sample(completions)
    local = replace(packer, batch_size=len(sample), max_tokens=None, gather=lambda number: [number])
    packed_packer = replace(local, shared_prefix=True)
    padded = compute_completion_logprobs(model, sample, replace(local, shared_prefix=False), temperature)
    try:
        packed = compute_completion_logprobs(model, sample, packed_packer, temperature)
        devices = [] if (device := next(model.parameters()).device).type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices), evaluation_mode(model):
            model.train()
            compute_logprobs(model, packed_packer.micro_batch(sample, len(sample)), temperature)
    except Exception as error:  # whatever a model's own code raises where it is called in a way that it does not know
        if ran_out_of_memory(error):  # padding takes more
            raise
        return f"{name} cannot be called with packed rows ({type(error).__name__}: {error})"
    difference, allowed = _mean_difference(packed, padded), tolerance(model, mixed_precision)
    noise = ""
    if thorough:
        alone = replace(local, batch_size=1, shared_prefix=False)
        own = _mean_difference(compute_completion_logprobs(model, sample, alone, temperature), padded)
        allowed = max(allowed, NOISE_FACTOR * own)
        noise = f" (the model differs from itself by {own:.2g} in another batch shape)"
    if difference <= allowed:
        return None
    return (
        f"packed log-probabilities of {name} differ from padded ones by {difference:.2g} nats on average over "
        f"{sum(map(len, padded))} tokens, where {allowed:.2g} are allowed{noise}"
    )


def _mean_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    difference = (torch.cat(list(one)) - torch.cat(list(other))).abs()
    return difference.mean().item() if len(difference) else 0.0


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
    """Whether some products are rounded more than float32 does: in half precision, by TF32, or over a k-bit base."""
    parameters = list(model.parameters())
    on_gpu = parameters[0].device.type == "cuda"
    tf32 = on_gpu and torch.get_float32_matmul_precision() != "highest"
    coarse = any(p.dtype not in (torch.float32, torch.float64) for p in parameters)
    return tf32 or coarse or bool(getattr(causal_lm(model), "is_quantized", False))
