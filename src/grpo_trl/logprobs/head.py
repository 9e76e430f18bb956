"""Log-probabilities and entropy from inside a model's forward, by slices of tokens.

A language model's forward is a backbone and what follows it: the head, and in some models a scale or a soft cap on the
logits. `enable_logprobs` adds a keyword to it, `logprob_request`: with it, forward returns log-probabilities and
entropy of the positions asked for, and what follows the backbone is the model's own forward, run over a slice of the
backbone's output at a time. So the logits of one slice are all that is ever held, forward or backward, and the work
lies inside forward, where ZeRO gathers weights and DDP and autocast wrap. The gradient of the head's weight is summed
over slices in float32, so that it does not depend on their number.

Axes: R rows, S tokens of a row, N = R*S, D hidden size, M positions asked for, K positions of a slice, V vocabulary, E
experts.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import nll_loss
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..gpu_kernels import triton_works
from ..model_utils import StandIn, causal_lm, replaced
from ..plan.activations import slice_tokens
from .head_weight import SummedInFloat32


GATHERS = 8
"""Slices where ZeRO-3 gathers weights in each of them: as many on every rank, whatever the number of its tokens."""


@dataclass(frozen=True)
class LogprobRequest:
    """What forward is asked for: the probability that each position gives to a token.

    Positions count the tokens of all rows, row after row; virtual tokens that an adapter puts before them do not count.
    """

    positions_M: Tensor
    targets_M: Tensor
    temperature: float
    row_length: int
    entropy_gradient: bool = False
    """Whether entropies have a gradient."""
    router_weights_N: Tensor | None = None
    """How often each token of the rows counts in the load of a mixture's experts; None: the load is not computed."""


def enable_logprobs(model: Any) -> None:
    """Let the forward of the language model in `model` take the keyword `logprob_request`; all else stays as it is.

    With it forward returns log-probabilities (nats) with gradient and entropies (nats), which are detached unless the
    request asks for their gradient, each of shape (M,), and if it is asked for the load of the experts, of shape (2, E).
    Called before the model is wrapped. A model that has it already is left alone.

    Raises:
        TypeError: The model is no transformers.PreTrainedModel, or has no backbone or head of its own.
    """
    lm = causal_lm(model)
    if hasattr(lm, "_plain_forward"):
        return
    if lm.base_model is lm or _name_of(lm, lm.get_output_embeddings()) is None:
        raise TypeError(
            f"{type(lm).__name__} is not a backbone (its base_model_prefix, {lm.base_model_prefix!r}) and a head (its "
            "get_output_embeddings()), so its logprobs cannot be computed; pass another causal language model."
        )

    def forward(self: Any, *args: Any, logprob_request: LogprobRequest | None = None, **kwargs: Any) -> Any:
        if logprob_request is None:
            return self._plain_forward(*args, **kwargs)
        return _compute(self, logprob_request, *args, **kwargs)

    signature = inspect.signature(lm.forward)  # generate() reads there what the model takes
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    lm._plain_forward = lm.forward  # type: ignore[assignment]
    lm.forward = types.MethodType(forward, lm)


def _compute(lm: Any, request: LogprobRequest, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    weights_N = request.router_weights_N
    output = lm.base_model(*args, **kwargs | ({} if weights_N is None else {"output_router_logits": True}))
    hidden_MD = output.last_hidden_state[:, -request.row_length :].flatten(0, 1)[request.positions_M]
    head = lm.get_output_embeddings()
    head_forward = head.forward

    def logprobs_by_slice(hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
        slices = _slices(lm, head, hidden_MD, request.targets_M)
        product: Callable[[Tensor], Tensor] = head_forward
        if len(slices) > 1 and _is_plain(head, head_forward) and not isinstance(lm, FSDPModule):
            product = SummedInFloat32(head)

        def slice_logprobs(hidden_KD: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
            logits_KV = _logits(lm, product, output, hidden_KD)
            return token_logprobs(logits_KV, targets_K, request.temperature, request.entropy_gradient)

        run = functools.partial(checkpoint, slice_logprobs, use_reentrant=False) if len(slices) > 1 else slice_logprobs
        logps, entropies = zip(*(run(*one) for one in slices), strict=True)
        return torch.cat(logps), torch.cat(entropies)

    # One call of the head for all slices: ZeRO-3 gathers its weights once, and as often on every rank
    with replaced(head.__dict__, "forward", logprobs_by_slice):
        logps_M, entropy_M = head(hidden_MD)
    return logps_M, entropy_M, *([] if weights_N is None else [_router_load(lm, output.router_logits, weights_N)])


def _router_load(lm: Any, router_logits: tuple[Tensor, ...], weights_N: Tensor) -> Tensor:
    """Add up, over layers and tokens, how often each expert is chosen and the probability it is given; shape (2, E).

    Source: Switch Transformer, arXiv 2101.03961, Eq. (5) and (6).
    """
    loads = []
    for logits_NE in router_logits:
        probs_NE = logits_NE.float().softmax(-1)
        chosen_NK = probs_NE.topk(lm.config.get_text_config().num_experts_per_tok).indices
        counts_NE = torch.zeros_like(probs_NE).scatter_(1, chosen_NK, 1.0)
        loads.append(torch.stack([weights_N @ counts_NE, weights_N @ probs_NE]))
    return torch.stack(loads).sum(0)


def _slices(lm: Any, head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> list[tuple[Tensor, Tensor]]:
    if _gathers_inside(head):
        return list(zip(hidden_MD.tensor_split(GATHERS), targets_M.tensor_split(GATHERS), strict=True))
    memory = torch.cuda.get_device_properties(hidden_MD.device).total_memory if hidden_MD.is_cuda else None
    size = slice_tokens(lm.config.get_text_config().vocab_size, memory)
    return list(zip(hidden_MD.split(size), targets_M.split(size), strict=True))


def _is_plain(head: Any, head_forward: Any) -> bool:
    """Whether the head is a linear layer that is trained, and whose weight is in this rank's memory all the time."""
    linear = getattr(head_forward, "__func__", None) is nn.Linear.forward
    return linear and head.weight.requires_grad and torch.is_grad_enabled() and not hasattr(head.weight, "ds_id")


def _gathers_inside(head: nn.Module) -> bool:
    """Whether ZeRO-3 gathers weights at each call of a module inside the head, such as an adapter."""
    return any(True for _ in head.children()) and any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def token_logprobs(
    logits_KV: Tensor, targets_K: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The log-probability of each position's target and its entropy, computed in float32 at least.

    Entropies have no gradient unless `entropy_gradient`.
    """
    if triton_works(logits_KV.device.type, logits_KV.dtype):
        from . import kernels

        return kernels.token_logprobs(logits_KV, targets_K, temperature, entropy_gradient)
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    log_probs_KV = (logits_KV if temperature == 1 else logits_KV / temperature).log_softmax(-1)
    logps_K = -nll_loss(log_probs_KV, targets_K, reduction="none")
    # Last, where a recomputation in the backward pass stops short of it if it has no gradient
    with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
        bounded_KV = log_probs_KV.clamp(min=torch.finfo(log_probs_KV.dtype).min)  # 0 * -inf would be NaN
        entropy_K = -(log_probs_KV.exp() * bounded_KV).sum(-1)
    return logps_K, entropy_K


def _logits(lm: Any, head_forward: Callable[[Tensor], Tensor], output: ModelOutput, hidden_KD: Tensor) -> Tensor:
    """What the model's own forward makes of `hidden_KD` in its backbone's `output`."""
    given = type(output)(**{**output, "last_hidden_state": hidden_KD.unsqueeze(0)})
    unread_1K = torch.zeros(1, len(hidden_KD), dtype=torch.long, device=hidden_KD.device)  # some ask for its shape
    backbone, head = lm.base_model, lm.get_output_embeddings()
    with (
        replaced(lm._modules, lm.base_model_prefix, StandIn(backbone, lambda *args, **kwargs: given)),
        replaced(lm._modules, _name_of(lm, head), StandIn(head, head_forward)),
    ):
        logits_KV: Tensor = lm._plain_forward(input_ids=unread_1K, return_dict=True).logits.squeeze(0)
    return logits_KV


def _name_of(lm: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, child in lm.named_children() if child is module), None)
