"""Compares packed logprobs with padded ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..attention.compatibility import ignored_window
from ..model_utils import causal_lm, evaluation_mode, ran_out_of_memory
from ..types import Completion, Ranks
from .comparison import Comparison, tolerance
from .compute import compute_completion_logprobs, compute_logprobs
from .packing import Packer, group_by_prompt


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
    local = replace(packer, batch_size=len(sample), max_tokens=None, ranks=Ranks())
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
    alone = None
    if thorough:
        one_by_one = replace(local, batch_size=1, shared_prefix=False)
        alone = torch.cat(compute_completion_logprobs(model, sample, one_by_one, temperature))
    compared = Comparison.of(torch.cat(packed), torch.cat(padded), alone, tolerance(model, mixed_precision))
    return None if compared.agrees else f"packed log-probabilities of {name} differ from padded ones by {compared}"


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
