"""Keeps an engine that has weights of its own on the policy, and proves that it samples from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from ..distributed.collectives import run_on_all_ranks
from ..errors import RunStopped
from ..logprobs.comparison import TOLERANCE
from ..logprobs.compute import compute_completion_logprobs
from ..logprobs.evaluator import LogprobEvaluator
from ..metrics import Max, Mean, MetricLog
from ..rollout.base import RolloutRequest, SyncedEngine
from ..types import Completion, Ranks


class _Difference(NamedTuple):
    """Between the logprobs of an engine and the trainer's, on one rank."""

    mean: float
    largest: float
    where: str


@dataclass
class WeightSync:
    """Sends the policy's weights to the engine, and stops the run if its logprobs are not the policy's then.

    Args:
        engine: Gets the weights.
        evaluator: Knows how completions are laid out for the policy.
        ranks: Sync and compare together.
        tolerance: Of the mean absolute difference of logprobs (nats).
    """

    engine: SyncedEngine
    evaluator: LogprobEvaluator
    ranks: Ranks
    tolerance: float = TOLERANCE

    def run(self, policy: nn.Module, request: RolloutRequest, log: MetricLog) -> None:
        """Sync the wrapped `policy`, and compare what the engine samples for some prompts of `request`.

        Raises:
            RunStopped: The logprobs differ; so that no step is made on samples of another model.
        """
        with log.timed("time/sync"):
            run_on_all_ranks(self.engine.sync_weights, self.ranks)
        probes = run_on_all_ranks(lambda: self.engine.probe(request), self.ranks)
        if probes:
            self._compare(policy, probes, log)

    def _compare(self, policy: nn.Module, probes: Sequence[Completion], log: MetricLog) -> None:
        packer = replace(self.evaluator.packer, shared_prefix=False)
        logps = compute_completion_logprobs(policy, probes, packer, self.evaluator.temperature)
        differences = self.ranks.gather([_difference(probes, logps)])
        worst = max(differences, key=lambda one: one.mean)
        log.add("sampling/sync_difference/mean", Mean(worst.mean))
        log.add("sampling/sync_difference/max", Max(max(one.largest for one in differences)))
        if not worst.mean <= self.tolerance:
            raise RunStopped(
                f"vLLM does not sample from the policy that is trained: right after its weights were synced, logprobs of "
                f"sampled tokens differ from the trainer's by {worst.mean:.3g} on average and {worst.largest:.3g} at most "
                f"(allowed: {self.tolerance:g} on average); {worst.where}. Does vLLM serve this model, for this run alone, "
                "in the precision of the trainer?"
            )


def _difference(probes: Sequence[Completion], logps: Sequence[torch.Tensor]) -> _Difference:
    sampler = torch.tensor([logp for probe in probes for logp in probe.sampler_logps or []], dtype=torch.float64)
    trainer = torch.cat([one.double().cpu() for one in logps])
    size = (sampler - trainer).abs()
    known = ~size.isnan()
    if not known.any():
        return _Difference(float("inf"), float("inf"), "vLLM reports no logprobs")
    place = int(size.nan_to_num(-1.0).argmax())
    token = [token for probe in probes for token in probe.ids][place]
    where = f"token id {token} has {float(sampler[place]):.4g} in vLLM and {float(trainer[place]):.4g} in the trainer"
    return _Difference(float(size[known].mean()), float(size[known].max()), where)
