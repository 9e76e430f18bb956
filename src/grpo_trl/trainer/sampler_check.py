"""Stops a run whose sampler and whose loss describe different policies, before its first step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import RunStopped
from ..logprobs.comparison import Comparison, tolerance
from ..logprobs.evaluator import LogprobEvaluator
from ..types import Completion, Ranks


FEW, MORE = 4, 16
"""Completions of a rank that are compared at first, and before the run is stopped."""


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
        if self._worst(policy, completions[:FEW], noise=False).agrees:
            return
        worst = self._worst(policy, completions[:MORE], noise=True)
        if not worst.agrees:
            raise RunStopped(
                "The policy that samples is not the one that the loss trains: logprobs of sampled tokens differ from the "
                f"trainer's by {worst}. Likely causes: a "
                "callback, hook or reward function that changes weights, temperature or the mode of the model between "
                "sampling and the loss; noise in the model's forward that evaluation mode does not turn off; an adapter "
                "that is active in only one of both; code of the model that computes something else where keys and values "
                "are cached, which generation_kwargs={'cache_implementation': 'dynamic'} avoids."
            )

    def _worst(self, policy: nn.Module, completions: Sequence[Completion], noise: bool) -> Comparison:
        compared = self._compare(policy, [c for c in completions if c.sampler_logps is not None], noise)
        return max(self.ranks.gather([compared]), key=lambda c: math.inf if math.isnan(c.difference) else c.difference)

    def _compare(self, policy: nn.Module, completions: list[Completion], noise: bool) -> Comparison:
        sampler = torch.tensor([logp for c in completions for logp in c.sampler_logps or []])
        trainer, alone = self._logps(policy, completions), None
        if noise:
            alone = self._logps(policy, completions, alone=True)
        return Comparison.of(sampler, trainer, alone, tolerance(policy, self.mixed_precision))

    def _logps(self, policy: nn.Module, completions: list[Completion], alone: bool = False) -> Tensor:
        return torch.cat([torch.zeros(0), *self.evaluator.logps(policy, completions, alone)])
