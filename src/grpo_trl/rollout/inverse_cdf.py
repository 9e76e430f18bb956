"""Sampling from logits by inverting their cumulative distribution, exactly and whatever the order of summation.

A token's weight is the integer floor(2^b exp(x - max x)), with b as large as 64 bits allow for a sum over the vocabulary.
Sums of integers do not depend on their order, so a token follows from its row's logits and noise alone, and
torch.use_deterministic_algorithms allows all of it. A weight is off by less than 2^-b of the largest one, b >= 43 for
vocabularies of up to 2^18 tokens, which is below what float32 logits resolve.

The scan has two levels: sums of blocks of the vocabulary, and one block. Top-k, top-p and min-p each leave the tokens that
weigh at least so much; the others weigh nothing, and the scan is the same. Logits in float32 on a CPU are sampled from by a
kernel in C++, which rounds exp in its own way.

Axes: R rows, V vocabulary, N blocks, K tokens of a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cpu_kernels import DOUBLE, POINTER, SIZE, library
from ..logging import get_logger
from ..model_utils import ran_out_of_memory
from .nucleus import least_weight


logger = get_logger(__name__)


@dataclass(frozen=True)
class Narrowing:
    """Which tokens may be sampled at all: top-k, then top-p, then min-p, as transformers defines them."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def narrows(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Weights:
    """Integers in proportion to the probabilities of each row's tokens; 0 behind the vocabulary's end."""

    weights_RNK: Tensor
    max_R: Tensor
    """The largest logit, of which weights are counted from."""
    bits: int

    @classmethod
    def of(cls, logits_RV: Tensor) -> "Weights":
        logits_RV = widened(logits_RV)
        rows, vocabulary = logits_RV.shape
        block = 1 << -(-(vocabulary - 1).bit_length() // 2)
        bits = _bits(vocabulary)
        max_R1 = logits_RV.amax(-1, keepdim=True)
        weights_RV = (logits_RV - max_R1).exp_().mul_(2.0**bits).long()
        if missing := -vocabulary % block:
            weights_RV = pad(weights_RV, (0, missing))
        return cls(weights_RV.view(rows, -1, block), max_R1[:, 0], bits)

    @property
    def by_token(self) -> Tensor:
        """Of shape (R, V or more)."""
        return self.weights_RNK.flatten(1)

    def logsumexp(self, total_R: Tensor) -> Tensor:
        """Of the logits whose weights sum to `total_R`, in float64."""
        return self.max_R.double() + (total_R.double() * 2.0**-self.bits).log()


def _bits(vocabulary: int) -> int:
    """Of the largest weight, so that those of all tokens can be summed."""
    return 62 - vocabulary.bit_length()


def widened(logits_RV: Tensor) -> Tensor:
    """In float32 at least."""
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


def sample_tokens(logits_RV: Tensor, noise_R: Tensor, narrowing: Narrowing) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row from softmax(logits), narrowed.

    Args:
        logits_RV: In any precision; sums are taken in float32 at least.
        noise_R: Numbers in [0, 1), float64.
        narrowing: Leaves out improbable tokens.

    Returns:
        The tokens; and the log-sum-exp of each row's logits before and after narrowing, in float64. They are not finite
        where the logits allow no sample.
    """
    if _is_served(logits_RV):
        return _sample_by_kernel(logits_RV, noise_R, narrowing)
    if not narrowing.narrows:
        tokens_R, lse_R = _on_device(logits_RV.device.type)(logits_RV, noise_R)
        return tokens_R, lse_R, lse_R
    weights = Weights.of(logits_RV)
    lse_R = weights.logsumexp(weights.by_token.sum(-1))
    tokens_R, total_R = _invert(_narrowed(weights, logits_RV, narrowing).view_as(weights.weights_RNK), noise_R)
    return tokens_R, lse_R, weights.logsumexp(total_R)


@functools.cache
def _kernel() -> Any:
    """For float32 on a CPU; None where it cannot be compiled."""
    return library(
        Path(__file__).with_suffix(".cpp"),
        {"logsumexp": [POINTER] * 2 + [SIZE] * 3, "sample": [POINTER] * 5 + [DOUBLE] * 2 + [SIZE] * 4},
    )


def logsumexp(logits_RV: Tensor) -> Tensor:
    """Of each row's logits, in float64."""
    if not _is_served(logits_RV):
        return widened(logits_RV).logsumexp(-1).double()
    logits_RV = logits_RV.contiguous()
    lse_R = torch.empty(len(logits_RV), dtype=torch.float64)
    _kernel().logsumexp(logits_RV.data_ptr(), lse_R.data_ptr(), _bits(logits_RV.shape[1]), *logits_RV.shape)
    return lse_R


def _is_served(logits_RV: Tensor) -> bool:
    """Whether the kernel computes with them."""
    return logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32 and _kernel() is not None


def _sample_by_kernel(logits_RV: Tensor, noise_R: Tensor, narrowing: Narrowing) -> tuple[Tensor, Tensor, Tensor]:
    logits_RV, noise_R = logits_RV.contiguous(), noise_R.double().contiguous()
    rows, vocabulary = logits_RV.shape
    tokens_R = torch.empty(rows, dtype=torch.long)
    lse_R, narrowed_lse_R = torch.empty(2, rows, dtype=torch.float64)
    _kernel().sample(
        *(x.data_ptr() for x in (logits_RV, noise_R, tokens_R, lse_R, narrowed_lse_R)),
        *(narrowing.top_p, narrowing.min_p, narrowing.top_k),
        *(_bits(vocabulary), rows, vocabulary),
    )
    return tokens_R, lse_R, narrowed_lse_R


def _narrowed(weights: Weights, logits_RV: Tensor, narrowing: Narrowing) -> Tensor:
    """The weights by token, which are changed: 0 for those that may not be sampled."""
    weights_RV = weights.by_token
    vocabulary = logits_RV.shape[1]
    if 0 < narrowing.top_k < vocabulary:
        least_R1 = logits_RV.topk(narrowing.top_k, dim=-1).values[:, -1:]
        weights_RV[:, :vocabulary].masked_fill_(logits_RV < least_R1, 0)
    least = []
    if narrowing.min_p > 0:
        least.append((narrowing.min_p * weights_RV.amax(-1, keepdim=True).double()).ceil().long())
    if narrowing.top_p < 1:
        nucleus_R1 = (narrowing.top_p * weights_RV.sum(-1, keepdim=True).double()).ceil().long()
        least.append(least_weight(weights_RV, nucleus_R1))
    for least_R1 in least:
        weights_RV.masked_fill_(weights_RV < least_R1, 0)
    return weights_RV


def _sample_from_all(logits_RV: Tensor, noise_R: Tensor) -> tuple[Tensor, Tensor]:
    """Sample without narrowing; return the tokens and the log-sum-exp of each row's logits."""
    weights = Weights.of(logits_RV)
    tokens_R, total_R = _invert(weights.weights_RNK, noise_R)
    return tokens_R, weights.logsumexp(total_R)


@functools.cache
def _on_device(device_type: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compiled on a GPU, where eager launches would read the logits eight times; as it is where it cannot be."""
    if device_type != "cuda":
        return _sample_from_all
    compiled = torch.compile(_sample_from_all)

    def sample(logits_RV: Tensor, noise_R: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal compiled
        try:
            return compiled(logits_RV, noise_R)
        except Exception as error:  # whatever a compiler that is missing or broken raises
            if ran_out_of_memory(error) or compiled is _sample_from_all:
                raise
            logger.warning("The sampler cannot be compiled, and takes longer: %s", error)
            compiled = _sample_from_all
            return sample(logits_RV, noise_R)

    return sample


def _invert(weights_RNK: Tensor, noise_R: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row in whose share of the cumulative weight the noise falls, and the row's total weight."""
    rows, blocks, size = weights_RNK.shape
    block_RN = weights_RNK.sum(-1)
    up_to_RN = block_RN.cumsum(-1)
    total_R = up_to_RN[:, -1]
    target_R1 = torch.minimum((noise_R * total_R.double()).long(), total_R - 1)[:, None]
    # the bounds matter only where logits are not finite, whose log-probabilities tell
    block_R1 = torch.searchsorted(up_to_RN, target_R1, right=True).clamp_(max=blocks - 1)
    inside_R1 = target_R1 - (up_to_RN - block_RN).gather(1, block_R1)
    block_RK = weights_RNK[torch.arange(rows, device=noise_R.device), block_R1[:, 0]]
    place_R1 = torch.searchsorted(block_RK.cumsum(-1), inside_R1, right=True).clamp_(max=size - 1)
    return (block_R1 * size + place_R1)[:, 0], total_R
