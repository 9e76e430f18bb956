"""Sampling from logits by inverting their cumulative distribution, exactly and whatever the order of summation.

A token's weight is the integer floor(2^b exp(x - max x)), with b as large as 64 bits allow for a sum over the vocabulary.
Sums of integers do not depend on their order, so a token follows from its row's logits and noise alone, and
torch.use_deterministic_algorithms allows all of it. A weight is off by less than 2^-b of the largest one, b >= 43 for
vocabularies of up to 2^18 tokens, which is below what float32 logits resolve.

The scan has two levels: sums of blocks of the vocabulary, and one block. Top-p is sampled without sorting: a token is in
the nucleus if the tokens that weigh more have less than p of the mass; one that is not is rejected, with all that weigh no
more than it, and sampling is repeated among the rest with fresh noise. Each token of the nucleus keeps its probability.
Source: the sorting-free rejection sampling of FlashInfer (flashinfer.ai/2025/03/10/sampling.html).

Axes: R rows, V vocabulary, N blocks, K tokens of a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..logging import get_logger
from ..model_utils import ran_out_of_memory


logger = get_logger(__name__)

NOISE_BITS = 52
"""Resolution of the noise, see `seeds.uniforms`."""
NUCLEUS_TOKENS = 1024
"""The largest weights that are sorted to find where a nucleus ends; all of them where it does not end among these."""


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
        bits = 62 - vocabulary.bit_length()
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
    if not narrowing.narrows:
        tokens_R, lse_R = _on_device(logits_RV.device.type)(logits_RV, noise_R)
        return tokens_R, lse_R, lse_R
    weights = Weights.of(logits_RV)
    lse_R = weights.logsumexp(weights.weights_RNK.sum((1, 2)))
    if 0 < narrowing.top_k < logits_RV.shape[1]:
        least_R1 = logits_RV.topk(narrowing.top_k, dim=-1).values[:, -1:]
        weights = _without(weights, logits_RV < least_R1)
    nucleus_R = narrowing.top_p * weights.weights_RNK.sum((1, 2)).double()
    if narrowing.min_p > 0:
        least_R1 = narrowing.min_p * weights.by_token.amax(-1, keepdim=True).double()
        weights = _without(weights, weights.by_token < least_R1)
    tokens_R, total_R = _invert(weights.weights_RNK, noise_R)
    if narrowing.top_p < 1:
        _resample_outside(weights, tokens_R, noise_R, nucleus_R)
        total_R = _weight_of_nucleus(weights.by_token, nucleus_R)
    return tokens_R, lse_R, weights.logsumexp(total_R)


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


def _without(weights: Weights, left_out: Tensor) -> Weights:
    kept = weights.by_token.clone()
    kept[:, : left_out.shape[1]].masked_fill_(left_out, 0)
    return Weights(kept.view_as(weights.weights_RNK), weights.max_R, weights.bits)


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


def _resample_outside(weights: Weights, tokens_R: Tensor, noise_R: Tensor, nucleus_R: Tensor) -> None:
    """Replace, in `tokens_R`, the tokens that have `nucleus_R` or more of the mass above them."""
    row_R = torch.arange(len(tokens_R), device=tokens_R.device)
    weights_RV = weights.by_token
    while len(row_R):
        above_RV = weights_RV * (weights_RV > weights_RV.gather(1, tokens_R[row_R, None]))
        outside_R = above_RV.sum(-1).double() >= nucleus_R[row_R]
        outside_R &= nucleus_R[row_R] > 0  # not so where logits are not finite
        row_R, weights_RV = row_R[outside_R], above_RV[outside_R]
        noise_R = _fresh(noise_R[outside_R])
        tokens_R[row_R], _ = _invert(weights_RV.view(-1, *weights.weights_RNK.shape[1:]), noise_R)


def _weight_of_nucleus(weights_RV: Tensor, nucleus_R: Tensor, tokens: int = NUCLEUS_TOKENS) -> Tensor:
    """Sum each row's weights that have less than `nucleus_R` above them."""
    tokens = min(tokens, weights_RV.shape[1])
    top_RK = weights_RV.topk(tokens, dim=-1).values
    inside_RK = (top_RK.cumsum(-1) - top_RK).double() < nucleus_R[:, None]
    if tokens < weights_RV.shape[1] and inside_RK[:, -1].any():
        return _weight_of_nucleus(weights_RV, nucleus_R, weights_RV.shape[1])
    least_R1 = top_RK.gather(1, (inside_RK.sum(-1, keepdim=True) - 1).clamp(min=0))
    return (weights_RV * (weights_RV >= least_R1)).sum(-1)  # with all that weigh as much as the last one inside


def _fresh(noise_R: Tensor) -> Tensor:
    """Other noise that follows from `noise_R`, by the mixing function of SplitMix64."""

    def shifted(x: Tensor, by: int) -> Tensor:  # as if unsigned
        return (x >> by) & ((1 << 64 - by) - 1)

    x = (noise_R * 2.0**NOISE_BITS).long() - 0x61C8864680B583EB
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return shifted(x ^ shifted(x, 31), 64 - NOISE_BITS).double() * 2.0**-NOISE_BITS
