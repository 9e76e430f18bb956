"""Stops a run whose sampler and whose loss describe different policies, before its first step."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..errors import RunStopped
from ..logprobs.comparison import NOISE_FACTOR, tolerance
from ..logprobs.evaluator import LogprobEvaluator
from ..types import Completion, Ranks


FEW, MORE = 4, 16
"""Completions of a rank that are compared at first, and before the run is stopped."""


class _Measured(NamedTuple):
    difference: float
    """Mean difference (nats) of the sampler's logprobs from the trainer's."""
    tokens: int
    noise: float
    """Mean difference of the trainer's from its own in micro-batches of one completion."""


class SamplerCheck:
    """Compares the logprobs of the sampler with the trainer's, both without dropout, once.

    Args:
        evaluator: Computes the trainer's.
        mixed_precision: Whether the policy computes in half precision, whatever its weights are.
        ranks: Compare together.
    """

    def __init__(self, evaluator: LogprobEvaluator, mixed_precision: bool, ranks: Ranks):
        self.evaluator = evaluator
        self.mixed_precision = mixed_precision
        self.ranks = ranks
        self._done = False

    def run(self, policy: nn.Module, completions: Sequence[Completion]) -> None:
        """Compare some `completions` at the first call; where they differ, more of them, and against the model's noise.

        Raises:
            RunStopped: They differ on some rank. The message names likely causes.
        """
        if self._done:
            return
        self._done = True
        allowed = tolerance(policy, self.mixed_precision)
        if self._worst(policy, completions[:FEW], noise=False).difference <= allowed:
            return
        worst = self._worst(policy, completions[:MORE], noise=True)
        allowed = max(allowed, NOISE_FACTOR * worst.noise)
        if not worst.difference <= allowed:
            raise RunStopped(
                "The policy that samples is not the one that the loss trains: logprobs of sampled tokens differ from the "
                f"trainer's by {worst.difference:.2g} nats on average over {worst.tokens} tokens, where {allowed:.2g} are "
                f"allowed (the model differs from itself by {worst.noise:.2g} in another batch shape). Likely causes: a "
                "callback, hook or reward function that changes weights, temperature or the mode of the model between "
                "sampling and the loss; noise in the model's forward that evaluation mode does not turn off; an adapter "
                "that is active in only one of both; code of the model that computes something else where keys and values "
                "are cached, which generation_kwargs={'cache_implementation': 'dynamic'} avoids."
            )

    def _worst(self, policy: nn.Module, completions: Sequence[Completion], noise: bool) -> _Measured:
        measured = self._measure(policy, [c for c in completions if c.sampler_logps is not None], noise)
        return max(self.ranks.gather([measured]), key=lambda one: math.inf if math.isnan(one.difference) else one[0])

    def _measure(self, policy: nn.Module, completions: list[Completion], noise: bool) -> _Measured:
        sampler = torch.tensor([logp for c in completions for logp in c.sampler_logps or []])
        trainer = torch.cat([torch.zeros(0), *self.evaluator.logps(policy, completions)])
        alone = trainer
        if noise:
            alone = torch.cat([torch.zeros(0), *self.evaluator.logps(policy, completions, alone=True)])
        return _Measured(_mean(trainer - sampler), len(sampler), _mean(trainer - alone))


def _mean(difference: torch.Tensor) -> float:
    return difference.abs().double().mean().item() if len(difference) else 0.0
