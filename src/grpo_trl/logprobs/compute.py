"""Log-probabilities of completions under a model.

Axes: B completions, T completion tokens, M trained tokens.
"""

from collections.abc import Callable, Sequence
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
    """Entropy (nats) of the distribution each token was sampled from; detached unless asked for with gradient."""
    router_load_2E: Tensor | None = None
    """How often each expert of a mixture is chosen, and the sum of its probabilities, with gradient; None unless asked."""


def compute_logprobs(
    model: nn.Module,
    micro_batch: MicroBatch,
    temperature: float,
    entropy_gradient: bool = False,
    router_load: bool = False,
) -> TokenLogprobs:
    """Evaluate the completions of `micro_batch` under `model`, in the mode that it is in.

        logp_it = log softmax(logits_it / temperature)[token_it]

    Args:
        model: A causal language model, wrapped or not, that went through `enable_logprobs`.
        micro-batch: What to evaluate.
        temperature: The sampling temperature, above 0.
        entropy_gradient: Whether entropies have a gradient.
        router_load: Whether to add up the load of a mixture's experts.
    """
    request = LogprobRequest(
        micro_batch.positions_M,
        micro_batch.targets_M,
        temperature,
        row_length=micro_batch.input_ids_RS.shape[1],
        entropy_gradient=entropy_gradient,
        router_weights_N=micro_batch.uses_RS.flatten() if router_load else None,
    )
    if micro_batch.layout is None:
        logps_M, entropy_M, *load = model(input_ids=micro_batch.input_ids_RS, use_cache=False, logprob_request=request)
    else:
        with serve_shared_prefix(model):
            logps_M, entropy_M, *load = model(
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
        router_load_2E=load[0] if load else None,
    )


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
    return _by_completion(model, completions, packer, temperature, lambda logprobs: logprobs.logps_BT)


def compute_completion_entropies(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float
) -> list[Tensor]:
    """Compute the entropies (nats) of the distributions of each completion's tokens, as `compute_completion_logprobs`."""
    return _by_completion(model, completions, packer, temperature, lambda logprobs: logprobs.entropy_BT)


@torch.no_grad()
def compute_router_load(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float
) -> Tensor:
    """Add up the load of a mixture's experts over completions, which may be none; float64, on the CPU."""
    loads = []
    with evaluation_mode(model):
        for indices in packer.cut(completions):
            micro_batch = packer.micro_batch([completions[i] for i in indices])
            load_2E = compute_logprobs(model, micro_batch, temperature, router_load=True).router_load_2E
            assert load_2E is not None
            loads.append(load_2E.double().cpu())
    return torch.stack(loads).sum(0)


@torch.no_grad()
def _by_completion(
    model: nn.Module,
    completions: Sequence[Completion],
    packer: Packer,
    temperature: float,
    values: Callable[[TokenLogprobs], Tensor],
) -> list[Tensor]:
    rows = [torch.zeros(0)] * len(completions)
    with evaluation_mode(model):
        for indices in packer.cut(completions):
            micro_batch = packer.micro_batch([completions[i] for i in indices])
            values_BT = values(compute_logprobs(model, micro_batch, temperature)).cpu()
            for i, values_T in zip(indices, values_BT, strict=True):
                rows[i] = values_T[: len(completions[i].ids)].clone()
    return rows
