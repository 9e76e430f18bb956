"""Log-probabilities of completions under a model.

Axes: B completions, T completion tokens, M trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.shared_prefix import serve_shared_prefix
from ..model_utils import evaluation_mode
from ..types import Completion, MicroBatch
from .head import LogprobRequest
from .packing import Packer


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model says of a micro-batch; 0 where the micro-batch's mask is False."""

    logps_BT: Tensor
    """Log-probabilities (nats) at the sampling temperature, at least float32, with gradient where it is enabled."""
    entropy_BT: Tensor
    """Entropy (nats) of the distribution each token was drawn from, detached."""


def compute_logprobs(model: nn.Module, micro_batch: MicroBatch, temperature: float) -> TokenLogprobs:
    """Evaluate the completions of `micro_batch` under `model`, in the mode that it is in.

        logp_it = log softmax(logits_it / temperature)[token_it]

    Args:
        model: A causal language model, wrapped or not, that went through `enable_logprobs`.
        micro-batch: What to evaluate.
        temperature: The sampling temperature, above 0.
    """
    request = LogprobRequest(
        micro_batch.positions_M, micro_batch.targets_M, temperature, micro_batch.input_ids_RS.shape[1]
    )
    if micro_batch.layout is None:
        logps_M, entropy_M = model(input_ids=micro_batch.input_ids_RS, use_cache=False, logprob_request=request)
    else:
        with serve_shared_prefix(model):
            logps_M, entropy_M = model(
                input_ids=micro_batch.input_ids_RS,
                position_ids=micro_batch.position_ids_RS,
                use_cache=False,
                logprob_request=request,
                shared_prefix=micro_batch.layout,
            )
    nothing_BT = logps_M.new_zeros(micro_batch.mask_BT.shape)
    return TokenLogprobs(
        logps_BT=nothing_BT.masked_scatter(micro_batch.mask_BT, logps_M),
        entropy_BT=nothing_BT.masked_scatter(micro_batch.mask_BT, entropy_M),
    )


@torch.no_grad()
def compute_completion_logprobs(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float
) -> list[Tensor]:
    """Log-probabilities of each completion's tokens, on the CPU, without gradient and without dropout.

    Args:
        model: As in `compute_logprobs`; its mode is restored.
        completions: What to evaluate.
        packer: Cuts them into micro-batches.
        temperature: The sampling temperature.

    Returns:
        For each completion a tensor of shape (its number of tokens,), 0 where its mask is False.
    """
    logps = [torch.zeros(0)] * len(completions)
    with evaluation_mode(model):
        for indices in packer.cut(completions):
            micro_batch = packer.micro_batch([completions[i] for i in indices], num_completions=len(completions))
            logps_BT = compute_logprobs(model, micro_batch, temperature).logps_BT.cpu()
            for i, logps_T in zip(indices, logps_BT, strict=True):
                logps[i] = logps_T[: len(completions[i].ids)].clone()
    return logps
